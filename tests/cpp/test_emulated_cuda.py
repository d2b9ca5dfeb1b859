"""The CUDA kernels under the emulator of tests/cpp/emulation/cuda, called as Python calls them.

Emulated results say that the code is right, nothing about its speed. Every call runs twice, with
threads and blocks in opposite orders and other poison in fresh memory: a missing barrier or a read
of what nobody wrote would give other bits.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone.attention import reference
from quernstone.attention.cuda_decode import Library
from tests.attention import oracles, tolerances
from tests.attention.cases import KINDS, PADDINGS, Case, split
from tests.cpp.conftest import build

Result = tuple[Tensor, Tensor | None, Tensor | None]
Decode = Callable[..., Result]

ASCENDING, DESCENDING, SHUFFLED = range(3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The smallest and largest width of each size that has a kernel, and odd ones between.
WIDTHS = (16, 33, 64, 65, 128, 200, 256)


@pytest.fixture(scope="module")
def decode() -> Decode:
    """`Library.decode` of the emulated build, held to give the same bits in any order."""
    path = build("unit", "quernstone_cuda_emulated") / "libquernstone_cuda_emulated.so"
    library = Library(path)
    set_schedule = ctypes.CDLL(str(path)).emulation_set_schedule
    set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]

    def run(*arguments: Any, **options: Any) -> Result:
        results = []
        for order, poison in ((ASCENDING, 0xFF), (DESCENDING, 0x11)):
            set_schedule(order, 0, poison)
            results.append(library.decode(*arguments, **options))
        for got, again in zip(*results, strict=True):
            assert got is again is None or same_bits(got, again)
        return results[0]

    return run


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """Outputs and scratch memory start as NaN under torch's deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=77.0), b.nan_to_num(nan=77.0))


def check_call(
    decode: Decode,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    label: str = "",
    sd: float = 1.0,
    **options: Any,
) -> Result:
    """Asserts that one call gives the reference's result, and returns it."""
    want, want_aux = split(reference.sink_attention(q, k, v, **options))
    aux = options.pop("return_aux", False)
    out, lse, importance = decode(q, k, v, **options, aux=aux)

    assert (out.dtype, out.shape, out.is_contiguous()) == (q.dtype, q.shape, True), label
    error = tolerances.relative_error(out, want)
    assert error <= tolerances.output(q.dtype, sd), f"{label}: output off by {error:.2e}"
    if want_aux is None:
        assert lse is importance is None, label
        return out, lse, importance
    assert lse is not None
    assert importance is not None
    blind = want_aux.lse == -math.inf
    assert torch.equal(lse == -math.inf, blind), f"{label}: rows without a key"
    assert not out[blind].any(), f"{label}: output of a row without a key"
    off = (lse.double() - want_aux.lse)[~blind].abs()
    worst = off.max().item() if off.numel() else 0.0
    assert worst <= tolerances.lse(want_aux.lse, q.shape[3]), f"{label}: lse off by {worst:.2e}"
    sizes = [want_aux.lse.flatten(), options.get("sinks", want_aux.lse).flatten().double()]
    finite = torch.cat(sizes)[torch.cat(sizes).isfinite()].abs()
    allowed = tolerances.gate(finite.max().item() if finite.numel() else 0.0, q.shape[3])
    off = (importance.double() - want_aux.importance).abs()
    within = off <= allowed * want_aux.importance + tolerances.UNDERFLOW
    assert within.all(), f"{label}: importance {importance} off by {off}"
    return out, lse, importance


def check(decode: Decode, case: Case, seed: int = 0) -> Result:
    tensors, options = case.make(seed)
    return check_call(decode, *tensors, label=str(case), sd=case.logit_sd, **options)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_mask(
    decode: Decode, kind: str, causal: bool, window: int | None, padding: str
) -> None:
    case = Case(
        kind=kind,
        causal=causal,
        window=window,
        padding=padding,
        ratio=3,
        key_heads=1,
        queries=4,
        keys=290,
        some_tokens=True,
    )
    check(decode, case)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_width(decode: Decode, dtype: torch.dtype, width: int) -> None:
    for kind in KINDS:
        check(decode, Case(kind=kind, dtype=dtype, width=width, batch=1, queries=2, keys=70))


