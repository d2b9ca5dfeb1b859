"""Checkpoints of transformers, packed one layer at a time and loaded again as accelerated models.

A packed checkpoint is a folder:

    config.json, generation_config.json, tokenizer files    as in the checkpoint
    experts.qse             the experts of every layer, see `quernstone.moe.file`
    layer-00000.safetensors ...  what else a layer has; packed matrices as `<name>.packed`, uint8
    rest.safetensors        what no layer has
    quernstone.json         version, how matrices are packed, the size and the CRC-32 of every file
                            (of the experts', their own index has it)
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from quernstone._files import write_whole
from quernstone.moe.block import Source, shared_of
from quernstone.moe.experts import Compute, ExpertsShape
from quernstone.moe.file import ExpertsWriter, Memory, load_experts
from quernstone.moe.gating import AdaptiveGating
from quernstone.moe.hf import (
    Attention,
    Packing,
    RuntimeOptions,
    check_model,
    install,
    linears_of,
    runtime_of,
    together,
)
from quernstone.moe.routing import MoeBlock, moe_blocks
from quernstone.quant.linear import MatrixShape, PackedMatrix, check_compute

VERSION = 1
MANIFEST, EXPERTS, REST = "quernstone.json", "experts.qse", "rest.safetensors"
_PACKED = ".packed"
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_COPIED = ("config.json", "generation_config.json", "chat_template.jinja", "merges.txt")
_COPIED_STEMS = ("tokenizer", "vocab", "special_tokens", "added_tokens")

Say = Callable[[str], None]


class Shards:
    """The tensors of a checkpoint by name, read from the disk when asked for.

    Args:
        folder: with model.safetensors, or with model.safetensors.index.json and its shards.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: a file is cut short or damaged; the message names the path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        index = folder / _INDEX
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._of = {name: folder / Path(file).name for name, file in names.items()}
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise ValueError(f"{index}: got no index of shards ({error!r})") from None
        elif (folder / _WHOLE).is_file():
            whole = folder / _WHOLE
            self._of = dict.fromkeys(self._open(whole).keys(), whole)
        else:
            raise FileNotFoundError(f"{folder}: got no {_WHOLE} and no {_INDEX}, expected one")

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def get(self, *names: str) -> Tensor:
        """The first of the names that the checkpoint has.

        Raises:
            ValueError: it has none, or its shard is damaged.
        """
        for name in names:
            if name in self._of:
                return self._read(self._of[name], name, None)
        raise ValueError(f"{self.folder}: got no {names[0]}, expected the weights of the model")

    def part(self, name: str, index: int, of: tuple[int, ...]) -> Tensor:
        """tensor[index] of a tensor of a shape, without reading the others.

        Raises:
            ValueError: there is none, or one of another shape.
        """
        if name not in self._of:
            raise ValueError(f"{self.folder}: got no {name}, expected the weights of the model")
        got = tuple(self._open(self._of[name]).get_slice(name).get_shape())
        if got != of:
            raise ValueError(f"{self._of[name]}: {name}: got {got}, expected {of}")
        return self._read(self._of[name], name, index)

    def _open(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._files:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            try:
                self._files[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        return self._files[path]

    def _read(self, path: Path, name: str, index: int | None) -> Tensor:
        from safetensors import SafetensorError

        try:
            if index is None:
                found: Tensor = self._open(path).get_tensor(name)
            else:
                found = self._open(path).get_slice(name)[index]
        except SafetensorError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
        if found.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{path}: {name}: got {found.dtype}, expected torch.float32 or torch.bfloat16"
            )
        return found


class _Experts:
    """The experts of a block as checkpoints name them: stacked, or one by one in two ways."""

    def __init__(self, shards: Shards, block: MoeBlock) -> None:
        stacked: Any = block.experts
        self._shards, self._shape = shards, tuple(stacked.down_proj.shape)
        self.name = block.name
        old = f"{block.name.removesuffix('.mlp')}.block_sparse_moe"
        for kind, probe in (
            ("stacked", f"{block.name}.experts.gate_up_proj"),
            ("single", f"{block.name}.experts.0.gate_proj.weight"),
            ("mixtral", f"{old}.experts.0.w1.weight"),
        ):
            if probe in shards:
                self._kind, self._old = kind, old
                break
        else:
            raise ValueError(
                f"{shards.folder}: got no experts of {block.name}, expected "
                f"{block.name}.experts.gate_up_proj or one by one"
            )
        count = self._shape[0]
        for more in (f"{block.name}.experts.{count}.gate_proj", f"{old}.experts.{count}.w1"):
            if f"{more}.weight" in shards:
                raise ValueError(f"{shards.folder}: got {more}, expected {count} experts")
        shared = shared_of(block.module)
        self.shared: tuple[Tensor, Tensor, Tensor] | None = None
        if shared is not None:
            name = next(n for n in ("shared_expert", "shared_experts") if hasattr(block.module, n))
            gate, up, down = (
                shards.get(f"{block.name}.{name}.{part}.weight")
                for part in ("gate_proj", "up_proj", "down_proj")
            )
            self.shared = gate, up, down

    def expert(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        count, hidden, width = self._shape
        if self._kind == "stacked":
            of = f"{self.name}.experts"
            both = self._shards.part(f"{of}.gate_up_proj", index, (count, 2 * width, hidden))
            gate, up = both.chunk(2)
            return gate, up, self._shards.part(f"{of}.down_proj", index, (count, hidden, width))
        if self._kind == "single":
            of, parts = f"{self.name}.experts.{index}", ("gate_proj", "up_proj", "down_proj")
        else:
            of, parts = f"{self._old}.experts.{index}", ("w1", "w3", "w2")
        first, second, third = (self._shards.get(f"{of}.{part}.weight") for part in parts)
        for part, weight, want in zip(
            parts,
            (first, second, third),
            ((width, hidden), (width, hidden), (hidden, width)),
            strict=True,
        ):
            if tuple(weight.shape) != want:
                got = tuple(weight.shape)
                raise ValueError(f"{self._shards.folder}: {of}.{part}: got {got}, expected {want}")
        return first, second, third


def pack_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    packing: Packing | None = None,
    *,
    say: Say = lambda _: None,
) -> Path:
    """Packs a checkpoint that may be larger than memory.

    The model is built on no device; an expert is read, quantised and packed after the other, a
    layer written after the other. The folder appears when everything is in it.

    Args:
        source: folder with config.json and safetensors, in one file or in shards.
        out: folder to be made; it must not be there, or be empty.
        packing: how; None is int4 in groups of 32, linear layers too.
        say: told of each layer.

    Returns:
        The folder.

    Raises:
        ValueError: another architecture, a tensor that is missing, misshapen or not finite, a file
            that is cut short.
        FileNotFoundError: no checkpoint there.
        FileExistsError: something is at `out`.
    """
    packing = Packing(linear="int4") if packing is None else packing
    source, target = Path(source), Path(out).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target}: got something there, expected no folder or an empty one")
    model = skeleton(source)
    shards = Shards(source)
    with _appearing(target) as folder:
        _pack_experts(model, shards, packing, folder / EXPERTS, say)
        _pack_rest(model, shards, packing, folder, say)
        for path in sorted(source.iterdir()):
            wanted = path.name in _COPIED or path.name.startswith(_COPIED_STEMS)
            if wanted and path.is_file():
                shutil.copyfile(path, folder / path.name)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        sums = {name: _crc32(folder / name) for name in files if name != EXPERTS}
        about = {
            "version": VERSION,
            "packing": packing.to_dict(),
            "files": files,
            "crc32": sums,
        }
        write_whole(folder / MANIFEST, json.dumps(about, indent=1).encode())
    return target


