"""ik_llama.cpp on the same weights: a GGUF file of architecture `llama` with experts, its steps.

Of a step that chooses more experts and one that chooses fewer, the difference is what an expert
costs there; everything else of the model cancels.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from quernstone.bench import machine
from quernstone.bench.cases.experts import layer_weights, relative
from quernstone.bench.harness import Absent, Check, Slope, SlopeRival

IK = "ik-llama-cpp-python"
GET_IK = "pip install --no-deps ik-llama-cpp-python==0.1.5"
Kind = Literal["F32", "Q8_0", "Q4_0"]
# Of logits, relative to fp64 with the weights before they are rounded.
TOLERANCE: dict[Kind, float] = {"Q8_0": 0.02, "Q4_0": 0.1}
_BATCH = 512
_CONTEXT = 2048


@dataclass(frozen=True)
class Model:
    """The extents of a model of architecture `llama` with experts."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    rope_base: float = 10000.0
    eps: float = 1e-6


def write(path: Path, model: Model, tensors: Iterator[tuple[str, Any, Kind]]) -> None:
    """Writes the tensors, fp32 and made one at a time, in the formats asked for."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(model.vocabulary)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.intermediate)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_rope_dimension_count(model.head_width)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_layer_norm_rms_eps(model.eps)
    writer.add_expert_count(model.experts)
    writer.add_expert_used_count(model.top_k)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor, kind in tensors:
        if kind == "F32":
            writer.add_tensor(name, np.asarray(tensor, np.float32))
            continue
        code = gguf.GGMLQuantizationType[kind]
        # A stack of experts in fp32 would be gigabytes.
        matrices = tensor if tensor.ndim == 3 else tensor[None]
        packed = np.stack(
            [gguf.quants.quantize(np.asarray(m.float(), np.float32), code) for m in matrices]
        )
        writer.add_tensor(name, packed if tensor.ndim == 3 else packed[0], raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Session:
    """A loaded model and its context; the weights are read into memory, none stay in the file."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        top_k: int | None = None,
        repack: bool = True,
        huge_pages: bool = True,
    ) -> None:
        api = self._api = _library()
        wants = api.llama_model_default_params()
        wants.use_mmap, wants.repack_tensors, wants.use_thp = False, repack, huge_pages
        if top_k is not None:
            self._override = (api.llama_model_kv_override * 2)()
            self._override[0].key = b"llama.expert_used_count"
            self._override[0].value.val_i64 = top_k
            wants.kv_overrides = self._override
        self._model = api.llama_model_load_from_file(str(path).encode(), wants)
        if not self._model:
            raise RuntimeError(f"ik_llama: cannot load {path.name}")
        context = api.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = _CONTEXT, _BATCH, _BATCH
        context.n_threads = context.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, context)
        if not self._context:
            api.llama_free_model(self._model)
            raise RuntimeError(f"ik_llama: no context for {path.name}")
        self._batch = api.llama_batch_init(_BATCH, 0, 1)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self.position = 0

    def clear(self) -> None:
        self._api.llama_kv_cache_clear(self._context)
        self.position = 0

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Appends the tokens; logits after the last one."""
        if self.position + len(tokens) > _CONTEXT:
            self.clear()
        for first in range(0, len(tokens), _BATCH):
            part = tokens[first : first + _BATCH]
            batch = self._batch
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i] = token
                batch.pos[i] = self.position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = first + i == len(tokens) - 1
            code = self._api.llama_decode(self._context, batch)
            if code:
                raise RuntimeError(f"ik_llama: llama_decode returned {code}")
            self.position += len(part)
        logits = self._api.llama_get_logits_ith(self._context, len(part) - 1)
        return np.ctypeslib.as_array(logits, (self._vocabulary,)).copy()

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_free_model(self._model)


@functools.cache
def _library() -> Any:
    import ik_llama_cpp._ctypes_api as api

    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    api.kept_logger = silent(lambda level, text, data: None)
    api._lib.llama_log_set.argtypes = [silent, ctypes.c_void_p]
    api._lib.llama_log_set(api.kept_logger, None)
    api.llama_backend_init()
    return api


# One layer, whose attention has one narrow head: beside its experts next to nothing.
VOCABULARY, HEAD = 256, 64


def one_layer(gate_up: torch.Tensor, down: torch.Tensor, top_k: int) -> Model:
    experts, double, hidden = gate_up.shape
    return Model(hidden, double // 2, experts, top_k, 1, 1, 1, HEAD, VOCABULARY)


def plain_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Of a model of one layer all that is not an expert."""
    generator = torch.Generator().manual_seed(3)
    hidden, width = model.hidden, model.head_width
    return {
        "token_embd": torch.randn(model.vocabulary, hidden, generator=generator),
        "output_norm": torch.ones(hidden),
        "output": torch.randn(model.vocabulary, hidden, generator=generator) * hidden**-0.5,
        "blk.0.attn_norm": torch.ones(hidden),
        "blk.0.ffn_norm": torch.ones(hidden),
        "blk.0.attn_q": torch.randn(width, hidden, generator=generator) * hidden**-0.5,
        "blk.0.attn_k": torch.randn(width, hidden, generator=generator) * hidden**-0.5,
        "blk.0.attn_v": torch.randn(width, hidden, generator=generator) * hidden**-0.5,
        "blk.0.attn_output": torch.randn(hidden, width, generator=generator) * width**-0.5,
        "blk.0.ffn_gate_inp": torch.randn(model.experts, hidden, generator=generator)
        * hidden**-0.5,
    }


