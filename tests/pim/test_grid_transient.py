"""Grids over time against closed forms, matrix exponentials and ngspice."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import expm

from quernstone import spice
from quernstone.pim.transient import Method, transient
from tests.pim import ngspice

RAMP = """* a growing current behind a package
V1 supply 0 1
Rp supply p 0.05
Lp p die 20p
Rg die far 0.2
C1 die 0 1n
C2 far 0 0.5n
R2 far 0 1k
I1 far 0 PWL(0 0 4n 1)
.end
"""


def exact_ramp(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """die and far of `RAMP`: exponentials of x' = a x for x = (v_die, v_far, i_L, t, 1)."""
    c1, c2, coil, rp, rg, r2, slope = 1e-9, 0.5e-9, 20e-12, 0.05, 0.2, 1e3, 0.25e9
    a = np.array(
        [
            [-1 / (rg * c1), 1 / (rg * c1), 1 / c1, 0, 0],
            [1 / (rg * c2), -(1 / rg + 1 / r2) / c2, 0, -slope / c2, 0],
            [-1 / coil, 0, -rp / coil, 0, 1 / coil],
            [0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0],
        ]
    )
    start = np.append(np.linalg.solve(a[:3, :3], -a[:3, 4]), [0.0, 1.0])
    onward = expm(a * times[1])
    states = [start]
    for _ in times[1:]:
        states.append(onward @ states[-1])
    return np.array(states)[:, :2]


@pytest.mark.parametrize(("method", "order"), [("trapezoidal", 2), ("euler", 1)])
def test_the_error_falls_with_the_order_of_the_method(method: Method, order: int) -> None:
    netlist = spice.parse(RAMP)
    errors = []
    for step in (4e-12, 2e-12, 1e-12):
        course = transient(netlist, step, 0.4e-9, method=method, observe=["die", "far"])
        errors.append(np.abs(course.volts - exact_ramp(course.times)).max())
    ratios = np.divide(errors[:-1], errors[1:])
    assert (ratios > 2**order * 0.9).all(), errors
    assert (ratios < 2**order * 1.1).all(), errors


def test_nothing_moves_from_the_operating_point() -> None:
    text = RAMP.replace("PWL(0 0 4n 1)", "0.5")
    course = transient(spice.parse(text), 1e-12, 1e-9)
    np.testing.assert_allclose(
        course.volts, np.broadcast_to(course.volts[0], course.volts.shape), rtol=1e-11
    )
    far = 1.0 - 0.25 * (0.5 + 1e-3 * course.of("far")[0])
    assert course.of("far")[0] == pytest.approx(far, rel=1e-12)


def test_a_ring_decays_as_the_closed_form_says() -> None:
    # v(0) = 1 at 1 nF against 1 nH and, in series, 10 mOhm.
    text = "V1 s 0 1\nR0 s a 1e9\nC1 a 0 1n\nL1 a b 1n\nR1 b 0 0.01\nI1 a 0 PWL(0 0 1f -1)\n.end\n"
    course = transient(spice.parse(text), 1e-12, 4e-9, observe=["a"])
    c = coil = 1e-9
    r = 0.01
    damping, omega = r / (2 * coil), np.sqrt(1 / (coil * c) - (r / (2 * coil)) ** 2)
    t = course.times
    # A step of 1 A into C parallel to L + R.
    phase = np.cos(omega * t) + (damping - 1 / (r * c)) / omega * np.sin(omega * t)
    want = r * (1 - np.exp(-damping * t) * phase)
    np.testing.assert_allclose(course.of("a"), want, rtol=0.0, atol=1e-3)


def test_sources_of_voltage_follow_their_waves() -> None:
    text = "V1 s 0 PWL(0 0 1n 1)\nV2 0 m PWL(0 0 1n 2)\nR1 s a 1\nR2 a m 1\nC1 a 0 1f\n.end\n"
    course = transient(spice.parse(text), 1e-11, 2e-9)
    ramp = np.minimum(course.times / 1e-9, 1.0)
    np.testing.assert_allclose(course.of("s"), ramp, atol=1e-14)
    np.testing.assert_allclose(course.of("m"), -2.0 * ramp, atol=1e-14)
    # The middle lags by RC/2 = 0.5 fs.
    np.testing.assert_allclose(course.of("a"), -0.5 * ramp, atol=1e-5)


def test_a_small_grid_agrees_with_ngspice(tmp_path: Path) -> None:
    lines = ["V1 s 0 0.75", "Lp s p 10p", "Rp p n_0_0 20m"]
    for y in range(4):
        for x in range(4):
            if x < 3:
                lines.append(f"Rx{x}_{y} n_{x}_{y} n_{x + 1}_{y} 0.1")
            if y < 3:
                lines.append(f"Ry{x}_{y} n_{x}_{y} n_{x}_{y + 1} 0.1")
            lines.append(f"C{x}_{y} n_{x}_{y} 0 5p")
    lines.append("I1 n_3_3 0 PULSE(10m 200m 50p 20p 20p 100p 300p)")
    netlist = spice.parse("\n".join([*lines, ".end"]))
    step, end = 0.5e-12, 0.6e-9
    course = transient(netlist, step, end)
    times, found = ngspice.transient(netlist, tmp_path, step, end)
    swing = np.ptp(course.of("n_3_3"))
    for name in ("n_3_3", "n_0_0", "n_1_2"):
        want = np.interp(course.times, times, found[name])
        # Both are second order; ngspice chooses its own times below the step.
        assert np.abs(course.of(name) - want).max() < 2e-3 * swing


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"step": 0.0}, "step: got 0.0"),
        ({"step": 2e-9}, "step: got 2e-09"),
        ({"method": "gear"}, "method: got 'gear'"),
        ({"observe": ["x"]}, "observe: got 'x'"),
    ],
)
def test_bad_settings_are_refused_by_name(kwargs: dict[str, object], message: str) -> None:
    settings = {"step": 1e-12, "end": 1e-9, **kwargs}
    with pytest.raises(ValueError, match=message):
        transient(spice.parse(RAMP), **settings)  # type: ignore[arg-type]


def test_inductors_in_a_ring_are_refused_by_line() -> None:
    text = RAMP.replace(".end", "Lq p die 30p\n.end")
    with pytest.raises(spice.SpiceError, match=r"netlist:\d+: l[pq]: got an inductor in a ring"):
        transient(spice.parse(text), 1e-12, 1e-9)