def load_packed(
    folder: str | os.PathLike[str],
    *,
    memory: Memory = "huge",
    verify: bool = True,
    compute: Compute | None = None,
    attention: Attention = "quernstone",
    gating: AdaptiveGating | None = None,
    **options: Unpack[RuntimeOptions],
) -> nn.Module:
    """The accelerated model of a folder that `pack_checkpoint` wrote.

    Args:
        folder: that it returned.
        memory: where the experts are to be, see `load_experts`; with "map" they are read as they
            are used, and may be more than fit.
        verify: whether checksums are compared, for which all of the folder is read.
        compute, attention, gating: see `accelerate`.
        options: of `Runtime`, see `accelerate`.

    Raises:
        ValueError: the folder is no such folder, of another version, or a file in it is cut short,
            damaged or of another model; the message names the path.
        OSError: it cannot be read.
    """
    from transformers import GenerationConfig

    root = Path(folder)
    check_compute(compute, "int8")  # that it is a name; bf16 experts keep their own for "int8"
    _read_manifest(root, verify=verify)
    model: Any = skeleton(root)
    experts = load_experts(root / EXPERTS, memory=memory, verify=verify)
    names = [block.name for block in moe_blocks(model)]
    if [*experts] != names:
        raise ValueError(f"{root / EXPERTS}: got {[*experts]}, expected {names}")
    for block in moe_blocks(model):
        made = experts[block.name]
        want = _shape(block, made.shape)
        if made.shape != want:
            raise ValueError(f"{root / EXPERTS}: {block.name}: got {made.shape}, expected {want}")
        if compute is not None and (compute != "int8" or made.shape.format != "bf16"):
            made.compute = compute
    matrices = _fill(model, root)
    if (root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(root)
    return install(
        model,
        experts,
        matrices,
        compute=compute,
        attention=attention,
        gating=gating,
        runtime=runtime_of(options),
        prefetch=options.get("prefetch", 0),
    )


def skeleton(folder: Path) -> nn.Module:
    """The model of a folder's config.json on no device, checked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: got no config.json, expected a checkpoint")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of a file that says anything, transformers raises anything
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    check_model(model, weights=False)
    return model.eval()


def _pack_experts(model: nn.Module, shards: Shards, packing: Packing, path: Path, say: Say) -> None:
    blocks = moe_blocks(model)
    with ExpertsWriter(path) as writer:
        for block in blocks:
            stacked: Any = block.experts
            count, hidden, width = stacked.down_proj.shape
            found = _Experts(shards, block)
            # Of no device, but for the shared ones: what is asked of it are its extents.
            source = Source(stacked.gate_up_proj, stacked.down_proj, found.shared)

            def expert(
                index: int, found: _Experts = found, source: Source = source, count: int = count
            ) -> tuple[Tensor, Tensor, Tensor]:
                return found.expert(index) if index < count else source.expert(index)

            writer.add(block.name, packing.experts(source, expert))
            say(f"{block.name}: {count} experts of {hidden} by {width}")


def _pack_rest(model: nn.Module, shards: Shards, packing: Packing, folder: Path, say: Say) -> None:
    from safetensors.torch import save_file

    blocks = moe_blocks(model)
    skipped = tuple(
        f"{block.name}.{part}."
        for block in blocks
        for part in ("experts", "shared_expert", "shared_experts")
    )
    groups: dict[str, list[str]] = {}
    for name in model.state_dict():
        if name.startswith(skipped):
            continue
        parts = name.split(".")
        layer = parts[2] if parts[:2] == ["model", "layers"] else None
        file = REST if layer is None else f"layer-{int(layer):05d}.safetensors"
        groups.setdefault(file, []).append(name)
    layers = linears_of(model) if packing.linear is not None else {}
    sets = {names[0]: names for names in together(layers)}
    inside = {name for names in sets.values() for name in names}
    for file, names in groups.items():
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for name in names:
            owner = name.removesuffix(".weight")
            if owner in sets:
                weights = {part: _tensor(model, shards, f"{part}.weight") for part in sets[owner]}
                for part, matrix in packing.matrices(weights).items():
                    tensors[part + _PACKED] = torch.from_numpy(matrix.data).clone()
                    about[part] = matrix.shape.to_dict()
            elif owner not in inside:
                tensors[name] = _tensor(model, shards, name).clone()
        save_file(tensors, folder / file, {"quernstone.matrices": json.dumps(about)})
        say(f"{file}: {len(tensors)} tensors")


def _tensor(model: nn.Module, shards: Shards, name: str) -> Tensor:
    """A tensor of the checkpoint by its name in the model, of the shape that it has there."""
    names = [name, name.replace(".mlp.", ".block_sparse_moe.")]
    tied: Any = model
    if name == "lm_head.weight" and tied.config.tie_word_embeddings:
        names.append("model.embed_tokens.weight")
    found = shards.get(*names)
    want = tuple(model.state_dict(keep_vars=True)[name].shape)
    if tuple(found.shape) != want:
        raise ValueError(f"{shards.folder}: {name}: got {tuple(found.shape)}, expected {want}")
    return found


def _shape(block: MoeBlock, packed: ExpertsShape) -> ExpertsShape:
    """That experts of a block have, packed as these are."""
    stacked: Any = block.experts
    count, hidden, width = stacked.down_proj.shape
    shared: Any = shared_of(block.module)
    extra = 0 if shared is None else -(-shared.gate_proj.out_features // width)
    return ExpertsShape(
        count + extra, hidden, width, packed.format, packed.group, packed.zero_points
    )


def _fill(model: Any, root: Path) -> dict[str, PackedMatrix]:
    """Gives a model on no device what is not packed; what is, by name."""
    wanted = {
        name
        for name in model.state_dict()
        if not any(f".{part}." in name for part in ("experts", "shared_expert", "shared_experts"))
    }
    parts: dict[str, Tensor] = {}
    shapes: dict[str, Any] = {}
    for path in sorted(root.glob("*.safetensors")):
        found, about = _read(path)
        parts |= found
        shapes |= about
    matrices: dict[str, PackedMatrix] = {}
    linears = linears_of(model)
    for names in together({name: linears[name] for name in linears if name in shapes}):
        made = _matrices(root, {name: shapes[name] for name in names}, parts)
        for name, matrix in made.items():
            layer, shape = linears[name], matrix.shape
            if (shape.outputs, shape.inputs) != (layer.out_features, layer.in_features):
                raise ValueError(f"{root}: {name}: got {shape}, expected that of the model")
            wanted.discard(f"{name}.weight")
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        matrices |= made
    for name in sorted(wanted):
        if name not in parts:
            raise ValueError(f"{root}: got no {name}, expected the weights of the model")
        parent, _, leaf = name.rpartition(".")
        owner, value = model.get_submodule(parent), parts.pop(name)
        old = getattr(owner, leaf)
        if value.shape != old.shape:
            got, want = tuple(value.shape), tuple(old.shape)
            raise ValueError(f"{root}: {name}: got {got}, expected {want}")
        if isinstance(old, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        else:
            setattr(owner, leaf, value)
    # Not in any checkpoint, and made on no device with the model.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config)
    return matrices


def _matrices(
    root: Path, shapes: Mapping[str, Any], parts: dict[str, Tensor]
) -> dict[str, PackedMatrix]:
    """Matrices that lie behind one another again."""
    try:
        of = {name: MatrixShape(**shape) for name, shape in shapes.items()}
        first = next(iter(of.values()))
        whole = PackedMatrix.empty(
            MatrixShape(
                sum(shape.outputs for shape in of.values()),
                first.inputs,
                first.format,
                first.group,
                first.zero_points,
            )
        )
        made, begin = {}, 0
        for name, shape in of.items():
            part = whole.rows(begin, begin + shape.outputs)
            data = parts.pop(name + _PACKED)
            if part.shape != shape or data.dtype != torch.uint8 or len(data) != shape.nbytes:
                raise ValueError(f"{name}: got {len(data)} bytes of {shape}")
            part.data[:] = data.numpy()
            made[name] = part
            begin += shape.outputs
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{root}: a packed matrix: {error}") from None
    return made


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, dict(json.loads(metadata.get("quernstone.matrices", "{}")))
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole file of tensors ({error})") from None


def _read_manifest(root: Path, *, verify: bool) -> None:
    path = root / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{root}: got no {MANIFEST}, expected a folder of `moe pack`")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version, files = about["version"], dict(about["files"])
        sums = dict(about.get("crc32", {}))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got no manifest ({error!r})") from None
    if version != VERSION:
        raise ValueError(f"{path}: version: got {version!r}, expected {VERSION}")
    for name, size in files.items():
        file = root / Path(name).name
        if not file.is_file():
            raise ValueError(f"{file}: no such file, expected one of {size} bytes")
        if file.stat().st_size != size:
            raise ValueError(f"{file}: got {file.stat().st_size} bytes, expected {size}")
        if verify and name in sums and _crc32(file) != sums[name]:
            raise ValueError(f"{file}: damaged, its checksum is another")


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder that takes the name when the block ends without an error, else goes."""
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    beside.mkdir(parents=True)
    try:
        yield beside
        if target.is_dir():
            target.rmdir()
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
