"""Checkpoints packed a layer at a time, loaded again, and what is wrong with some of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from quernstone.moe import Packing, accelerate, load_experts, load_packed, pack_checkpoint
from quernstone.moe.checkpoint import EXPERTS, MANIFEST, REST
from tests.moe.hf_tiny import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type:UserWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of many shards and what was packed of it."""
    root = tmp_path_factory.mktemp("mixtral")
    tiny("mixtral").save_pretrained(root / "whole", max_shard_size="60KB")
    pack_checkpoint(root / "whole", root / "packed", Packing("int4", linear="int8"))
    return root / "whole", root / "packed"


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v2-groups", "deepseek_v3"])
def test_a_packed_checkpoint_is_the_accelerated_model_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    model, ids = tiny(name), tokens(1)
    model.save_pretrained(tmp_path / "whole")
    lines: list[str] = []
    packing = Packing("int4", linear="int8")
    pack_checkpoint(tmp_path / "whole", tmp_path / "packed", packing, say=lines.append)
    assert any(line.startswith("model.layers.2.mlp: ") for line in lines)
    loaded = load_packed(tmp_path / "packed")
    same = accelerate(model, format="int4", linear="int8", attention="quernstone")
    assert torch.equal(logits(loaded, ids), logits(same, ids))
    assert loaded.quernstone.compiled == same.quernstone.compiled


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_stacked_experts_are_found_too(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, ids = tiny(name), tokens(1)
    (tmp_path / "whole").mkdir()
    model.config.save_pretrained(tmp_path / "whole")
    save_file(model.state_dict(), tmp_path / "whole" / "model.safetensors")
    pack_checkpoint(tmp_path / "whole", tmp_path / "packed", Packing("bf16"))
    loaded = load_packed(tmp_path / "packed", attention="model")
    assert torch.equal(logits(loaded, ids), logits(accelerate(model, format="bf16"), ids))


def test_shards_are_read_one_expert_at_a_time(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no time is more of the checkpoint alive than an expert and what is not experts."""
    import quernstone.moe.checkpoint as module

    alive: list[int] = []
    read = module.Shards._read
    total = sum(w.numel() for n, w in tiny("mixtral").named_parameters() if ".experts." in n)

    def watched(self: Any, path: Path, name: str, index: int | None) -> torch.Tensor:
        found = read(self, path, name, index)
        if ".experts." in name:
            alive.append(found.numel())
        return found

    monkeypatch.setattr(module.Shards, "_read", watched)
    pack_checkpoint(folders[0], tmp_path / "packed", Packing("bf16"))
    assert sum(alive) == total
    assert max(alive) * 3 <= total // (3 * 6)


def test_tied_outputs_are_packed_from_the_embedding(tmp_path: Path) -> None:
    model, ids = tiny("mixtral", tie_word_embeddings=True), tokens(1)
    model.tie_weights()
    model.save_pretrained(tmp_path / "whole")
    pack_checkpoint(tmp_path / "whole", tmp_path / "packed", Packing("bf16", linear="bf16"))
    loaded = load_packed(tmp_path / "packed", attention="model")
    same = accelerate(model, format="bf16", linear="bf16")
    assert torch.equal(logits(loaded, ids), logits(same, ids))


def test_mapped_experts_give_the_same_and_say_when_their_file_changes(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    packed, ids = tmp_path / "packed", tokens(1)
    shutil.copytree(folders[1], packed)
    mapped = load_packed(packed, memory="map")
    want = logits(load_packed(packed), ids)
    assert torch.equal(logits(mapped, ids), want)
    # Replaced as `save_experts` replaces: the old file lives on for those who have it mapped.
    shutil.copyfile(packed / EXPERTS, packed / "other")
    (packed / "other").replace(packed / EXPERTS)
    assert torch.equal(logits(mapped, ids), want)
    again = load_packed(packed, memory="map")
    os.truncate(packed / EXPERTS, 4096)
    with pytest.raises(ValueError, match="file of the experts has 4096 bytes left"):
        logits(again, ids)
    assert torch.equal(logits(mapped, ids), want)


def test_experts_written_to_while_mapped_are_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "x.qse"
    shutil.copyfile(folders[1] / EXPERTS, path)
    experts = next(iter(load_experts(path, memory="map").values()))
    x, ids, weights = torch.ones(1, 64), torch.tensor([[0]]), torch.ones(1, 1)
    assert experts(x, ids, weights).isfinite().all()
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"other weights")
    os.utime(path, (1, 1))
    with pytest.raises(OSError, match="written to after it was mapped"):
        experts(x, ids, weights)


class TestBadInput:
    def test_nothing_is_left_where_packing_fails(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        whole = tmp_path / "whole"
        shutil.copytree(folders[0], whole)
        shard = sorted(whole.glob("model-*.safetensors"))[-1]
        os.truncate(shard, shard.stat().st_size - 100)
        with pytest.raises(ValueError, match=shard.name):
            pack_checkpoint(whole, tmp_path / "packed")
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]

    def test_missing_files_are_named(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            pack_checkpoint(tmp_path, tmp_path / "packed")
        whole = tmp_path / "whole"
        shutil.copytree(folders[0], whole)
        shard = sorted(whole.glob("model-*.safetensors"))[0]
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=shard.name):
            pack_checkpoint(whole, tmp_path / "packed")
        for path in whole.glob("model*"):
            path.unlink()
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
            pack_checkpoint(whole, tmp_path / "packed")

    @pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
    def test_an_index_that_is_none_is_named(
        self, folders: tuple[Path, Path], tmp_path: Path, content: str
    ) -> None:
        whole = tmp_path / "whole"
        shutil.copytree(folders[0], whole)
        (whole / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=r"index\.json: got no index of shards"):
            pack_checkpoint(whole, tmp_path / "packed")

    def test_a_folder_that_is_not_empty_stays(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "mine").write_text("x")
        with pytest.raises(FileExistsError, match="expected no folder or an empty one"):
            pack_checkpoint(folders[0], tmp_path)
        assert (tmp_path / "mine").read_text() == "x"

    def test_another_architecture_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(ValueError, match="got 'llama', expected one of mixtral"):
            pack_checkpoint(tmp_path, tmp_path / "packed")

    def test_a_checkpoint_of_another_shape_is_named(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        whole = tmp_path / "whole"
        shutil.copytree(folders[0], whole)
        config = json.loads((whole / "config.json").read_text())
        for key, words in (("intermediate_size", "w1: got"), ("vocab_size", "embed_tokens")):
            (whole / "config.json").write_text(json.dumps({**config, key: 2 * config[key]}))
            with pytest.raises(ValueError, match=words):
                pack_checkpoint(whole, tmp_path / "packed")

    @pytest.mark.parametrize("name", [EXPERTS, REST, "layer-00001.safetensors"])
    @pytest.mark.parametrize("damage", ["gone", "short", "damaged"])
    def test_a_damaged_folder_is_told_by_the_file(
        self, folders: tuple[Path, Path], tmp_path: Path, name: str, damage: str
    ) -> None:
        packed = tmp_path / "packed"
        shutil.copytree(folders[1], packed)
        path = packed / name
        if damage == "gone":
            path.unlink()
        elif damage == "short":
            os.truncate(path, path.stat().st_size // 2)
        else:
            data = bytearray(path.read_bytes())
            data[0:8] = b"\xff" * 8
            path.write_bytes(data)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load_packed(packed)

    def test_a_manifest_of_another_version_is_told(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        packed = tmp_path / "packed"
        shutil.copytree(folders[1], packed)
        (packed / MANIFEST).write_text(json.dumps({"version": 99, "files": {}}))
        with pytest.raises(ValueError, match="version: got 99, expected 1"):
            load_packed(packed)
        (packed / MANIFEST).write_text("{")
        with pytest.raises(ValueError, match="got no manifest"):
            load_packed(packed)
        with pytest.raises(FileNotFoundError, match="expected a folder of `moe pack`"):
            load_packed(tmp_path)

    def test_experts_of_another_model_are_told(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        packed = tmp_path / "packed"
        shutil.copytree(folders[1], packed)
        config = json.loads((packed / "config.json").read_text())
        manifest = json.loads((packed / MANIFEST).read_text())
        config["num_local_experts"] = 7
        (packed / "config.json").write_text(json.dumps(config))
        manifest["files"]["config.json"] = (packed / "config.json").stat().st_size
        manifest.pop("crc32")
        (packed / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"experts\.qse: model\.layers\.0\.mlp: got"):
            load_packed(packed)


def test_a_byte_that_changed_in_any_file_is_told(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("layer-00001.safetensors", REST, "config.json"):
        packed = tmp_path / name
        shutil.copytree(folders[1], packed)
        content = bytearray((packed / name).read_bytes())
        content[-9] ^= 0x11
        (packed / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            load_packed(packed)


def changed(folder: Path, to: Path, tensors: dict[str, torch.Tensor], drop: str = "-") -> Path:
    """A copy of a checkpoint, in one file, with other tensors."""
    from safetensors.torch import load_file, save_file

    to.mkdir()
    shutil.copyfile(folder / "config.json", to / "config.json")
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    kept = {name: x for name, x in {**found, **tensors}.items() if drop not in name}
    save_file(kept, to / "model.safetensors", {"format": "pt"})
    return to


OLD = "model.layers.1.block_sparse_moe.experts"
NEW = "model.layers.1.mlp.experts"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{OLD}.6.w1.weight": torch.zeros(48, 64)}, "experts.6.w1, expected 6 experts"),
        ({f"{OLD}.3.w2.weight": torch.zeros(48, 64)}, r"experts.3.w2: got \(48, 64\), expected"),
        ({f"{NEW}.gate_up_proj": torch.zeros(5, 96, 64)}, r"gate_up_proj: got \(5, 96, 64\)"),
        ({f"{NEW}.gate_up_proj": torch.zeros(9, 96, 64)}, r"gate_up_proj: got \(9, 96, 64\)"),
        ({f"{NEW}.gate_up_proj": torch.zeros(6, 96, 64)}, "got no .*down_proj"),
        ({NORM: torch.ones(64, dtype=torch.int8)}, "norm.weight: got torch.int8"),
        ({NORM: torch.ones(64, dtype=torch.float16)}, "norm.weight: got torch.float16"),
        (
            {f"{OLD}.3.w2.weight": torch.zeros(64, 48, dtype=torch.float8_e4m3fn)},
            "w2.weight: got torch.float8_e4m3fn",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_refused_by_name(
    folders: tuple[Path, Path], tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    source = changed(folders[0], tmp_path / "changed", tensors)
    with pytest.raises(ValueError, match=message):
        pack_checkpoint(source, tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("quantization_config", {"quant_method": "fp8"}, "model: got one that is quantised"),
        ("hidden_size", 0, "config.json"),
        ("hidden_size", "wide", "config.json"),
        ("num_local_experts", -1, "config.json"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, name: str, value: Any, message: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders[0], source)
    about = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**about, name: value}))
    with pytest.raises(ValueError, match=message):
        pack_checkpoint(source, tmp_path / "packed")
