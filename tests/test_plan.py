"""Plans: what they refuse and add up, that they survive JSON, and that the picture is true."""

import json
import math
import random
import re
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernstone.plan import Buffer, Interval, Plan

SVG = "{http://www.w3.org/2000/svg}"

EXAMPLE = Plan(
    ("cpu", "gpu", "link"),
    (
        Interval("cpu", 0.0, 2e-3, "expert 3"),
        Interval("link", 0.0, 1e-3, "expert 5", "transfer"),
        Interval("gpu", 1e-3, 1.25e-3, "expert 5"),
        Interval("gpu", 1.25e-3, 1.5e-3, "expert 1"),
    ),
    (
        Buffer("expert 5", "device", 17_000_000, 0.0, 1.25e-3),
        Buffer("expert 1", "device", 3_000_000, 1e-3, 1.5e-3),
        Buffer("input", "host", 4096, 0.0, 2e-3),
    ),
    title="one layer",
)

MOMENTS = st.floats(0, 1e3) | st.floats(0, allow_infinity=False)
NAMES = st.text(min_size=1, max_size=8)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any resources, names and times, of every size."""
    resources = draw(st.lists(NAMES, max_size=3, unique=True))
    intervals = []
    for resource in resources:
        times = sorted(draw(st.lists(MOMENTS, max_size=8)))
        for start, end in zip(times[::2], times[1::2], strict=False):
            label, kind = draw(st.text(max_size=8)), draw(NAMES)
            intervals.append(Interval(resource, start, end, label, kind))
    buffers = []
    for at in range(draw(st.integers(0, 5))):
        start, end = sorted((draw(MOMENTS), draw(MOMENTS)))
        space, size = draw(st.sampled_from(["a", "<&>"])), draw(st.integers(0, 2**70))
        buffers.append(Buffer(f"{at}", space, size, start, end))
    order = draw(st.permutations(intervals))
    unit, title = draw(NAMES | st.sampled_from(["s", "ms", "us", "ns"])), draw(st.text(max_size=20))
    return Plan(tuple(resources), tuple(order), tuple(buffers), unit, title)


def test_the_makespan_is_the_end_of_the_last_interval() -> None:
    assert EXAMPLE.makespan == 2e-3
    assert Plan(("a",), ()).makespan == 0.0


@settings(deadline=None)
@given(plans())
def test_busy_is_the_exact_sum_of_the_durations(plan: Plan) -> None:
    for resource in plan.resources:
        mine = [one for one in plan.intervals if one.resource == resource]
        want = sum((Fraction(one.end - one.start) for one in mine), Fraction(0))
        assert plan.busy(resource) == float(want)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 9), st.booleans()),
        max_size=12,
    )
)
def test_the_peak_is_the_most_that_is_held_at_any_moment(
    drawn: list[tuple[int, int, int, bool]],
) -> None:
    buffers = [
        Buffer(f"{at}", "x" if mine else "y", size, min(a, b), max(a, b))
        for at, (a, b, size, mine) in enumerate(drawn)
    ]
    plan = Plan((), (), tuple(buffers))
    held = {
        moment: sum(b.bytes for b in buffers if b.space == "x" and b.start <= moment < b.end)
        for moment in range(13)
    }
    assert plan.peak_bytes("x") == max(held.values())
    steps = plan.occupancy("x")
    assert steps == sorted(steps)
    for moment, want in held.items():
        assert next((used for time, used in reversed(steps) if time <= moment), 0) == want


def test_a_space_without_buffers_holds_nothing() -> None:
    assert EXAMPLE.peak_bytes("elsewhere") == 0
    assert EXAMPLE.peak_bytes("device") == 20_000_000


def test_sums_of_durations_touch_although_they_round() -> None:
    """Ends by repeated addition, starts as multiples: they differ in the last bits."""
    end, intervals, buffers = 0.0, [], []
    for at in range(1000):
        start, end = at * 0.1, end + 0.1
        intervals.append(Interval("a", start, max(start, end), f"{at}"))
        buffers.append(Buffer("slot", "a", 5, start, max(start, end)))
    assert any(one.end > at * 0.1 for at, one in enumerate(intervals, 1))
    plan = Plan(("a",), tuple(intervals), tuple(buffers))
    assert plan.peak_bytes("a") == 5
    assert plan.busy("a") == float(sum(Fraction(one.end - one.start) for one in intervals))


def test_changes_apart_by_rounding_fall_on_the_first_of_them() -> None:
    buffers = (Buffer("x", "m", 5, 0, 1), Buffer("x", "m", 6, math.nextafter(1, 2), 2))
    assert Plan((), (), buffers).occupancy("m") == [(0, 5), (1, 6), (2, 0)]


@pytest.mark.parametrize("overlap", [1e-12, 1e-3, 1.0, 1.5])
def test_an_overlap_is_refused_by_its_labels(overlap: float) -> None:
    intervals = (Interval("a", 3.0, 5.0, "late"), Interval("a", 2.0, 3.0 + overlap, "early"))
    with pytest.raises(ValueError, match=r"intervals: got 'late' from 3\.0 on.*'early' at .*\(a\)"):
        Plan(("a",), intervals)
    buffers = (Buffer("x", "m", 1, 3.0, 5.0), Buffer("x", "m", 2, 2.0, 3.0 + overlap))
    with pytest.raises(ValueError, match=r"buffers: got 'x' from 3\.0 on.*\('x' in 'm'\)"):
        Plan((), (), buffers)


def test_what_differs_in_resource_space_or_name_may_overlap() -> None:
    Plan(("a", "b"), (Interval("a", 0, 2, ""), Interval("b", 1, 3, "")))
    Plan((), (), tuple(Buffer(n, s, 1, 0, 2) for n in ("x", "y") for s in ("m", "n")))
    Plan((), (), (Buffer("x in y", "z", 1, 0, 2), Buffer("x", "y in z", 1, 0, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": -1.0}, "start: got -1.0, expected 0 or more"),
        ({"start": float("nan")}, "start: got nan, expected a finite number"),
        ({"end": float("inf")}, "end: got inf, expected a finite number"),
        ({"end": 0.5}, "end: got 0.5, expected at least the start, 1.0"),
        ({"resource": ""}, "resource: got an empty string"),
        ({"kind": ""}, "kind: got an empty string"),
    ],
)
def test_names_what_is_out_of_range_in_an_interval(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Interval("a", 1.0, 2.0, "x"), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bytes": -1}, "bytes: got -1, expected 0 or more"),
        ({"bytes": 10**400}, "bytes: got 1000.*, expected 0 or more and below 2\\^1000"),
        ({"end": 0.5}, "end: got 0.5, expected at least the start, 1.0"),
        ({"name": ""}, "name: got an empty string"),
        ({"space": ""}, "space: got an empty string"),
    ],
)
def test_names_what_is_out_of_range_in_a_buffer(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Buffer("x", "m", 1, 1.0, 2.0), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resources": ("cpu", "gpu")}, r"intervals\[1\]\.resource: got 'link', not in cpu, gpu"),
        ({"resources": ("cpu", "gpu", "link", "cpu")}, r"resources\[3\]: got 'cpu' again"),
        ({"resources": ("cpu", "gpu", "link", "")}, r"resources\[3\]: got an empty string"),
        ({"unit": ""}, "unit: got an empty string"),
    ],
)
def test_names_what_is_wrong_in_a_plan(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(EXAMPLE, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interval("a", "0", 1, "x"), "start: got str, expected a real number"),
        (lambda: Interval("a", 0, None, "x"), "end: got NoneType, expected a real number"),
        (lambda: Interval("a", 0, 1, 7), "label: got int, expected a string"),
        (lambda: Buffer("x", "m", 1.5, 0, 1), "bytes: got float, expected a whole number"),
        (lambda: Plan("cpu", ()), "resources: got a string, expected a sequence"),
        (lambda: Plan((1,), ()), r"resources\[0\]: got int, expected str"),
        (lambda: Plan((), (3,)), r"intervals\[0\]: got int, expected Interval"),
        (lambda: Plan((), (), ("x",)), r"buffers\[0\]: got str, expected Buffer"),
        (lambda: Plan((), (), unit=1), "unit: got int, expected a string"),
        (lambda: Plan((), (), title=None), "title: got NoneType, expected a string"),
    ],
)
def test_names_what_is_of_another_type(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_an_unknown_resource_is_never_busy() -> None:
    with pytest.raises(ValueError, match="resource: got 'tpu', not in cpu, gpu, link"):
        EXAMPLE.busy("tpu")


def test_a_plan_does_not_change() -> None:
    intervals = [Interval("a", 0, 1, "x")]
    plan = Plan(("a",), intervals)  # type: ignore[arg-type]
    intervals.clear()
    assert plan.makespan == 1.0
    with pytest.raises(FrozenInstanceError):
        plan.title = "other"  # type: ignore[misc]
    assert len({plan, replace(plan), EXAMPLE}) == 2


@settings(deadline=None)
@given(plans())
def test_json_gives_every_bit_back(plan: Plan) -> None:
    data = json.loads(json.dumps(plan.to_json()))
    again = Plan.from_json(data)
    assert again == plan
    assert json.dumps(again.to_json()) == json.dumps(plan.to_json())
    assert data == plan.to_json()


def test_a_saved_plan_is_loaded(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == EXAMPLE


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.update(version=2), "version: got 2, expected 1"),
        (lambda d: d.update(format="quernstone.machine"), "format: got 'quernstone.machine'"),
        (lambda d: d.pop("unit"), "unit: missing"),
        (lambda d: d["resources"].append(3), r"resources\[3\]: got int, expected str"),
        (lambda d: d["intervals"].append([]), r"intervals\[4\]: got a list, expected an object"),
        (lambda d: d["intervals"][2].pop("end"), r"intervals\[2\]\.end: missing"),
        (lambda d: d["intervals"][2].update(end=0.0), r"intervals\[2\]\.end: got 0\.0, expected"),
        (lambda d: d["intervals"][0].update(start=10**400), r"intervals\[0\]\.start: got 1000"),
        (lambda d: d["intervals"][3].update(color=1), r"intervals\[3\]\.color: unknown"),
        (
            lambda d: d["intervals"][3].update(resource="tpu"),
            r"intervals\[3\]\.resource: got 'tpu'",
        ),
        (lambda d: d["intervals"][3].update(start=0.0), r"intervals: got 'expert 5' from 0\.001"),
        (lambda d: d["buffers"][1].update(bytes=1.0), r"buffers\[1\]\.bytes: got a number, exp"),
        (lambda d: d["buffers"][1].update(bytes=-4), r"buffers\[1\]\.bytes: got -4, expected 0"),
    ],
)
def test_a_spoilt_document_is_refused_by_path_and_field(
    tmp_path: Path, spoil: Any, message: str
) -> None:
    data = EXAMPLE.to_json()
    spoil(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"plan\.json: {message}"):
        Plan.load(tmp_path / "plan.json")


def test_reading_leaves_the_data_as_it_is() -> None:
    data = EXAMPLE.to_json()
    Plan.from_json(data)
    assert data == EXAMPLE.to_json()


def drawn(plan: Plan, **options: Any) -> ElementTree.Element:
    return ElementTree.fromstring(plan.svg(**options))


def bars(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The bar of each interval, by what it says when pointed at."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        title, bar = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert title is not None
        assert bar is not None
        found[title.text or ""] = bar
    return found


def words(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_bars_stand_where_their_times_are() -> None:
    found = bars(drawn(EXAMPLE))
    assert list(found) == [
        "expert 3, work: 0 to 2 ms",
        "expert 5, work: 1 to 1.25 ms",
        "expert 1, work: 1.25 to 1.5 ms",
        "expert 5, transfer: 0 to 1 ms",
    ]
    cpu, gpu, after, link = found.values()
    left, pixels = float(cpu.attrib["x"]), float(cpu.attrib["width"]) + 1
    assert left + pixels + 74 == pytest.approx(720, abs=0.02)
    for bar, start, end in ((gpu, 0.5, 0.625), (after, 0.625, 0.75), (link, 0.0, 0.5)):
        assert float(bar.attrib["x"]) == pytest.approx(left + start * pixels, abs=0.02)
        assert float(bar.attrib["width"]) == pytest.approx((end - start) * pixels - 1, abs=0.02)
    rows = [float(bar.attrib["y"]) for bar in found.values()]
    assert rows[0] < rows[1] == rows[2] < rows[3]
    assert cpu.attrib["fill"] == gpu.attrib["fill"] != link.attrib["fill"]


def test_labels_stand_in_the_bars_that_hold_them() -> None:
    wide, narrow = words(drawn(EXAMPLE, width=1200)), words(drawn(EXAMPLE, width=300))
    assert [wide.count(f"expert {at}") for at in (1, 3, 5)] == [1, 1, 2]
    assert [narrow.count(f"expert {at}") for at in (1, 3, 5)] == [0, 1, 1]


@pytest.mark.parametrize(("label", "pixels"), [("a" * 30, 209), ("算" * 20, 245)])
def test_a_label_needs_room_for_its_letters_and_some_around(label: str, pixels: int) -> None:
    plan = Plan(("a",), (Interval("a", 0, 1, label),))
    fits = [width for width in range(240, 400) if label in words(drawn(plan, width=width))]
    # Left of the bar stands a name of 7 and 14 pixels, right of it 74, a pixel of which is the gap.
    assert fits == list(range(pixels + 8 + 21 + 75, 400))


def test_long_names_are_cut_and_leave_room_for_the_bars() -> None:
    plan = Plan(("processor " * 20,), (Interval("processor " * 20, 0, 1, "x"),), title="t")
    root = drawn(plan, width=400)
    (bar,) = bars(root).values()
    assert float(bar.attrib["width"]) > 200
    assert words(root)[1] == "processor pro…"


def test_a_legend_takes_the_lines_that_it_needs() -> None:
    kinds = [f"a kind of many letters {at}" for at in range(6)]
    plan = Plan(("a",), tuple(Interval("a", at, at + 1, "", kind) for at, kind in enumerate(kinds)))
    legend = [text for text in drawn(plan, width=400).iter(f"{SVG}text") if text.text in kinds]
    assert [float(text.attrib["x"]) for text in legend] == pytest.approx([15, 212.04] * 3)
    assert len({text.attrib["y"] for text in legend}) == 3


def test_the_axis_reaches_the_last_buffer() -> None:
    plan = Plan(("a",), (Interval("a", 0, 1, "x"),), (Buffer("b", "m", 1, 0, 4),))
    assert words(drawn(plan))[-2:] == ["4", "s"]


def test_the_picture_tells_kinds_shares_peaks_and_times() -> None:
    assert words(drawn(EXAMPLE)) == [
        *("one layer", "work", "transfer"),
        *("cpu", "expert 3", "100 %"),
        *("gpu", "expert 5", "expert 1", "25 %"),
        *("link", "expert 5", "50 %"),
        *("device", "20 MB"),
        *("host", "4.1 kB"),
        *("0.0", "0.5", "1.0", "1.5", "2.0", "ms"),
    ]


def test_a_lane_rises_and_falls_with_the_bytes() -> None:
    device = next(x for x in drawn(EXAMPLE).iter(f"{SVG}path") if "Z" in x.attrib["d"])
    steps = re.findall(r"H([\d.]+)V([\d.]+)", device.attrib["d"])
    (left, y0), (_, y1), (_, y2), (right, base) = ((float(x), float(y)) for x, y in steps)
    assert [base - y for y in (y0, y1, y2)] == pytest.approx([0.85 * 38, 38, 0.15 * 38], abs=0.02)
    places = [(float(x) - left) / (right - left) for x, _ in steps]
    assert places == pytest.approx([0, 1 / 1.5, 1.25 / 1.5, 1], abs=1e-4)


@pytest.mark.parametrize(
    ("end", "unit", "want"),
    [
        (7.0, "s", ["0", "1", "2", "3", "4", "5", "6", "7", "s"]),
        (0.75, "s", ["0", "100", "200", "300", "400", "500", "600", "700", "ms"]),
        (2500.0, "us", ["0.0", "0.5", "1.0", "1.5", "2.0", "2.5", "ms"]),
        (1.5e-9, "s", ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0", "1.2", "1.4", "ns"]),
        (3e-6, "us", [*(f"{at / 2000:.4f}" for at in range(7)), "ns"]),
        (5000.0, "s", ["0", "1,000", "2,000", "3,000", "4,000", "5,000", "s"]),
        (5e-324, "rounds", ["0", "rounds"]),
        (8.0, "rounds", ["0", "2", "4", "6", "8", "rounds"]),
        (3e-7, "rounds", ["0", "5e-08", "1e-07", "1.5e-07", "2e-07", "2.5e-07", "3e-07", "rounds"]),
    ],
)
def test_ticks_are_round_and_in_a_unit_of_their_size(
    end: float, unit: str, want: list[str]
) -> None:
    plan = Plan(("a",), (Interval("a", 0, end, ""),), unit=unit)
    assert words(drawn(plan))[2:] == want


def test_plans_drawn_to_one_scale_agree_in_places_and_colours() -> None:
    kinds = ("work", "wait", "transfer")
    half = Plan(EXAMPLE.resources, EXAMPLE.intervals[1:3], EXAMPLE.buffers)
    whole, part = (bars(drawn(plan, until=4e-3, kinds=kinds)) for plan in (EXAMPLE, half))
    for title, bar in part.items():
        for name in ("x", "width", "fill"):
            assert bar.attrib[name] == whole[title].attrib[name]
    assert words(drawn(EXAMPLE, until=4e-3, width=480))[-2] == "4"


def test_kinds_beyond_the_colours_are_told_to_be_others() -> None:
    intervals = tuple(Interval("a", at, at + 1, "", f"kind {at}") for at in range(9))
    root = drawn(Plan(("a",), intervals))
    fills = [bar.attrib["fill"] for bar in bars(root).values()]
    assert len(set(fills)) == 7
    assert fills[6] == fills[7] == fills[8]
    assert words(root)[:7] == [*(f"kind {at}" for at in range(6)), "other"]


def test_one_kind_needs_no_legend_and_no_interval_no_share() -> None:
    assert "work" not in words(drawn(Plan(("a",), (Interval("a", 0, 1, "x"),))))
    assert words(drawn(Plan(("a",), ()))) == ["a", "0.0", "0.2", "0.4", "0.6", "0.8", "1.0", "s"]


@settings(deadline=None)
@given(plans(), st.integers(240, 2000))
def test_whatever_the_names_and_times_the_picture_is_well_formed_and_inside_its_frame(
    plan: Plan, width: int
) -> None:
    root = drawn(plan, width=width)
    assert root.attrib["viewBox"].split()[2] == str(width)
    assert len(bars(root)) <= len(plan.intervals)
    for bar in root.iter(f"{SVG}rect"):
        x, room = float(bar.attrib["x"]), float(bar.attrib["width"])
        assert 0 <= x < x + room <= width
    kinds = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert kinds <= {"svg", "style", "g", "title", "rect", "path", "text"}


def test_markup_and_control_characters_in_names_are_only_text() -> None:
    hostile = "</text><script>alert(1)</script>\"'&\x00\ud800"
    intervals = (Interval(hostile, 0, 1, hostile, hostile), Interval(hostile, 1, 2, "", "b"))
    buffers = (Buffer(hostile, hostile, 1, 0, 1),)
    plan = Plan((hostile,), intervals, buffers, unit=hostile, title=hostile)
    picture = plan.svg(width=2000)
    assert "<script" not in picture
    picture.encode()
    root = ElementTree.fromstring(picture)
    clean = hostile.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert words(root).count(clean) == 6
    assert root.attrib["aria-label"] == clean


def test_pictures_are_the_same_in_every_run() -> None:
    draw = random.Random(0)
    intervals = tuple(Interval("a", at, at + draw.random(), f"{at}") for at in range(50))
    plan = Plan(("a",), intervals)
    assert plan.svg() == Plan.from_json(plan.to_json()).svg()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 239}, "width: got 239, expected 240 to 100000"),
        ({"width": 100_001}, "width: got 100001, expected 240 to 100000"),
        ({"width": float("inf")}, "width: got inf, expected a finite number"),
        ({"until": 1.9e-3}, "until: got 0.0019, expected 0.002 or more"),
        ({"until": float("nan")}, "until: got nan, expected a finite number"),
    ],
)
def test_names_the_option_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EXAMPLE.svg(**options)
