"""Sink attention on one device: rows beside torch's kernels, each compared with fp64 first.

Ours always has the sink, its gate and the importance; SDPA has none of them.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quernstone.attention import reference, sink_attention
from quernstone.bench.cases.attention import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    AttentionCase,
    Inputs,
    arguments,
    gradients_in_blocks,
    in_blocks,
    relative_error,
    trained,
)
from quernstone.bench.gpu.clock import Clock
from quernstone.bench.gpu.rivals import OFFERS, Offer
from quernstone.bench.harness import Absent
from quernstone.bench.rows import LimitResult, RivalResult, Row, Spread, quantile

LENGTHS = (1024, 2048, 4096, 8192, 16384)
# As flash attention's own benchmarks: 16 k tokens in every batch, 2048 channels in all heads.
TOKENS, CHANNELS = 16384, 2048
WINDOW = 128
# Heads of the first sequence that are compared with the fp64 reference, at least.
CHECKED_HEADS = 2
SIDE = 8192
BACKWARD_OVER_FORWARD = 2.5
# A rival may be less exact than ours has to be; it may not compute something else.
SLACK = 4.0
FORWARD, STEP = "attention.gpu.forward", "attention.gpu.step"

Results = tuple[Tensor, ...]


def cases() -> list[AttentionCase]:
    """bf16, causal and with a window, and grouped queries at one length."""
    plain = [(width, length) for width in (64, 128) for length in LENGTHS]
    found = []
    for prefix in (FORWARD, STEP):
        for window in (None, WINDOW):
            found += [_case(prefix, *shape, window) for shape in plain]
        found += [_case(prefix, width, 4096, None, groups=4) for width in (64, 128)]
    return found


def _case(
    prefix: str, width: int, length: int, window: int | None, groups: int = 1
) -> AttentionCase:
    heads = CHANNELS // width
    mask = "causal" if window is None else f"window{window}"
    shared = "" if groups == 1 else f".kv{heads // groups}"
    return AttentionCase(
        f"{prefix}.bf16.{mask}.d{width}.s{length}{shared}",
        dtype="bf16",
        batch=TOKENS // length,
        heads=heads,
        kv_heads=heads // groups,
        queries=length,
        keys=length,
        width=width,
        window=window,
    )


def measure(
    chosen: Iterable[AttentionCase],
    device: torch.device,
    offers: Sequence[Offer] = OFFERS,
    rounds: int = 15,
) -> Iterator[Row]:
    """One row a case; a row whose result is wrong has no figure and says so."""
    clock = Clock(device, rounds)
    limit = _matmul(device)
    for case in chosen:
        yield _row(case, device, offers, clock, limit)


def _row(
    case: AttentionCase,
    device: torch.device,
    offers: Sequence[Offer],
    clock: Clock,
    limit: Callable[[], Tensor],
) -> Row:
    step = case.id.startswith(STEP)
    what = "forward + backward" if step else "forward"
    shape = f"B {case.batch}, H {case.heads}, Hkv {case.kv_heads}, S {case.keys}, D {case.width}"
    row = Row(
        id=case.id,
        vertical=case.id.split(".")[0],
        what=f"{what} {case.dtype} with sink and importance, "
        f"{'causal' if case.window is None else f'window {case.window}'}, {shape}",
        unit="ms",
        threads=0,
    )
    x, dout = _inputs(case, device)
    run = _call(case, x, dout, _ours(case), step)
    expected = {plain: _expected(case, x, dout, step, plain=plain) for plain in (False, True)}
    allowed = (GRADIENT_TOLERANCE if step else TOLERANCE)[case.dtype]
    row.error = _error(run(), expected[False], case)
    if not row.error <= allowed:
        row.notes.append(f"wrong: error {row.error:.3g}, expected at most {allowed:.3g}")
        return row
    runs: dict[str, Callable[[], object]] = {"ours": run, "limit": limit}
    for offer in offers:
        rival = offer(case, device)
        if rival is None:
            continue
        result = row.rivals[rival.name] = RivalResult()
        if isinstance(rival, Absent):
            result.absent = rival.why
            continue
        call = _call(case, x, dout, rival.forward, step, plain=rival.plain)
        result.absent = _trouble(call, expected[rival.plain], SLACK * allowed, result, case)
        if result.absent is None:
            runs[rival.name] = call
    _fill(row, clock.alternate(runs), case.flops * (1 + BACKWARD_OVER_FORWARD * step))
    return row


def _inputs(case: AttentionCase, device: torch.device) -> tuple[Inputs, Tensor]:
    """Inputs and the output's gradient, drawn where they are used."""
    generator = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows = (case.batch, case.heads, case.queries, case.width)
    keys = (case.batch, case.kv_heads, case.keys, case.width)
    q, k, v, gate, dout = (normal(*shape).bfloat16() for shape in (rows, keys, keys, rows, rows))
    return Inputs(q, k, v, normal(case.heads) + 6.0, gate), dout


