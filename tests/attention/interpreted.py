"""The Triton kernels in Triton's interpreter, on CPU tensors, in processes of their own.

Whether kernels are interpreted is settled when they are imported, and the rest of the tests must
not notice. A worker puts the launcher that serves CUDA tensors in the place of the CPU operators;
the public function, autograd and the helpers of these tests then run on the kernels.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import oracles
from .cases import Case, check, check_call, split
from .gradients import call_errors, errors, ours
from .tolerances import relative_error

OPERATORS = (
    "sink_attention",
    "sink_attention_aux",
    "sink_attention_training",
    "sink_attention_backward",
)


class Blocks(NamedTuple):
    """Block sizes so small that a few dozen rows take every branch of every loop."""

    queries: int = 16
    keys: int = 16


class Ask(NamedTuple):
    """What a worker is to do: a function of this module, and its arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    blocks: Blocks = Blocks()

    def __str__(self) -> str:
        words = " ".join(str(x) for x in self.arguments)
        return f"{self.function.__name__} {words} blocks {self.blocks.queries}x{self.blocks.keys}"


def begin() -> None:
    """Makes this process one that interprets."""
    os.environ["TRITON_INTERPRET"] = "1"
    # NumPy warns of the logarithm of 0, which is what a row without keys has.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from quernstone.attention import triton_op

    for name in OPERATORS:
        _replacements.impl(name, getattr(triton_op, name), "CPU", allow_override=True)


_replacements = torch.library.Library("quernstone", "IMPL")


def answer(ask: Ask) -> Any:
    from quernstone.attention import triton_op
    from quernstone.kernels.triton.attention_configs import Config

    blocks = Config(ask.blocks.queries, ask.blocks.keys, warps=4, stages=1)
    triton_op.pick_config = lambda *_: blocks
    return ask.function(*ask.arguments)


def results_and_gradients(case: Case) -> dict[str, float]:
    """Asserts that the results are the reference's; gives the relative error of each gradient."""
    _widen(case)
    check(case)
    return errors(case)


def gradients_without_that_of_lse(case: Case) -> dict[str, float]:
    """What training with the loss on importance asks for: gates fold into the exponents."""
    _widen(case)
    return errors(case, lse=False)


def _widen(case: Case) -> None:
    """The interpreter multiplies the bits of bf16 numbers: there, products take fp32 copies."""
    from quernstone.attention import triton_op

    triton_op.DOT_IN_FP32 = case.dtype is torch.bfloat16


def far_sinks(case: Case, distance: float) -> dict[str, float]:
    tensors, options = case.make()
    options["sinks"] = options["sinks"] + distance
    check_call(*tensors, logit_sd=1 + abs(distance) / 10, **options)
    found = call_errors(tensors, options)
    if distance < 0:
        del found["sinks"]  # e^-60 of the others: what is left is the rounding of 0
    return found


def saturated(case: Case, factor: float) -> dict[str, float]:
    """Gates of the kind `gated` far from 0; of `vanilla`, a first key far above all others."""
    (q, k, v), options = case.make()
    if case.kind == "vanilla":
        k[:, :, 0] = 0.0
        q[..., 0] = 1.0
        k[:, :, 0, 0] = factor
    else:
        options["gate"] = factor * options["gate"]
    check_call(q, k, v, logit_sd=1 + factor / 10, **options)
    return call_errors((q, k, v), options)


def what_a_nan_that_no_query_sees_spoils(kind: str) -> list[str]:
    """Names of results that are not finite, or not 0 where they should be."""
    case = Case(kind=kind, batch=2, ratio=2, key_heads=1, queries=21, keys=40, width=16, window=9)
    (q, k, v), options = case.make()
    # Queries 0 to 20 stand at 19 to 39 and see keys from 11 on, the second sequence from 35 on.
    options["key_start"] = torch.tensor([0, 35])
    q[1, :, :16] = float("nan")
    k[0, :, :11] = float("nan")
    v[0, :, :11] = float("inf")
    k[1, :, :35] = float("nan")
    v[1, :, :35] = float("nan")
    got, _ = ours((q, k, v), options)
    out, aux = split(_attention()(q, k, v, **options))
    assert aux is not None
    found = {"out": out, "importance": aux.importance, **got}
    spoilt = [name for name, x in found.items() if not x.isfinite().all()]
    blind = {
        "out": out[1, :, :16],
        "dq": got["q"][1, :, :16],
        "dk": got["k"][0, :, :11],
        "dv": got["v"][1, :, :35],
    }
    spoilt += [f"{name} of the unseen" for name, x in blind.items() if x.any()]
    if not torch.equal(aux.lse[1, :, :16], torch.full((2, 16), float("-inf"))):
        spoilt.append("lse of the unseen")
    return spoilt


