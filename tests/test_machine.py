"""Machines: figures that say where they come from, in any unit, and that do not contradict."""

import json
import pickle
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernstone.machine import _UNITS, Figure, Machine

EXAMPLE = Machine(
    "workstation",
    {
        "cpu.read_bandwidth": Figure(28.1, "GB/s", "measured", "two threads, huge pages"),
        "cpu.memory_bandwidth": Figure(83.2, "GB/s", "published", "DDR5-5200, two channels"),
        "gpu.fp16_rate": Figure(165.2, "TFLOP/s", "published"),
        "link.bandwidth": Figure(25.0, "GB/s", "published", "PCIe 4 x16, pinned"),
        "link.expert_time": Figure(0.4, "ms", "measured"),
        "expert.bytes": Figure(10.0, "MB", "assumed", "8.65 M weights,\n4.5 bits and more"),
        "cpu.cores": Figure(16, "1", "published"),
    },
)


def machine(**figures: tuple[float, str]) -> Machine:
    return Machine("m", {f"x.{name}": Figure(*x, "assumed") for name, x in figures.items()})


@pytest.mark.parametrize(
    ("value", "unit", "wanted", "expected"),
    [
        (28.1, "GB/s", "GB/s", 28.1),
        (28.1, "GB/s", "B/s", 28.1e9),
        (28.1, "GB/s", "MB/s", 28100.0),
        (0.4179, "ms", "us", 417.9),
        (0.4179, "ms", "s", 0.4179e-3),
        (3.0, "ns", "ms", 3e-6),
        (1.0, "GiB", "B", 2.0**30),
        (1.0, "KiB", "kB", 1.024),
        (2.5, "TB", "MiB", 2.5e12 / 2**20),
        (1.0, "MiB/s", "KiB/s", 1024.0),
        (165.2, "TFLOP/s", "GFLOP/s", 165200.0),
        (2.0, "PFLOP", "TFLOP", 2000.0),
        (0.26, "POP/s", "TOP/s", 260.0),
        (450.0, "W", "kW", 0.45),
        (5.2, "pJ", "nJ", 5.2e-3),
        (900.0, "mV", "V", 0.9),
        (13.0, "nA", "uA", 0.013),
        (2.4, "GHz", "MHz", 2400.0),
        (2.0, "kHz", "Hz", 2000.0),
        (16.0, "1", "1", 16.0),
        (0.3, "ms", "us", 300.0),
        (3.0, "mW", "uW", 3000.0),
    ],
)
def test_a_figure_is_given_in_any_unit_of_its_kind(
    value: float, unit: str, wanted: str, expected: float
) -> None:
    assert machine(a=(value, unit)).value("x.a", wanted) == expected


@given(st.sampled_from(sorted(_UNITS)), st.sampled_from(sorted(_UNITS)), st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_there_and_back_is_the_same_and_other_kinds_are_refused(
    unit: str, other: str, value: float
) -> None:
    one = machine(a=(value, unit))
    if _UNITS[unit][0] != _UNITS[other][0]:
        with pytest.raises(ValueError, match=r"expected a figure that .* measures"):
            one.value("x.a", other)
        return
    there = one.value("x.a", other)
    # Two roundings, of u each.
    assert machine(a=(there, other)).value("x.a", unit) == pytest.approx(value, rel=2.0**-52)


def test_names_the_figure_that_is_not_there_and_its_neighbours() -> None:
    want = (
        "machine 'workstation': got no figure 'cpu.read_bandwith', there is cpu.read_bandwidth, "
        "cpu.memory_bandwidth"
    )
    with pytest.raises(ValueError, match=want):
        EXAMPLE.value("cpu.read_bandwith", "GB/s")
    with pytest.raises(ValueError, match=r"there is cpu.read_bandwidth, cpu.memory_bandwidth, gpu"):
        EXAMPLE.value("zzzz", "GB/s")
    with pytest.raises(
        ValueError, match=r"machine 'bare': got no figure 'x.y', there is no figure"
    ):
        Machine("bare", {}).figure("x.y")


def test_names_the_unit_that_does_not_measure_the_figure() -> None:
    with pytest.raises(ValueError, match=r"link.bandwidth is 25 GB/s \(published\), .* that ms me"):
        EXAMPLE.value("link.bandwidth", "ms")
    with pytest.raises(ValueError, match="OP/s measures"):
        EXAMPLE.value("gpu.fp16_rate", "GOP/s")
    with pytest.raises(ValueError, match=r"unit: got 'Gb/s', expected a unit such as .*GB/s"):
        EXAMPLE.value("link.bandwidth", "Gb/s")


@pytest.mark.parametrize(
    ("value", "own", "unit"), [(1e308, "TFLOP/s", "FLOP/s"), (5e-324, "B", "TB")]
)
def test_a_figure_beyond_float64_in_a_unit_is_told(value: float, own: str, unit: str) -> None:
    machine = Machine("odd", {"a.b": Figure(value, own, "assumed")})
    assert machine.value("a.b", own) == value
    with pytest.raises(ValueError, match=r"machine 'odd': a.b is .*, expected what float64 holds"):
        machine.value("a.b", unit)


def test_a_product_beyond_float64_is_told() -> None:
    large = Figure(1e308, "1", "assumed")
    machine = Machine("odd", {"a.a": large, "a.b": large, "a.c": large})
    with pytest.raises(ValueError, match=r"a.a is 1e\+308 1 \(assumed\), expected 1.79769e\+308"):
        machine.expect_product("a.a", ("a.b", "a.c"), within=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": Fraction(10) ** 400}, "value: got inf, expected a finite number"),
        ({"value": float("nan")}, "value: got nan, expected a finite number"),
        ({"value": float("inf")}, "value: got inf, expected a finite number"),
        ({"value": -1.0}, "value: got -1.0, expected a positive number"),
        ({"value": 0}, "value: got 0.0, expected a positive number"),
        ({"unit": ""}, "unit: got an empty string"),
        ({"unit": "gb/s"}, "unit: got 'gb/s', expected a unit such as"),
        ({"source": "guessed"}, "source: got 'guessed', expected one of measured, published, ass"),
        ({"source": ""}, "source: got ''"),
    ],
)
def test_names_what_is_out_of_range_in_a_figure(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Figure(1.0, "s", "measured"), **change)


