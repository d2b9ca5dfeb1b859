"""A network on a chip of macros: tiles, rounds, currents, techniques and assumed figures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quernstone.machine import Figure, Machine
from quernstone.pim import reference
from quernstone.pim.chip import CHIPS, VfTable, signoff_toggle_current
from quernstone.pim.sensitivity import (
    calibrated,
    case,
    headline,
    outcomes,
    sweep,
)
from quernstone.pim.system import (
    Settings,
    Trace,
    chip_macro,
    compare,
    network_trace,
    run,
)
from quernstone.pim.work import Work

SMALL = Machine(
    "small",
    {
        **CHIPS["aim-7nm-256tops"].figures,
        "chip.macros": Figure(8, "1", "assumed"),
        "chip.groups": Figure(4, "1", "assumed"),
        "macro.rows": Figure(16, "1", "assumed"),
        "macro.banks": Figure(4, "1", "assumed"),
    },
)


def response(macros: int = 8) -> NDArray[np.float64]:
    shape = np.exp(-np.abs(np.subtract.outer(range(macros), range(macros))) / 1.5)
    return calibrated(shape, SMALL)


def layers(seed: int = 0, shift: int = 0, vectors: int = 40) -> list[Work]:
    """Weights like trained ones: small, of both signs; activations: many zeros."""
    rng = np.random.default_rng(seed)
    found = []
    for index, (outputs, inputs) in enumerate([(6, 20), (4, 16), (12, 40), (3, 5)]):
        weights = np.clip(rng.normal(0, 25, (outputs, inputs)).round() + shift, -128, 127)
        stream = np.maximum(0, rng.normal(0, 60, (vectors, inputs))).clip(0, 255)
        found.append(
            Work(f"layer{index}", weights.astype(np.int8), stream.astype(np.uint8), vectors)
        )
    return found


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    plain, shifted = network_trace(layers(), SMALL), network_trace(layers(shift=16), SMALL)
    return {"int8": plain, "lhr": plain, "wds": shifted, "lhr+wds": shifted}


def test_every_tile_is_in_a_round_once_and_no_round_is_too_large(traces: dict[str, Trace]) -> None:
    trace = traces["int8"]
    names = [task.name for one in trace.rounds for task in one.tasks]
    macro = chip_macro(SMALL)
    want = []
    for layer in layers():
        rows, banks = macro.tiles(*layer.weights.shape)
        want += [f"{layer.name}[{r},{b}]" for r in range(rows) for b in range(banks)]
    assert names == want
    assert max(len(one.tasks) for one in trace.rounds) <= 8
    # 5 tiles and 3 of the 9 of a layer that no round holds; its other 6 and the last layer's.
    assert [len(one.tasks) for one in trace.rounds] == [8, 7]


def test_toggles_are_those_of_the_macro(traces: dict[str, Trace]) -> None:
    macro, layer = chip_macro(SMALL), layers()[0]
    ones = reference.hamming_weights(layer.weights, 8).astype(int)
    bits = (layer.inputs[:, None, :] >> np.arange(8)[None, :, None]) & 1
    lines = bits.reshape(-1, layer.inputs.shape[1])
    changed = np.diff(lines.astype(int), axis=0, prepend=0) != 0
    want = changed[:, :16] @ ones[:4, :16].sum(0) / macro.cells
    task = traces["int8"].rounds[0].tasks[0]
    np.testing.assert_allclose(task.toggles, want, rtol=1e-6)
    assert task.hamming == pytest.approx(ones[:4, :16].sum() / macro.cells)
    assert task.toggles.max() <= task.hamming


def test_without_a_booster_the_drop_is_that_of_direct_products(traces: dict[str, Trace]) -> None:
    trace, grid = traces["int8"], response()
    out = run(trace, SMALL, grid, Settings(booster=False, mapping=False))
    full = signoff_toggle_current(SMALL)
    worst = 0.0
    for one in trace.rounds:
        amperes = np.zeros((one.cycles, 8))
        for at, task in enumerate(one.tasks):
            amperes[:, at] = full * (0.1 + 0.9 * task.toggles)
        # Groups beyond the last task are switched off and not looked at.
        inside = -(-len(one.tasks) // 2) * 2
        worst = max(worst, (amperes[:, :inside] @ grid[:inside, :inside].T).max())
    assert out.worst_drop == pytest.approx(worst, rel=1e-12)
    assert out.failures == 0
    assert out.seconds == pytest.approx(sum(r.cycles for r in trace.rounds) * 1e-9, rel=1e-12)


def test_layers_with_more_vectors_than_were_kept_count_in_full() -> None:
    some = [replace(layer, vectors=80) for layer in layers()]
    once, twice = (network_trace(w, SMALL) for w in (layers(), some))
    settings = Settings(booster=False)
    a, b = (run(t, SMALL, response(), settings) for t in (once, twice))
    assert b.seconds == pytest.approx(2 * a.seconds)
    assert b.joules == pytest.approx(2 * a.joules)
    assert b.efficiency == pytest.approx(a.efficiency)


def test_a_layer_with_fewer_vectors_than_its_round_stands_still_afterwards() -> None:
    long, short = layers()[0], layers()[1]
    short = Work("short", short.weights, short.inputs[:10], 10)
    trace = network_trace([long, short], SMALL)
    (one,) = trace.rounds
    assert one.cycles == 40 * 8
    assert not one.tasks[-1].toggles[80:].any()
    assert one.tasks[-1].toggles[:80].any()


def test_the_booster_saves_energy_in_low_power_and_time_in_sprint(
    traces: dict[str, Trace],
) -> None:
    low, sprint = (
        compare(traces, SMALL, response(), Settings(mode)) for mode in ("low-power", "sprint")
    )
    assert set(low) == {"int8", "lhr", "wds", "lhr+wds", "booster", "booster+mapping", "all"}
    assert low["booster"].efficiency > low["int8"].efficiency
    assert sprint["booster"].rate > sprint["int8"].rate
    assert low["wds"].joules < low["int8"].joules
    assert low["all"].efficiency > low["booster"].efficiency
    again = compare(traces, SMALL, response(), Settings("low-power"))
    assert again["all"].joules == low["all"].joules


def test_unknown_weights_stay_at_the_level_of_sign_off_without_failures() -> None:
    unknown = [replace(layer, known=False) for layer in layers()]
    trace = network_trace(unknown, SMALL)
    assert trace.hamming == 0.0
    chip = Machine("calm", {**SMALL.figures, "booster.patience": Figure(1e6, "1", "assumed")})
    out = run(trace, chip, response())
    assert out.failures == 0
    last = len(VfTable.of_chip(chip).levels) - 1
    assert all(b.at_level[:, :last].sum() == 0 for b in out.rounds)


@pytest.mark.parametrize("processes", [False, True])
def test_a_sweep_gives_what_its_cases_give(traces: dict[str, Trace], processes: bool) -> None:
    shape = response()
    figures, factors = ("signoff.drop", "macro.power"), (0.5, 2.0)
    if processes:
        figures, factors = ("macro.power",), (2.0,)
    common: dict[str, Any] = {"figures": figures, "factors": factors}
    if processes:
        found = sweep(traces, SMALL, shape, **common)
    else:
        with ThreadPoolExecutor(2) as executor:
            found = sweep(traces, SMALL, shape, **common, executor=executor)
    assert [(c.figure, c.factor) for c in found] == [(f, x) for f in figures for x in factors]
    base = headline(*outcomes(traces, SMALL, shape), SMALL)
    # The response is scaled to the drop of sign-off: power scales out of every ratio.
    assert found[-1].headline == pytest.approx(base, rel=1e-9)
    if not processes:
        assert found[1].headline is not None
        assert found[1].headline.efficiency > base.efficiency


def test_a_sweep_runs_on_dask(traces: dict[str, Trace]) -> None:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        executor = client.get_executor()
        found = sweep(traces, SMALL, response(), figures=("macro.static_share",), executor=executor)
    want = [case(traces, replaced(c.factor), response(), 0, c.figure, c.factor) for c in found]
    assert found == want


def replaced(factor: float) -> Machine:
    figure = SMALL.figure("macro.static_share")
    changed = replace(figure, value=figure.value * factor)
    return Machine("small", {**SMALL.figures, "macro.static_share": changed})


def test_a_chip_that_does_not_work_is_told_in_the_sweep(traces: dict[str, Trace]) -> None:
    with ThreadPoolExecutor(1) as executor:
        (found,) = sweep(
            traces, SMALL, response(), figures=("signoff.drop",), factors=(5.0,), executor=executor
        )
    assert found.headline is None
    assert "threshold" in found.reason


def test_bad_input_is_named(traces: dict[str, Trace]) -> None:
    with pytest.raises(ValueError, match="no layers"):
        network_trace([], SMALL)
    with pytest.raises(ValueError, match=r"response\.shape"):
        run(traces["int8"], SMALL, np.eye(7))
    with pytest.raises(ValueError, match="expected 'wds'"):
        compare({"int8": traces["int8"]}, SMALL, response(), techniques=["int8", "wds"])
    with pytest.raises(ValueError, match="techniques"):
        compare(traces, SMALL, response(), techniques=["magic"])
    with pytest.raises(ValueError, match="no figure"):
        sweep(traces, SMALL, response(), figures=("chip.colour",))
    with pytest.raises(ValueError, match="factor"):
        sweep(traces, SMALL, response(), factors=(0.0,))
    with pytest.raises(ValueError, match="square"):
        calibrated(np.zeros((2, 3)), SMALL)
    with pytest.raises(ValueError, match="without a drop"):
        calibrated(np.zeros((2, 2)), SMALL)
    odd = Machine("odd", {**SMALL.figures, "chip.groups": Figure(3, "1", "assumed")})
    with pytest.raises(ValueError, match="multiple of 3"):
        run(traces["int8"], odd, response())
