"""Inputs of the attention tests, and the comparison with the reference that most of them end with.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quernstone.attention import Aux, reference, sink_attention

from . import tolerances

KINDS = ("sink", "vanilla", "gated", "gated by element")
DTYPES = (torch.float32, torch.bfloat16)
PADDINGS = ("none", "start", "lengths", "both")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call in words; `make` draws its tensors from N(0, sd)."""

    kind: str = "sink"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    key_heads: int = 2
    ratio: int = 1
    queries: int = 33
    keys: int = 33
    width: int = 32
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    padding: str = "none"
    some_tokens: bool = False
    aux: bool = True
    sd: float = 1.0

    def make(self, seed: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Returns (q, k, v) and the keyword arguments."""
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng).to(self.dtype)

        b, h, t, s, d = self.batch, self.heads, self.queries, self.keys, self.width
        q, k, v = (
            normal(b, h, t, d),
            normal(b, self.key_heads, s, d),
            normal(b, self.key_heads, s, d),
        )
        if self.sd != 1.0:
            q = q * self.sd
        options: dict[str, Any] = {
            "kind": self.kind.split()[0],
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "return_aux": self.aux,
        }
        if self.kind == "sink":
            options["sinks"] = 2 * normal(h)
        elif self.kind == "gated":
            options["gate"] = normal(b, h, t)
        elif self.kind == "gated by element":
            options["gate"] = normal(b, h, t, d)
        if self.padding in ("start", "both"):
            options["key_start"] = torch.randint(0, s // 2 + 1, (b,), generator=rng)
        if self.padding in ("lengths", "both"):
            lengths = torch.randint(0, s + 1, (b,), generator=rng, dtype=torch.int32)
            options["key_lengths"] = lengths
        if self.some_tokens and self.aux:
            options["token_mask"] = torch.rand(b, t, generator=rng) < 0.7
        return (q, k, v), options

    @property
    def heads(self) -> int:
        return self.key_heads * self.ratio

    @property
    def logit_sd(self) -> float:
        scale = self.width**-0.5 if self.scale is None else self.scale
        return self.sd * abs(scale) * self.width**0.5

    def __str__(self) -> str:
        shape = f"b{self.batch} h{self.heads}/{self.key_heads} t{self.queries} s{self.keys}"
        mask = f"{'causal' if self.causal else 'full'} window {self.window} pad {self.padding}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind} {dtype} {shape} d{self.width} {mask} aux {self.aux}"


def run(case: Case, seed: int = 0) -> tuple[Tensor, Aux | None]:
    """Our result for a case."""
    tensors, options = case.make(seed)
    return split(sink_attention(*tensors, **options))


def check(case: Case, seed: int = 0) -> tuple[Tensor, Aux | None]:
    """Asserts that our result for a case is the reference's, and returns it."""
    tensors, options = case.make(seed)
    return _compare(*tensors, _wanted(case, seed), case.logit_sd, str(case), options)


def check_call(
    q: Tensor, k: Tensor, v: Tensor, *, logit_sd: float = 1.0, label: str = "", **options: Any
) -> tuple[Tensor, Aux | None]:
    """Asserts that one call gives the reference's result, and returns ours."""
    wanted = split(reference.sink_attention(q, k, v, **options))
    return _compare(q, k, v, wanted, logit_sd, label, options)


@lru_cache(maxsize=4096)
def _wanted(case: Case, seed: int) -> tuple[Tensor, Aux | None]:
    """The reference's result, computed once for all instruction sets."""
    tensors, options = case.make(seed)
    return split(reference.sink_attention(*tensors, **options))


def _compare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wanted: tuple[Tensor, Aux | None],
    logit_sd: float,
    label: str,
    options: dict[str, Any],
) -> tuple[Tensor, Aux | None]:
    out, aux = split(sink_attention(q, k, v, **options))
    want, want_aux = wanted

    assert (out.dtype, out.shape, out.is_contiguous()) == (q.dtype, q.shape, True), label
    error = tolerances.relative_error(out, want)
    assert error <= tolerances.output(q.dtype, logit_sd), f"{label}: output off by {error:.2e}"
    if aux is None or want_aux is None:
        assert aux is want_aux is None, label
        return out, aux

    assert (aux.lse.dtype, aux.lse.shape) == (torch.float32, q.shape[:3]), label
    blind = want_aux.lse == float("-inf")
    assert torch.equal(aux.lse == float("-inf"), blind), f"{label}: rows without a key"
    assert not out[blind].any(), f"{label}: output of a row without a key"
    off = (aux.lse.double() - want_aux.lse)[~blind].abs()
    worst = off.max().item() if off.numel() else 0.0
    assert worst <= tolerances.lse(want_aux.lse, q.shape[3]), f"{label}: lse off by {worst:.2e}"

    assert (aux.importance.dtype, aux.importance.shape) == (torch.float32, q.shape[1:2]), label
    logits = [want_aux.lse.flatten(), options.get("sinks", want_aux.lse).flatten().double()]
    sizes = torch.cat(logits)[torch.cat(logits).isfinite()].abs()
    allowed = tolerances.gate(sizes.max().item() if sizes.numel() else 0.0, q.shape[3])
    off = (aux.importance.double() - want_aux.importance).abs()
    within = off <= allowed * want_aux.importance + tolerances.UNDERFLOW
    assert within.all(), f"{label}: importance {aux.importance} off by {off}"
    return out, aux


def split(result: Tensor | tuple[Tensor, Aux]) -> tuple[Tensor, Aux | None]:
    """Gives a call's result one form, with and without aux."""
    return (result, None) if isinstance(result, Tensor) else result
