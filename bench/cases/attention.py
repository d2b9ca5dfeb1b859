"""Shapes and seeded inputs of the attention benchmarks.

Axes: b batch, h query heads, g key heads (h % g == 0), t queries, s keys, d head width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quernstone.attention import reference
from quernstone.attention.types import Aux, Kind

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative Frobenius error above which a result is not the function asked for: the spacing of the
# type, times a depth that rounding in the products and in the sum over keys stays well within.
TOLERANCE = {"fp32": 8 * 2.0**-23, "bf16": 2 * 2.0**-8}
# The same of a gradient, which passes through twice as many roundings.
GRADIENT_TOLERANCE = {name: 2 * tolerance for name, tolerance in TOLERANCE.items()}
# A block of query rows keeps the fp64 reference's score matrix within a few hundred megabytes.
REFERENCE_ROWS = 256


class Inputs(NamedTuple):
    q: Tensor
    """[b, h, t, d]"""
    k: Tensor
    """[b, g, s, d]"""
    v: Tensor
    """[b, g, s, d]"""
    sinks: Tensor
    """[h] fp32"""
    gate: Tensor
    """[b, h, t, d] logits"""


@dataclass(frozen=True)
class AttentionCase:
    """One call: its shape, mask and type, and how the row that measures it is named."""

    id: str
    threads: int = 1
    quick: bool = False
    dtype: str = "fp32"
    kind: Kind = "sink"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    queries: int = 2048
    keys: int = 2048
    width: int = 64
    causal: bool = True
    window: int | None = None
    # Standard deviation of the scaled logits; 1 is what N(0, 1) inputs give.
    deviation: float = 1.0
    seed: int = 0

    @property
    def visible_pairs(self) -> int:
        """Query-key pairs of one head that the mask leaves."""
        pairs = 0
        for query in range(self.queries):
            position = query + self.keys - self.queries
            last = min(position, self.keys - 1) if self.causal else self.keys - 1
            first = 0
            if self.window is not None:
                first = max(0, position - self.window + 1)
                last = min(last, position + self.window - 1)
            pairs += max(0, last - first + 1)
        return pairs

    @property
    def flops(self) -> float:
        """Useful operations: a product and a sum per channel of q.k and of p.v, visible pairs."""
        return 4.0 * self.width * self.visible_pairs * self.batch * self.heads

    @property
    def moved(self) -> float:
        """Bytes of the inputs and the output, each crossing the memory bus once."""
        numbers = self.batch * self.width
        numbers *= 2 * self.heads * self.queries + 2 * self.kv_heads * self.keys
        return float(numbers * DTYPES[self.dtype].itemsize)

    def inputs(self) -> Inputs:
        """Normal inputs; q is scaled so that the logits have the case's deviation."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        dtype = DTYPES[self.dtype]
        q = normal(self.batch, self.heads, self.queries, self.width) * self.deviation
        k = normal(self.batch, self.kv_heads, self.keys, self.width)
        v = normal(self.batch, self.kv_heads, self.keys, self.width)
        # A sink near the typical log-sum-exp: the gate is neither open nor shut.
        sinks = normal(self.heads) + 6.0
        gate = normal(self.batch, self.heads, self.queries, self.width)
        return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), sinks, gate.to(dtype))

    def incoming(self) -> Tensor:
        """The gradient of the output, where a row measures a backward pass."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, self.heads, self.queries, self.width)
        return torch.randn(shape, generator=generator).to(DTYPES[self.dtype])

    def expected(self, *, plain: bool = False) -> Tensor:
        """The reference's output in fp64, kept for the next row on the same inputs.

        `plain` leaves the gate out: the function of a rival that has none.
        """
        return _expected(self._twin(plain))

    def expected_gradients(self, *, plain: bool = False, balance: float = 0.0) -> dict[str, Tensor]:
        """The reference's gradients in fp64, by the name of the input.

        Of `incoming` and, with a weight, of balance x h x CV² of the importance.
        """
        return _expected_gradients(self._twin(plain), balance)

    def _twin(self, plain: bool) -> AttentionCase:
        twin = replace(self, id="", threads=1, quick=False)
        return replace(twin, kind="vanilla") if plain else twin


@functools.lru_cache(maxsize=4)
def _expected(case: AttentionCase) -> Tensor:
    with _all_threads():
        return in_blocks(reference.sink_attention, case, case.inputs())


@functools.lru_cache(maxsize=4)
def _expected_gradients(case: AttentionCase, balance: float) -> dict[str, Tensor]:
    x = Inputs(*(tensor.double() for tensor in case.inputs()))
    with _all_threads():
        dimportance = _balance_gradient(case, x, balance) if balance else None
        return gradients_in_blocks(case, x, case.incoming().double(), dimportance)


def gradients_in_blocks(
    case: AttentionCase, x: Inputs, dout: Tensor, dimportance: Tensor | None = None
) -> dict[str, Tensor]:
    """The reference's gradients of x, in fp64, summed over blocks of query rows."""
    wanted = trained(case, x)
    sums = {name: torch.zeros_like(leaf) for name, leaf in wanted.items()}
    start = 0

    def add(*tensors: Tensor, **keywords: Any) -> Tensor:
        nonlocal start
        out, aux = _both(*tensors, **keywords)
        stop = start + out.shape[2]
        results, incoming = [out], [dout[:, :, start:stop]]
        if dimportance is not None:
            results.append(aux.importance)
            incoming.append(dimportance * out.shape[2] / case.queries)
        gradients = torch.autograd.grad(results, list(wanted.values()), incoming)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient
        start = stop
        return out.detach()

    with torch.enable_grad():
        in_blocks(add, case, x)
    return sums