@pytest.mark.parametrize(
    "name", ["cores", "CPU.cores", "cpu.", ".cpu", "cpu..x", "cpu x.y", "a.b\n"]
)
def test_names_of_another_form_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"figures: got the name .*, expected one like 'cpu.clock'"
    ):
        Machine("m", {name: Figure(1, "s", "measured")})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Figure("1", "s", "measured"), "value: got str, expected a real number"),
        (lambda: Figure(1, 3, "measured"), "unit: got int, expected a string"),
        (lambda: Figure(1, "s", "measured", None), "note: got NoneType, expected a string"),
        (lambda: Machine(3, {}), "name: got int, expected a string"),
        (lambda: Machine("m", {"a.b": 3.0}), r"figures\['a.b'\]: got float, expected a Figure"),
    ],
)
def test_names_what_is_of_another_type(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_figures_that_multiply_are_let_pass() -> None:
    EXAMPLE.expect_product("expert.bytes", ("link.bandwidth", "link.expert_time"), within=0.0)
    watts = machine(v=(0.9, "V"), a=(20.0, "mA"), t=(3.0, "us"), w=(18.0, "mW"), j=(54.0, "nJ"))
    watts.expect_product("x.w", ("x.v", "x.a"), within=0.0)
    watts.expect_product("x.j", ("x.w", "x.t"), within=0.0)
    watts.expect_product("x.j", ("x.v", "x.a", "x.t"), within=0.0)
    rate = machine(clock=(2.0, "GHz"), wide=(64, "B"), rate=(128.0, "GB/s"), n=(2.0, "1"))
    rate.expect_product("x.rate", ("x.clock", "x.wide"), within=0.0)


@pytest.mark.parametrize("factor", [0.89, 1.11])
def test_a_product_that_is_off_is_told_with_every_figure(factor: float) -> None:
    off = EXAMPLE.with_figures({"expert.bytes": Figure(10.0 * factor, "MB", "published")})
    off.expect_product("expert.bytes", ("link.bandwidth", "link.expert_time"), within=0.12)
    want = (
        rf"machine 'workstation': expert.bytes is {10 * factor:g} MB \(published\), expected 10 MB "
        r"within 10 %: link.bandwidth 25 GB/s \(published\) \* link.expert_time 0.4 ms \(measured\)"
    )
    with pytest.raises(ValueError, match=want):
        off.expect_product("expert.bytes", ("link.bandwidth", "link.expert_time"), within=0.1)


def test_units_that_do_not_multiply_are_told() -> None:
    want = r"expert.bytes is 10 MB \(assumed\), no unit of link.bandwidth 25 GB/s \(published\)$"
    with pytest.raises(ValueError, match=want):
        EXAMPLE.expect_product("expert.bytes", ("link.bandwidth",), within=1.0)
    with pytest.raises(ValueError, match="no unit of 1"):
        EXAMPLE.expect_product("expert.bytes", (), within=1.0)
    with pytest.raises(ValueError, match=r"within: got -0.1, expected 0 or more"):
        EXAMPLE.expect_product("expert.bytes", ("link.bandwidth",), within=-0.1)


def test_figures_in_order_are_let_pass_and_others_told() -> None:
    EXAMPLE.expect_order("link.bandwidth", "cpu.read_bandwidth", "cpu.memory_bandwidth")
    equal = machine(a=(1.0, "GB/s"), b=(1000.0, "MB/s"))
    equal.expect_order("x.a", "x.b", "x.a")
    want = (
        r"cpu.memory_bandwidth is 83.2 GB/s \(published\), expected at most cpu.read_bandwidth, "
        r"28.1 GB/s \(measured\)"
    )
    with pytest.raises(ValueError, match=want):
        EXAMPLE.expect_order("link.bandwidth", "cpu.memory_bandwidth", "cpu.read_bandwidth")
    with pytest.raises(ValueError, match=r"link.bandwidth is 25 GB/s .* that ms measures"):
        EXAMPLE.expect_order("link.bandwidth", "link.expert_time")


def test_figures_are_replaced_in_another_machine_only() -> None:
    slow = EXAMPLE.with_figures(
        {
            "link.bandwidth": Figure(12.5, "GB/s", "assumed"),
            "disk.bytes": Figure(2, "TB", "assumed"),
        },
        name="slow link",
    )
    assert (slow.name, EXAMPLE.name) == ("slow link", "workstation")
    assert slow.value("link.bandwidth", "MB/s") == 12500.0
    assert EXAMPLE.value("link.bandwidth", "MB/s") == 25000.0
    assert [*slow.figures] == [*EXAMPLE.figures, "disk.bytes"]
    assert EXAMPLE.with_figures({}) == EXAMPLE


def test_a_machine_does_not_change() -> None:
    figures = {"a.b": Figure(1, "s", "measured")}
    one = Machine("m", figures)
    figures["a.c"] = figures["a.b"]
    assert [*one.figures] == ["a.b"]
    with pytest.raises(TypeError, match="does not support item assignment"):
        one.figures["a.d"] = figures["a.b"]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        one.name = "other"  # type: ignore[misc]
    assert len({EXAMPLE, EXAMPLE.with_figures({}), one}) == 2


def test_a_machine_goes_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(EXAMPLE)) == EXAMPLE