def _trouble(
    call: Callable[[], Results],
    expected: Results,
    allowed: float,
    result: RivalResult,
    case: AttentionCase,
) -> str | None:
    try:
        result.error = _error(call(), expected, case)
    except Exception as error:
        # A rival may raise anything; it is reported in the row, not hidden.
        return f"not timed: {type(error).__name__}: {error}"[:300]
    if not result.error <= allowed:
        return f"not timed: its error {result.error:.3g} is above {allowed:.3g}"
    return None


def _fill(row: Row, times: dict[str, list[float]], flops: float) -> None:
    own = times["ours"]
    spread = Spread.of(own).scaled(1e3)
    row.ours, row.p20, row.p80 = spread.median, spread.p20, spread.p80
    row.work = {"operations": flops, "rounds": len(own)}
    for name, result in row.rivals.items():
        if name in times:
            result.pair(times[name], own, 1e3)
    row.rank()
    rates = [2 * SIDE**3 / seconds for seconds in times["limit"]]
    row.limit = LimitResult(f"torch.mm bf16 {SIDE}³", quantile(rates, 0.5) / 1e12, "TFLOP/s")
    shares = [flops / mine / rate for mine, rate in zip(own, rates, strict=True)]
    row.percent_of_limit = 100 * quantile(shares, 0.5)
    row.notes.append(f"{flops / quantile(own, 0.5) / 1e12:.1f} useful TFLOP/s")


def _ours(case: AttentionCase) -> Callable[[Inputs], Tensor]:
    def forward(x: Inputs) -> Tensor:
        result = sink_attention(x.q, x.k, x.v, return_aux=True, **arguments(case, x))
        assert isinstance(result, tuple)
        return result[0]

    return forward


def _call(
    case: AttentionCase,
    x: Inputs,
    dout: Tensor,
    forward: Callable[[Inputs], Tensor],
    step: bool,
    *,
    plain: bool = False,
) -> Callable[[], Results]:
    """The forward pass, or with `step` the gradients of every input that has them."""
    if not step:
        return lambda: (forward(x),)
    leaves = Inputs(*(tensor.detach().clone() for tensor in x))
    wanted = list(trained(replace(case, kind="vanilla") if plain else case, leaves).values())
    return lambda: torch.autograd.grad(forward(leaves), wanted, dout)


def _expected(case: AttentionCase, x: Inputs, dout: Tensor, step: bool, *, plain: bool) -> Results:
    """In fp64, for the first heads of the first sequence."""
    case = replace(case, kind="vanilla") if plain else case
    groups = case.heads // case.kv_heads
    heads = max(CHECKED_HEADS, groups)
    few = Inputs(
        x.q[:1, :heads],
        x.k[:1, : heads // groups],
        x.v[:1, : heads // groups],
        x.sinks[:heads],
        x.gate[:1, :heads],
    )
    few = Inputs(*(tensor.double() for tensor in few))
    if not step:
        return (in_blocks(reference.sink_attention, case, few),)
    return tuple(gradients_in_blocks(case, few, dout[:1, :heads].double()).values())


def _error(results: Results, expected: Results, case: AttentionCase) -> float:
    """The largest relative error on what the reference has; sinks are summed over sequences."""
    worst = 0.0
    for got, want in zip(results, expected, strict=True):
        if got.ndim == 4:
            worst = max(worst, relative_error(got[:1, : want.shape[1]], want))
        elif case.batch == 1:
            worst = max(worst, relative_error(got[: want.shape[0]], want))
    return worst


def _matmul(device: torch.device) -> Callable[[], Tensor]:
    side = SIDE if device.type == "cuda" else 64
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return lambda: torch.mm(left, right)