def _both(*tensors: Tensor, **keywords: Any) -> tuple[Tensor, Aux]:
    result = reference.sink_attention(*tensors, return_aux=True, **keywords)
    assert isinstance(result, tuple)
    return result


def _balance_gradient(case: AttentionCase, x: Inputs, weight: float) -> Tensor:
    """d(weight h CV²) / d importance, where every token counts: kinds sink and gated."""
    if case.kind == "vanilla":
        raise ValueError("kind: got 'vanilla', whose first tokens do not count, expected another")
    importance = torch.zeros(case.heads, dtype=torch.float64)

    def add(*tensors: Tensor, **keywords: Any) -> Tensor:
        nonlocal importance
        out, aux = _both(*tensors, **keywords)
        importance = importance + aux.importance.detach() * out.shape[2] / case.queries
        return out.detach()

    with torch.no_grad():
        in_blocks(add, case, x)
    with torch.enable_grad():
        importance.requires_grad_()
        loss = weight * case.heads * importance.var(correction=0) / importance.mean() ** 2
        (gradient,) = torch.autograd.grad(loss, importance)
    return gradient


@contextlib.contextmanager
def _all_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trained(case: AttentionCase, x: Inputs) -> dict[str, Tensor]:
    """The inputs of the case that a backward pass has gradients for, which now require them."""
    names = ["q", "k", "v"]
    names += {"sink": ["sinks"], "gated": ["gate"], "vanilla": []}[case.kind]
    return {name: getattr(x, name).requires_grad_() for name in names}


def in_blocks(attention: Callable[..., Any], case: AttentionCase, x: Inputs) -> Tensor:
    """A forward pass over blocks of query rows, each with the keys that its last row sees.

    Positions count from the end of the keys, so a causal block with fewer keys is the same rows.
    """
    if not case.causal and case.window is not None and case.queries > REFERENCE_ROWS:
        raise ValueError(f"queries: got {case.queries}, expected <= {REFERENCE_ROWS} (two-sided)")
    outs = []
    for start in range(0, case.queries, REFERENCE_ROWS):
        stop = min(start + REFERENCE_ROWS, case.queries)
        keys = stop + case.keys - case.queries if case.causal else case.keys
        first = 0
        if case.causal and case.window is not None and case.kind != "vanilla":
            first = max(0, start + case.keys - case.queries - case.window + 1)
        block = x._replace(
            q=x.q[:, :, start:stop],
            k=x.k[:, :, first:keys],
            v=x.v[:, :, first:keys],
            gate=x.gate[:, :, start:stop],
        )
        outs.append(attention(block.q, block.k, block.v, **arguments(case, block)))
    return torch.cat(outs, dim=2)


def arguments(case: AttentionCase, x: Inputs) -> dict[str, Any]:
    """The keyword arguments that ours and the reference take for the case."""
    result: dict[str, Any] = {"kind": case.kind, "causal": case.causal, "window": case.window}
    if case.kind == "sink":
        result["sinks"] = x.sinks
    elif case.kind == "gated":
        result["gate"] = x.gate
    return result


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected values; NaN stays NaN."""
    if result.shape != expected.shape:
        raise ValueError(f"got shape {tuple(result.shape)}, expected {tuple(expected.shape)}")
    wide = result.double()
    return float((wide - expected).norm() / expected.norm())


def gradient_error(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative error among the gradients."""
    return max(relative_error(results[name], expected[name]) for name in expected)


def sweep(
    prefix: str, dtype: str, *, quick: tuple[str, ...] = (), **fixed: Any
) -> list[AttentionCase]:
    """The cases of one type: widths 64 and 128, 8 and 2 key heads, one and two threads."""
    cases = []
    for width in (64, 128):
        for kv_heads in (8, 2):
            for threads in (1, 2):
                shared = "" if kv_heads == 8 else f".kv{kv_heads}"
                row_id = f"{prefix}.{dtype}.causal.d{width}.s2048{shared}.t{threads}"
                case = AttentionCase(
                    row_id, threads, row_id in quick, dtype, width=width, kv_heads=kv_heads
                )
                cases.append(replace(case, **fixed))
    return cases