def write_one_layer(path: Path, gate_up: torch.Tensor, down: torch.Tensor, kind: Kind) -> Model:
    model = one_layer(gate_up, down, 1)
    half = model.intermediate

    def tensors() -> Iterator[tuple[str, Any, Kind]]:
        for name, tensor in plain_tensors(model).items():
            yield f"{name}.weight", tensor, "F32"
        yield "blk.0.ffn_gate_exps.weight", gate_up[:, :half], kind
        yield "blk.0.ffn_up_exps.weight", gate_up[:, half:], kind
        yield "blk.0.ffn_down_exps.weight", down, kind

    write(path, model, tensors())
    return model


def first_logits(
    model: Model, matrices: Callable[[int], tuple[torch.Tensor, ...]], token: int, top_k: int
) -> torch.Tensor:
    """fp64 of a model of one layer after one token, which attends to itself alone.

    Version 0.1.5 adds the experts' result to the normalised state, not to the state itself.
    """
    own = {name: tensor.double() for name, tensor in plain_tensors(model).items()}
    rms = torch.nn.functional.rms_norm
    x = own["token_embd"][token]
    h = rms(x, x.shape, own["blk.0.attn_norm"], model.eps)
    x = x + own["blk.0.attn_output"] @ (own["blk.0.attn_v"] @ h)
    x = h = rms(x, x.shape, own["blk.0.ffn_norm"], model.eps)
    shares, chosen = (own["blk.0.ffn_gate_inp"] @ h).softmax(0).topk(top_k)
    for share, expert in zip(shares / shares.sum(), chosen, strict=True):
        gate, up, down = (m.double() for m in matrices(int(expert)))
        x = x + share * (down @ (torch.nn.functional.silu(gate @ h) * (up @ h)))
    return own["output"] @ rms(x, x.shape, own["output_norm"], model.eps)


@functools.lru_cache(maxsize=1)
def sessions(kind: Kind, threads: int, few: int, many: int) -> tuple[Model, Session, Session]:
    """The layer of the benchmarks in memory twice, with fewer experts a token and with more."""
    with tempfile.TemporaryDirectory(prefix="quernstone-gguf-") as folder:
        path = Path(folder) / "layer.gguf"
        model = write_one_layer(path, *layer_weights(), kind)
        less, more = (Session(path, threads=threads, top_k=k) for k in (few, many))
    return model, less, more


def per_expert(kind: Kind, threads: int, few: int, many: int) -> SlopeRival | Absent:
    """Decoding one random token after another, with `few` experts each and with `many`.

    Weights are repacked to its rows of interleaved blocks, on huge pages: its fastest setting.
    """
    if machine.version(IK) is None:
        return Absent(IK, GET_IK)
    model, less, more = sessions(kind, threads, few, many)
    gate_up, down = layer_weights()
    want = first_logits(model, lambda e: (*gate_up[e].float().chunk(2), down[e].float()), 7, many)
    tokens = np.random.default_rng(4).integers(VOCABULARY, size=4096).tolist()
    turns = {less: itertools.cycle(tokens), more: itertools.cycle(tokens)}

    def step(session: Session) -> Callable[[], object]:
        return lambda: session.step([next(turns[session])])

    def error(_: object) -> float:
        more.clear()
        return relative(torch.from_numpy(more.step([7])), want)

    slope = Slope(step(less), step(more), many - few)
    versions = {IK: f"{machine.version(IK)} {kind}, repacked, {threads} threads"}
    return SlopeRival(IK, slope, Check(error, TOLERANCE[kind]), versions)