@pytest.mark.parametrize("queries", range(1, 9))
@pytest.mark.parametrize("ratio", [1, 3, 8])
def test_any_number_of_queries_and_heads_of_a_group(
    decode: Decode, ratio: int, queries: int
) -> None:
    check(decode, Case(ratio=ratio, queries=queries, batch=1, keys=40, padding="start"))


@pytest.mark.parametrize("keys", [0, 1, 31, 32, 33, 255, 256, 257, 512, 1100])
@pytest.mark.parametrize("kind", ["sink", "vanilla"])
def test_any_number_of_keys_and_splits(decode: Decode, kind: str, keys: int) -> None:
    check(decode, Case(kind=kind, queries=3, batch=1, key_heads=1, ratio=2, keys=keys))


@pytest.mark.parametrize("window", [1, 2, 31, 88, 256, 257, 344, 600, 10**9, 2**62])
@pytest.mark.parametrize("kind", ["sink", "vanilla"])
def test_any_window(decode: Decode, kind: str, window: int) -> None:
    check(decode, Case(kind=kind, queries=3, batch=1, keys=600, window=window, key_heads=1))


@pytest.mark.parametrize("kind", KINDS)
def test_more_queries_than_keys(decode: Decode, kind: str) -> None:
    check(decode, Case(kind=kind, queries=8, keys=3, ratio=2, padding="both"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sink", [-60.0, 60.0, -1e4, 1e4, -3e38, 3e38, -math.inf, math.inf])
def test_sinks_far_from_the_logits(decode: Decode, sink: float, dtype: torch.dtype) -> None:
    tensors, options = Case(ratio=2, queries=2, keys=50, padding="start").make()
    tensors = tuple(x.to(dtype) for x in tensors)
    options["sinks"] = options["sinks"] + sink
    if sink == 60.0 and dtype is torch.float16:
        # exp(-60) is no fp16 number: the output is 0, as the rounded reference is.
        out, _, _ = decode(*tensors, sinks=options["sinks"])
        assert not out.any()
        return
    if abs(sink) > 1000.0:
        out, _, importance = decode(*tensors, sinks=options["sinks"], aux=True)
        plain, _, _ = decode(*tensors, kind="vanilla")
        assert torch.equal(out, torch.zeros_like(plain) if sink > 0 else plain)
        assert importance is not None
        assert importance.unique().tolist() == [0.0 if sink > 0 else 1.0]
        return
    check_call(decode, *tensors, **options)


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_a_first_key_far_from_the_others(decode: Decode, shift: float) -> None:
    """1 - exp(...) in place of the sigmoid would give 0 or noise here."""
    (q, k, v), options = Case(kind="vanilla", queries=2, keys=50, width=64).make()
    k[:, :, 0] = 0.0
    q[..., 0] = 1.0
    k[:, :, 0, 0] = shift * 8.0
    check_call(decode, q, k, v, sd=abs(shift), **options)


def test_a_first_key_alone_and_far_below(decode: Decode) -> None:
    q, k, v = torch.ones(1, 2, 1, 32), torch.full((1, 2, 1, 32), -40.0), torch.randn(1, 2, 1, 32)
    out, lse, importance = decode(q, k, v, "vanilla", scale=1.0, aux=True)
    assert torch.equal(out, v)
    assert lse is not None
    torch.testing.assert_close(lse, torch.full((1, 2, 1), -1280.0))
    assert importance is not None
    assert importance.tolist() == [0.0, 0.0]  # no token counts


@pytest.mark.parametrize("sd", [8.0, 30.0])
def test_large_logits(decode: Decode, sd: float) -> None:
    check(decode, Case(sd=sd, queries=2, keys=300, key_heads=1, ratio=2))


def test_torchs_own_attention_with_one_more_key_says_the_same(decode: Decode) -> None:
    for window in (None, 60):
        case = Case(ratio=4, queries=5, keys=300, width=64, window=window, padding="both")
        (q, k, v), options = case.make()
        masks = {name: options.get(name) for name in ("key_start", "key_lengths", "window")}
        seen = reference.visible(5, 300, **masks)
        sees_some = seen.any(-1).expand(q.shape[:3])
        want = oracles.torch_sdpa(q, k, v, seen, options["sinks"])[sees_some]
        out, _, _ = decode(q, k, v, "sink", sinks=options["sinks"], **masks)
        assert tolerances.relative_error(out[sees_some], want) <= 2 * tolerances.output(q.dtype)


def test_the_eager_attention_of_gpt_oss_says_the_same(decode: Decode) -> None:
    for window in (None, 20):
        (q, k, v), options = Case(ratio=2, queries=3, keys=90, width=64).make()
        want = oracles.gpt_oss_eager(q, k, v, options["sinks"], window=window)
        out, _, _ = decode(q, k, v, sinks=options["sinks"], window=window)
        assert tolerances.relative_error(out, want) <= 2 * tolerances.output(q.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_offsets_and_broadcasts_do_not_matter(decode: Decode, dtype: torch.dtype) -> None:
    case = Case(kind="gated by element", dtype=dtype, ratio=2, queries=3, keys=40, width=64)
    (q, k, v), options = case.make()
    want = decode(q, k, v, "gated", gate=options["gate"])[0]

    def heads_last(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def off_by_one(x: Tensor) -> Tensor:
        room = torch.full((x.numel() + 2,), math.nan, dtype=x.dtype)
        return room[1:-1].view(x.shape).copy_(x)

    def part_of_longer_rows(x: Tensor) -> Tensor:
        room = torch.full((*x.shape[:3], x.shape[3] + 5), math.nan, dtype=x.dtype)
        return room[..., 3:-2].copy_(x)

    def channels_first(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT

    for layout in (heads_last, off_by_one, part_of_longer_rows, channels_first):
        got = decode(*map(layout, (q, k, v)), "gated", gate=layout(options["gate"]))[0]
        assert torch.equal(got, want), layout.__name__
    shared = [x[:1].expand_as(x) for x in (q, k, v, options["gate"])]
    got = decode(*shared[:3], "gated", gate=shared[3])[0]
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_a_narrow_row_is_read(decode: Decode, dtype: torch.dtype) -> None:
    """The rows begin at multiples of 16 bytes; their ends do not."""
    (q, k, v), options = Case(dtype=dtype, queries=2, keys=40, width=33).make()

    def among_nans(x: Tensor) -> Tensor:
        return torch.full((*x.shape[:3], 40), math.nan, dtype=dtype)[..., :33].copy_(x)

    check_call(decode, among_nans(q), among_nans(k), among_nans(v), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_that_row_alone(decode: Decode, kind: str) -> None:
    """Not on the batch, nor on the queries that come along."""
    case = Case(kind=kind, ratio=3, queries=7, keys=530, padding="start", aux=False)
    (q, k, v), options = case.make()
    options.pop("return_aux")
    want = decode(q, k, v, **options)[0]
    gate = options.pop("gate", None)
    options["key_start"] = options["key_start"][1:]
    for query in (0, 3, 6):
        one = {} if gate is None else {"gate": gate[1:, :, query : query + 1]}
        keys = 530 - 6 + query
        cache = (k[1:, :, :keys], v[1:, :, :keys])
        got = decode(q[1:, :, query : query + 1], *cache, **options, **one)[0]
        assert torch.equal(got, want[1:, :, query : query + 1]), query


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sink", "vanilla"])
def test_what_a_row_does_not_see_cannot_reach_it(
    decode: Decode, kind: str, dtype: torch.dtype
) -> None:
    case = Case(kind=kind, dtype=dtype, ratio=2, queries=4, keys=60, batch=1)
    (q, k, v), options = case.make()
    options["key_start"] = torch.tensor([5])
    del options["return_aux"]
    clean = decode(q, k, v, **options, aux=True)
    assert clean[1] is not None
    for key in (0, 4, 57, 58, 59):
        for bad in (math.nan, math.inf):
            spoilt_k, spoilt_v = k.clone(), v.clone()
            spoilt_k[:, :, key] = math.nan
            spoilt_v[:, :, key] = bad
            out, lse, _ = decode(q, spoilt_k, spoilt_v, **options, aux=True)
            assert lse is not None
            hit = torch.arange(4) + 56 >= key if key >= 5 else torch.zeros(4, dtype=torch.bool)
            assert torch.equal(out[:, :, ~hit], clean[0][:, :, ~hit]), key
            assert torch.equal(lse[:, :, ~hit], clean[1][:, :, ~hit]), key
            assert out[:, :, hit].isnan().all(), key


def test_uncounted_tokens_do_not_spoil_the_importance(decode: Decode) -> None:
    (q, k, v), options = Case(queries=4, keys=40).make()
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2] = False
    want = decode(q, k, v, sinks=options["sinks"], token_mask=mask, aux=True)[2]
    q[1, :, 2] = math.nan
    got = decode(q, k, v, sinks=options["sinks"], token_mask=mask, aux=True)[2]
    assert want is not None
    assert got is not None
    assert torch.equal(got, want)


def test_padding_outside_the_cache_is_taken_as_its_end(decode: Decode) -> None:
    (q, k, v), options = Case(queries=2, keys=40).make()
    for start, lengths in ((-3, 2**40), (2**40, 40), (0, -7)):
        given = {
            "key_start": torch.tensor([start, start]),
            "key_lengths": torch.tensor([lengths, lengths]),
        }
        clamped = {name: x.clamp(0, 40) for name, x in given.items()}
        got = decode(q, k, v, sinks=options["sinks"], **given)[0]
        want = decode(q, k, v, sinks=options["sinks"], **clamped)[0]
        assert torch.equal(got, want)


def test_empty_batches_and_no_queries(decode: Decode) -> None:
    for shape in ((0, 4, 1), (2, 4, 0)):
        b, h, t = shape
        q, k, v = torch.randn(b, h, t, 32), torch.randn(b, 2, 9, 32), torch.randn(b, 2, 9, 32)
        out, lse, importance = decode(q, k, v, sinks=torch.zeros(h), aux=True)
        assert out.shape == q.shape
        assert lse is not None
        assert lse.shape == (b, h, t)
        assert importance is not None
        assert importance.tolist() == [0.0] * h


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "other"}, "kind: got other"),
        ({"sinks": None}, "sinks: got None"),
        ({"sinks": torch.zeros(3)}, r"sinks.shape\[0\]: got 3, expected q.shape\[1\] = 4"),
        ({"kind": "vanilla"}, "sinks: got a tensor"),
        ({"gate": torch.zeros(2, 4, 3)}, "gate: got a tensor"),
        (
            {"k": torch.zeros(2, 2, 9, 16)},
            r"k.shape\[3\] \(head width\): got 16, expected q.shape\[3\] = 32",
        ),
        ({"k": torch.zeros(2, 3, 9, 32), "v": torch.zeros(2, 3, 9, 32)}, "a positive multiple"),
        ({"v": torch.zeros(2, 2, 8, 32)}, r"v.shape\[2\] \(keys\)"),
        ({"v": torch.zeros(2, 2, 9, 32, dtype=torch.float16)}, "v.dtype"),
        ({"q": torch.zeros(2, 4, 3, 32, dtype=torch.float64)}, "q.dtype"),
        ({"q": torch.zeros(4, 3, 32)}, "q.ndim: got 3"),
        ({"window": 0}, "window: got 0, expected at least 1"),
        ({"scale": math.nan}, "scale: got nan"),
        ({"key_start": torch.zeros(2)}, "key_start.dtype"),
        ({"key_lengths": torch.zeros(1, dtype=torch.int64)}, "key_lengths.shape"),
        ({"token_mask": torch.zeros(2, 3)}, "token_mask.dtype"),
    ],
)
def test_names_the_argument_that_does_not_fit(
    decode: Decode, change: dict[str, Any], says: str
) -> None:
    call = {
        "q": torch.zeros(2, 4, 3, 32),
        "k": torch.zeros(2, 2, 9, 32),
        "v": torch.zeros(2, 2, 9, 32),
        "kind": "sink",
        "sinks": torch.zeros(4),
    }
    with pytest.raises(ValueError, match=says):
        decode(**call | change)
