"""The operators inside torch: schema, fake tensors, compile, export."""

from typing import Any

import pytest
import torch

from quernstone.attention import sink_attention

from .cases import DTYPES, KINDS, Case, split

OPS = torch.ops.quernstone
# torch's compiler warns about its own parts.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def call(case: Case) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Arguments of the operator itself, which takes no `return_aux`."""
    tensors, options = case.make()
    del options["return_aux"]
    return tensors, options


@pytest.mark.parametrize("kind", KINDS)
def test_passes_opcheck_with_any_optional_arguments(kind: str) -> None:
    dtype = DTYPES[KINDS.index(kind) % 2]
    shape = {"ratio": 2, "queries": 5, "keys": 9, "width": 16}
    for padding, window, scale in (("none", None, None), ("start", 4, 0.5), ("both", None, -1.0)):
        case = Case(
            kind=kind, dtype=dtype, padding=padding, window=window, scale=scale, aux=False, **shape
        )
        torch.library.opcheck(OPS.sink_attention.default, *call(case))
    for some_tokens in (False, True):
        case = Case(kind=kind, dtype=dtype, some_tokens=some_tokens, padding="lengths", **shape)
        torch.library.opcheck(OPS.sink_attention_aux.default, *call(case))


def test_passes_opcheck_with_empty_and_strided_inputs() -> None:
    for shape in ({"batch": 0}, {"queries": 0}, {"keys": 0}):
        tensors, options = call(Case(padding="start", **shape))
        torch.library.opcheck(OPS.sink_attention_aux.default, tensors, options)
    (q, k, v), options = call(Case(queries=6, keys=6))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.library.opcheck(OPS.sink_attention.default, (q, k, v), options)
    torch.library.opcheck(OPS.sink_attention.default, (q.mT.contiguous().mT, k, v), options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aux", [False, True])
def test_compiles_as_one_graph_with_dynamic_shapes(kind: str, aux: bool) -> None:
    compiled = torch.compile(sink_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    for queries, keys in ((7, 7), (9, 20), (33, 40)):
        case = Case(kind=kind, ratio=2, queries=queries, keys=keys, padding="both", aux=aux)
        (q, k, v), options = case.make()
        want, want_aux = split(sink_attention(q, k, v, **options))
        out, out_aux = split(compiled(q, k, v, **options))
        assert torch.equal(out, want)
        if want_aux is not None:
            assert out_aux is not None
            assert torch.equal(out_aux.lse, want_aux.lse)
            assert torch.equal(out_aux.importance, want_aux.importance)


def test_dynamic_shapes_are_compiled_once() -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(sink_attention, fullgraph=True, dynamic=True, backend=count)
    for queries in range(5, 12):
        (q, k, v), options = Case(ratio=2, queries=queries, keys=2 * queries, aux=False).make()
        compiled(q, k, v, **options)
    assert graphs == 1


def test_compiles_with_inductor_between_other_operations() -> None:
    (q, k, v), options = Case(ratio=2, queries=20, keys=20, aux=False).make()

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, _ = split(sink_attention(q.transpose(1, 2), k, v, **options))
        return out.transpose(1, 2).flatten(2)

    q = q.transpose(1, 2).contiguous()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="inductor")
    assert torch.equal(compiled(q, k, v), block(q, k, v))


class Layer(torch.nn.Module):
    """Attention as a model holds it, its sinks being a parameter."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.sinks = torch.nn.Parameter(torch.randn(heads), requires_grad=False)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, aux = sink_attention(
            q, k, v, sinks=self.sinks, window=6, key_start=start, return_aux=True
        )
        return out, aux.lse, aux.importance


def test_exports_with_dynamic_shapes() -> None:
    (q, k, v), options = Case(ratio=2, queries=8, keys=12, padding="start").make()
    layer = Layer(4)
    b, t, s = (torch.export.Dim(name, min=2, max=64) for name in ("b", "t", "s"))
    exported = torch.export.export(
        layer,
        (q, k, v, options["key_start"]),
        dynamic_shapes=({0: b, 2: t}, {0: b, 2: s}, {0: b, 2: s}, {0: b}),
    )
    (q, k, v), options = Case(batch=3, ratio=2, queries=20, keys=50, padding="start").make(seed=1)
    inputs = (q, k, v, options["key_start"])
    for got, want in zip(exported.module()(*inputs), layer(*inputs), strict=True):
        assert torch.equal(got, want)


def test_fake_tensors_have_the_shapes_and_types_of_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in DTYPES:
        tensors, options = call(Case(dtype=dtype, ratio=3, queries=5, keys=9))
        real = OPS.sink_attention_aux(*tensors, **options)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) for x in tensors]
            options["sinks"] = mode.from_tensor(options["sinks"])
            fake = OPS.sink_attention_aux(*fakes, **options)
        for got, want in zip(fake, real, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def test_meta_tensors_give_meta_tensors() -> None:
    q, k = torch.empty(2, 4, 5, 16, device="meta"), torch.empty(2, 2, 7, 16, device="meta")
    out = sink_attention(q, k, k, sinks=torch.empty(4, device="meta"))
    assert out.device.type == "meta"
    assert out.shape == q.shape


def test_works_under_inference_mode_and_on_its_tensors() -> None:
    (q, k, v), options = Case(aux=False).make()
    want, _ = split(sink_attention(q, k, v, **options))
    with torch.inference_mode():
        out = sink_attention(q, k, v, **options)
        assert torch.equal(out, want)
        (q, k, v), options = Case(aux=False).make()
    assert torch.equal(sink_attention(q, k, v, **options), want)


def test_output_is_fresh_memory_at_each_call() -> None:
    (q, k, v), options = Case().make()
    first, aux = split(sink_attention(q, k, v, **options))
    second, _ = split(sink_attention(q, k, v, **options))
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    again, _ = split(sink_attention(q, k, v, **options))
    assert torch.equal(again, second)
    assert aux is not None
    assert aux.lse.is_contiguous()
