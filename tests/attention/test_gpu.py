"""The CUDA operators on a GPU: `make gpu` runs these and no others.

The cases are those that the interpreter runs, and larger ones; tensors are drawn on the CPU and
moved, so that both see the same numbers. Products in fp32 are true ones: no TF32.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone.attention import reference, sink_attention

from . import tolerances
from .cases import KINDS, PADDINGS, Case, split
from .gradients import NAMES, Incoming
from .tolerances import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def without_the_autotuner(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would try every configuration for each of these small calls."""
    monkeypatch.setenv("QUERNSTONE_AUTOTUNE", "0")


def moved(x: Any) -> Any:
    return x.to(DEVICE) if isinstance(x, Tensor) else x


def results(
    f: Any,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    dtype: torch.dtype | None,
    move: Any,
) -> dict[str, Tensor]:
    """Output, lse, importance, and the gradient of each input, by name, on the CPU."""
    found = dict(zip("qkv", tensors, strict=True)) | options
    leaves = {
        name: move(found[name].to(dtype or found[name].dtype)).detach().requires_grad_()
        for name in NAMES
        if found.get(name) is not None
    }
    others = {name: move(x) for name, x in options.items() if name not in leaves}
    given = {name: x for name, x in leaves.items() if name not in ("q", "k", "v")}
    out, aux = split(f(leaves["q"], leaves["k"], leaves["v"], **others, **given))
    # The weights of the scalar are drawn on the CPU, where the sum is made too.
    incoming = Incoming(out, aux)
    on_cpu = aux if aux is None else type(aux)(*(x.cpu() for x in aux))
    total = incoming.total(out.cpu(), on_cpu)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    named = {"out": out}
    if aux is not None:
        named |= {"lse": aux.lse, "importance": aux.importance}
    named |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach().cpu() for name, x in named.items()}


def check(case: Case, options: dict[str, Any] | None = None, skip: tuple[str, ...] = ()) -> None:
    tensors, drawn = case.make()
    options = drawn | (options or {})
    got = results(sink_attention, tensors, options, None, moved)
    want = results(reference.sink_attention, tensors, options, torch.float64, lambda x: x)
    wrong = {}
    for name in want.keys() - set(skip):
        x, y = got[name], want[name]
        assert x.shape == y.shape, name
        if name == "lse":
            assert torch.equal(x.isinf(), y.isinf())
            x, y = x.nan_to_num(neginf=0.0), y.nan_to_num(neginf=0.0)
        allowed = tolerances.gradient(case.dtype)
        if name == "dsinks" and case.dtype is not torch.float32:
            allowed *= 4  # sums over queries of terms of either sign
        error = relative_error(x, y)
        if not error <= allowed:
            wrong[name] = f"{error:.1e} > {allowed:.1e}"
    assert not wrong, f"{case}: {wrong}"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_under_every_mask(
    kind: str, causal: bool, window: int | None, padding: str
) -> None:
    for dtype in DTYPES:
        check(
            Case(
                kind=kind,
                dtype=dtype,
                causal=causal,
                window=window,
                padding=padding,
                key_heads=2,
                ratio=2,
                queries=190,
                keys=333,
                width=64,
                some_tokens=True,
            )
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 17, 64, 80, 128, 200, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_any_width(kind: str, width: int, dtype: torch.dtype) -> None:
    check(Case(kind=kind, dtype=dtype, width=width, ratio=2, queries=150, keys=150))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (300, 100), (1000, 1000), (129, 2048)])
def test_any_length(queries: int, keys: int, dtype: torch.dtype) -> None:
    for kind in KINDS:
        check(Case(kind=kind, dtype=dtype, batch=1, ratio=4, queries=queries, keys=keys, width=64))


@pytest.mark.parametrize("distance", [60.0, -60.0])
def test_sinks_far_from_the_logits(distance: float) -> None:
    case = Case(ratio=2, queries=200, keys=200, width=64)
    _, options = case.make()
    skip = ("dsinks",) if distance < 0 else ()
    check(case, {"sinks": options["sinks"] + distance}, skip)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_same_bits_in_every_call(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, ratio=4, queries=700, keys=700, width=128)
    tensors, options = case.make()
    first = results(sink_attention, tensors, options, None, moved)
    second = results(sink_attention, tensors, options, None, moved)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_whatever_the_autotuner_chooses_is_right(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUERNSTONE_AUTOTUNE")
    check(Case(dtype=dtype, ratio=2, queries=500, keys=500, width=width))


@pytest.mark.parametrize("kind", KINDS)
def test_passes_opcheck(kind: str) -> None:
    case = Case(kind=kind, dtype=torch.float16, ratio=2, queries=40, keys=70, some_tokens=True)
    tensors, options = case.make()
    del options["return_aux"]
    leaves = tuple(moved(x).requires_grad_() for x in tensors)
    options = {name: moved(x) for name, x in options.items()}
    torch.library.opcheck(torch.ops.quernstone.sink_attention_training.default, leaves, options)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph_forward_and_backward(kind: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(sink_attention, fullgraph=True, dynamic=True)
    case = Case(kind=kind, dtype=torch.bfloat16, ratio=2, queries=90, keys=140, padding="both")
    tensors, options = case.make()
    want = results(sink_attention, tensors, options, None, moved)
    got = results(compiled, tensors, options, None, moved)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_mixed_devices_are_refused_by_name() -> None:
    (q, k, v), options = Case(queries=5, keys=5).make()
    sinks = options["sinks"]
    with pytest.raises(ValueError, match=r"sinks\.device: got cpu, expected cuda:0"):
        sink_attention(moved(q), moved(k), moved(v), sinks=sinks)
    with pytest.raises(ValueError, match=r"k\.device: got cuda:0, expected cpu"):
        sink_attention(q, moved(k), v, sinks=sinks)