def _attention() -> Callable[..., Any]:
    from quernstone.attention import sink_attention

    return sink_attention


def torch_with_one_more_key(window: int | None) -> dict[str, float]:
    """Errors of output and gradients against scaled_dot_product_attention in fp64."""
    case = Case(ratio=2, key_heads=1, batch=1, queries=37, keys=50, width=40, aux=False)
    (q, k, v), options = case.make()
    options["window"] = window
    position = torch.arange(37)[:, None] + 13
    key = torch.arange(50)
    seen = key <= position
    if window is not None:
        seen = seen & (key > position - window)
    rng = torch.Generator().manual_seed(1)
    weights = torch.randn(q.shape, generator=rng)
    leaves = [x.requires_grad_() for x in (q, k, v, options["sinks"])]
    twins = [x.detach().double().requires_grad_() for x in leaves]
    theirs = oracles.torch_sdpa(*twins[:3], seen.expand(1, 2, 37, 50), twins[3])
    out, _ = split(_attention()(q, k, v, **options))
    want = torch.autograd.grad((theirs * weights.double()).sum(), twins)
    got = torch.autograd.grad((out * weights).sum(), leaves)
    found = {"out": relative_error(out, theirs)}
    pairs = zip(("q", "k", "v", "sinks"), got, want, strict=True)
    return found | {name: relative_error(x, y) for name, x, y in pairs}


def names_of_what_changes_from_call_to_call(case: Case) -> list[str]:
    tensors, options = case.make()
    first, _ = ours(tensors, options)
    torch.use_deterministic_algorithms(True)
    second, _ = ours(tensors, options)
    torch.use_deterministic_algorithms(False)
    return [name for name in first if not torch.equal(first[name], second[name])]


def names_of_what_strides_change(case: Case) -> list[str]:
    """Inputs and incoming gradients whose channels do not lie side by side, or overlap."""
    tensors, options = case.make()
    want, _ = ours(tensors, options)
    spread = tuple(x.mT.contiguous().mT for x in tensors)
    got, _ = ours(spread, options)
    changed = [name for name in want if not torch.equal(want[name], got[name])]

    def gradient_of_q(incoming: Callable[[Tensor], Tensor]) -> Tensor:
        q = tensors[0].clone().requires_grad_()
        out, aux = split(_attention()(q, *tensors[1:], **options))
        assert aux is not None
        results = [out, aux.lse]
        return torch.autograd.grad(results, q, [incoming(x) for x in results])[0]

    ones = gradient_of_q(torch.ones_like)
    expanded = gradient_of_q(lambda x: torch.ones(()).expand(x.shape))
    return changed if torch.equal(ones, expanded) else [*changed, "expanded"]


def results_of_empty_calls() -> list[str]:
    """Descriptions of what is wrong with calls without batch, queries or keys."""
    wrong = []
    for change in ({"batch": 0}, {"queries": 0}, {"keys": 0}):
        case = Case(width=16, **{"queries": 3, "keys": 3, **change})
        tensors, options = case.make()
        out, aux = split(_attention()(*tensors, **options))
        assert aux is not None
        got, _ = ours(tensors, options)
        if out.any() or aux.importance.any() or (aux.lse != float("-inf")).any():
            wrong.append(f"{change}: results")
        wrong += [f"{change}: {name}" for name, x in got.items() if x.any()]
    return wrong


def importance_for_two_block_sizes(case: Case) -> bool:
    """Whether the sums over tokens have the same bits for any number of queries a program."""
    from quernstone.attention import triton_op
    from quernstone.kernels.triton.attention_configs import Config

    tensors, options = case.make()
    found = []
    for rows in (16, 32):
        blocks = Config(rows, 16, warps=4, stages=1)
        triton_op.pick_config = lambda *_, blocks=blocks: blocks
        _, aux = split(_attention()(*tensors, **options))
        assert aux is not None
        found.append(aux.importance)
    return torch.equal(*found)