def test_every_number_of_the_table_shows_its_source() -> None:
    assert EXAMPLE.table().splitlines() == [
        "workstation",
        "cpu.read_bandwidth     28.1 GB/s     measured   two threads, huge pages",
        "cpu.memory_bandwidth   83.2 GB/s     published  DDR5-5200, two channels",
        "gpu.fp16_rate         165.2 TFLOP/s  published",
        "link.bandwidth           25 GB/s     published  PCIe 4 x16, pinned",
        "link.expert_time        0.4 ms       measured",
        "expert.bytes             10 MB       assumed    8.65 M weights, 4.5 bits and more",
        "cpu.cores                16 1        published",
    ]
    assert Machine("bare", {}).table() == "bare"


NAMES = st.from_regex(r"[a-z0-9_]{1,5}(\.[a-z0-9_]{1,5}){1,2}", fullmatch=True)
FIGURES = st.builds(
    Figure,
    st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    st.sampled_from(sorted(_UNITS)),
    st.sampled_from(["measured", "published", "assumed"]),
    st.text(max_size=20),
)


@settings(deadline=None)
@given(st.text(min_size=1), st.dictionaries(NAMES, FIGURES, max_size=4))
def test_json_gives_every_bit_back(name: str, figures: dict[str, Figure]) -> None:
    one = Machine(name, figures)
    again = Machine.from_json(json.loads(json.dumps(one.to_json())))
    assert again == one
    assert [*again.figures] == [*one.figures]


def test_a_saved_machine_is_loaded(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == EXAMPLE


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d, _: d.update(version=0), "version: got 0, expected 1"),
        (lambda d, _: d.update(format="quernstone.plan"), "format: got 'quernstone.plan'"),
        (lambda d, _: d.pop("name"), "name: missing, expected a string"),
        (lambda d, _: d.update(name=""), "name: got an empty string"),
        (lambda d, _: d["figures"].update(x={}), r"figures\['x'\]\.value: missing"),
        (lambda _, f: f.pop("unit"), r"figures\['link.bandwidth'\]\.unit: missing, expected a str"),
        (lambda _, f: f.update(unit="GB"), None),
        (lambda _, f: f.update(unit="Gb"), r"figures\['link.bandwidth'\]\.unit: got 'Gb'"),
        (lambda _, f: f.update(source="hearsay"), r"figures\['link.*'\]\.source: got 'hearsay'"),
        (
            lambda _, f: f.update(value=-25),
            r"figures\['link.*'\]\.value: got -25.0, expected a pos",
        ),
        (lambda _, f: f.update(value="25"), r"figures\['link.*'\]\.value: got a string, expected"),
        (lambda _, f: f.update(value=10**400), r"figures\['link.*'\]\.value: got 1000"),
        (lambda _, f: f.update(value=float("nan")), r"got no JSON document \(NaN is no number"),
        (lambda _, f: f.update(units="s"), r"figures\['link.bandwidth'\]\.units: unknown"),
    ],
)
def test_a_spoilt_document_is_refused_by_path_and_field(
    tmp_path: Path, spoil: Any, message: str | None
) -> None:
    data = EXAMPLE.to_json()
    spoil(data, data["figures"]["link.bandwidth"])
    (tmp_path / "machine.json").write_text(json.dumps(data))
    if message is None:
        assert Machine.load(tmp_path / "machine.json") != EXAMPLE
        return
    with pytest.raises(ValueError, match=rf"machine\.json: {message}"):
        Machine.load(tmp_path / "machine.json")
