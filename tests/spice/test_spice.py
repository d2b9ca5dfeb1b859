"""Netlists: what is read, what is written, and what is refused with its file and line."""

import gzip
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernstone import spice
from quernstone.pim.grid import factor
from quernstone.pim.grid_netlist import grid_of

EXAMPLE = """* a grid
R1 n1_m1_0_0 n1_m1_2_0 1.5
r2 N1_M1_2_0 gnd
+ 2k   ; a comment
* between
C1 n1_m1_0_0 0 10pF $ another
L1 n1_m1_2_0 pad 1nH
V1 pad 0 DC 1.1

I1 n1_m1_0_0 0 0 PULSE(0 1m 1n 0.1n 0.1n 2n 10n)
i2 n1_m1_2_0 0 PWL(0 0, 1n 2m)
.op
.tran 10p 1n
.end
what follows .end is not read
"""


def test_the_subset_of_the_benchmarks_is_read() -> None:
    netlist = spice.parse(EXAMPLE)
    assert netlist.nodes == ("0", "n1_m1_0_0", "n1_m1_2_0", "pad")
    assert netlist.resistors.names == ("r1", "r2")
    np.testing.assert_array_equal(netlist.resistors.values, [1.5, 2000.0])
    np.testing.assert_array_equal(netlist.resistors.plus, [1, 2])
    np.testing.assert_array_equal(netlist.resistors.minus, [2, 0])
    np.testing.assert_array_equal(netlist.capacitors.values, [1e-11])
    np.testing.assert_array_equal(netlist.inductors.values, [1e-9])
    np.testing.assert_array_equal(netlist.voltages.values, [1.1])
    np.testing.assert_array_equal(netlist.currents.values, [0.0, 0.0])
    assert netlist.currents.waves == {
        0: spice.Pulse(0.0, 1e-3, 1e-9, 1e-10, 1e-10, 2e-9, 1e-8),
        1: spice.Corners((0.0, 1e-9), (0.0, 2e-3)),
    }
    assert netlist.tran == (1e-11, 1e-9)
    assert netlist.controls == ((".op",), (".tran", "10p", "1n"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1.0),
        ("-2.5e-3", -2.5e-3),
        ("4.7k", 4700.0),
        ("4.7K", 4700.0),
        ("1meg", 1e6),
        ("1MEGohm", 1e6),
        ("1m", 1e-3),
        ("3mil", 3 * 25.4e-6),
        ("10pF", 10e-12),
        ("1F", 1e-15),
        ("2.2uH", 2.2e-6),
        ("5V", 5.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e3k", 1e6),
        ("0.1n", 0.1e-9),
        ("1t", 1e12),
        ("1g", 1e9),
    ],
)
def test_numbers_have_factors_and_units(text: str, value: float) -> None:
    assert spice.number(text) == pytest.approx(value, rel=4e-16, abs=0.0)


@pytest.mark.parametrize(
    "text", ["", "k", "nan", "inf", "1_000", "1e999", "--1", "1k2", "0x10", "1 "]
)
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a"):
        spice.number(text)


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        (["R1 a b"], 1, "r1: got 2 words, expected two nodes and a resistance; is the file trunc"),
        (["R1 a b 1", "R1 b c 1"], 2, "r1: got a second element of that name"),
        (["R1 a b one"], 1, "r1: got 'one', expected a number"),
        (["R1 a b -1"], 1, "r1: got a resistance of -1, expected 0 or more"),
        (["C1 a b 0"], 1, "c1: got a capacitance of 0, expected more than 0"),
        (["R1 a b 1 tc=2"], 1, "r1: got 'tc = 2' after the value"),
        (["* x", "", "Q1 a b c model"], 3, "got an unknown card 'q1', expected one of C, I, L, R"),
        ([".model x npn"], 1, "got an unknown card '.model'"),
        (["+ 1"], 1, "got a continuation of no card"),
        (["I1 a 0 SIN(0 1 2)"], 1, "i1: got 'sin', expected a number"),
        (["I1 a 0 1 SIN(0 1 2)"], 1, "i1: got 'sin', expected DC, PULSE or PWL"),
        (["I1 a 0 PULSE(0 1)"], 1, "i1: pulse: got 2 numbers, expected 6 or 7"),
        (["I1 a 0 PULSE(0 1 0 1 1 1 2)"], 1, "pulse: period: got 2, expected at least the pulse"),
        (["I1 a 0 PULSE(0 1 0 0 1 1 2)"], 1, "pulse: rise: got 0, expected more than 0"),
        (["I1 a 0 PWL(0 1 2)"], 1, "pwl: got 3 numbers, expected pairs"),
        (["I1 a 0 PWL(1 1 0 2)"], 1, "corners: got times that do not grow"),
        (["V1 a 0 dc"], 1, "v1: got 'dc', expected a number"),
        ([".tran 1n"], 1, ".tran: got 1 words"),
        ([".tran 2n 1n"], 1, "expected 0 < step <= end"),
        ([".include other.sp"], 1, "expected none in a text without a folder"),
        (["@@"], 1, "got an unknown card '@@'"),
    ],
)
def test_errors_have_file_and_line(lines: list[str], line: int, message: str) -> None:
    with pytest.raises(spice.SpiceError, match=re.escape(message)) as caught:
        spice.parse("\n".join([*lines, ".end"]), name="x.sp")
    assert str(caught.value).startswith(f"x.sp:{line}: ")
    assert (caught.value.file, caught.value.line) == ("x.sp", line)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.file, again.line) == (str(caught.value), "x.sp", line)


def test_a_truncated_file_is_noticed_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.sp"
    whole = EXAMPLE[: EXAMPLE.index(".end") + 4]
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(spice.SpiceError, match=r"x\.sp:\d+: "):
            spice.read(path)
    path.write_text(whole)
    assert len(spice.read(path).resistors) == 2


def test_packed_files_are_read_and_damaged_ones_told(tmp_path: Path) -> None:
    path = tmp_path / "x.sp.gz"
    data = gzip.compress(EXAMPLE.encode())
    path.write_bytes(data)
    assert spice.read(path).nodes == spice.parse(EXAMPLE).nodes
    for damaged in (data[:-9], data[:20] + b"\xff" + data[21:], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(spice.SpiceError, match="damaged or truncated gzip"):
            spice.read(path)


def test_a_title_is_no_card() -> None:
    text = "R1 is a 5 title\nR2 a 0 1\n.end\n"
    assert spice.parse(text, title=True).resistors.names == ("r2",)
    with pytest.raises(spice.SpiceError, match=r"netlist:1: r1: got 'title' after the value"):
        spice.parse(text)


def test_files_of_the_same_folder_are_included(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "Pads.inc").write_text("V1 a 0 1\nR9 a b ?\n")
    top = tmp_path / "top.sp"
    top.write_text("R1 a b 1\n.include 'sub/Pads.inc'\n.end\n")
    with pytest.raises(spice.SpiceError, match=r"Pads\.inc:2: r9: got '\?', expected a number"):
        spice.read(top)
    (tmp_path / "sub" / "Pads.inc").write_text("V1 a 0 1\n")
    netlist = spice.read(top)
    assert netlist.voltages.names == ("v1",)
    assert [Path(file).name for file in netlist.files] == ["top.sp", "Pads.inc"]


@pytest.mark.parametrize("name", ["../outside.sp", "/etc/hostname", "link.sp"])
def test_files_outside_the_folder_are_not_included(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "outside.sp").write_text("R1 a 0 1\n")
    (folder / "link.sp").symlink_to(tmp_path / "outside.sp")
    (folder / "top.sp").write_text(f"* x\n.include {name}\n.end\n")
    message = r"top\.sp:2: \.include: got .* expected a file in the netlist's folder"
    with pytest.raises(spice.SpiceError, match=message):
        spice.read(folder / "top.sp")


def test_a_circle_of_files_and_a_missing_one_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.sp").write_text(".include b.sp\n.end\n")
    (tmp_path / "b.sp").write_text(".include a.sp\n")
    with pytest.raises(spice.SpiceError, match="expected no circle"):
        spice.read(tmp_path / "a.sp")
    (tmp_path / "b.sp").unlink()
    with pytest.raises(spice.SpiceError, match=r"a\.sp:1: \.include: b\.sp: No such file"):
        spice.read(tmp_path / "a.sp")


def test_what_is_written_is_read_as_the_same(tmp_path: Path) -> None:
    first = spice.parse(EXAMPLE)
    spice.write(first, tmp_path / "y.sp", comment="two\nlines")
    second = spice.read(tmp_path / "y.sp")
    assert second.nodes == first.nodes
    assert second.controls == first.controls
    for kind in ("resistors", "capacitors", "inductors", "currents", "voltages"):
        a, b = getattr(first, kind), getattr(second, kind)
        assert (a.names, a.waves) == (b.names, b.waves)
        for column in ("plus", "minus", "values"):
            np.testing.assert_array_equal(getattr(a, column), getattr(b, column))


@given(st.text(alphabet="RCLIVrg .+*;$()=,0123456789abknem\n\t-'\"", max_size=300))
@settings(deadline=None, max_examples=300)
def test_any_text_is_read_or_refused_by_line(text: str) -> None:
    refused = ""
    try:
        assert spice.parse(text + "\n.end\n").nodes[0] == "0"
    except spice.SpiceError as error:
        refused = str(error)
    assert not refused or re.match(r"netlist:\d+: ", refused)


def test_shorts_are_refused_or_made_one_node() -> None:
    text = "V1 pad 0 1\nRv pad a 0\nV2 a b 0\nR1 b c 2\nR2 c d 3\nRs c c 1\nI1 d 0 0.1\n.end\n"
    netlist = spice.parse(text, name="x.sp")
    with pytest.raises(
        spice.SpiceError, match=r"x\.sp:2: rv: got a short of 0 ohm.*shorts='merge'"
    ):
        grid_of(netlist)
    grid = grid_of(netlist, shorts="merge")
    assert grid.node("a") == grid.node("b") == grid.node("pad")
    volts = factor(grid).solve()
    assert volts[grid.node("a")] == 1.0
    assert volts[grid.node("c")] == pytest.approx(0.8, rel=1e-14)
    assert volts[grid.node("d")] == pytest.approx(0.5, rel=1e-14)
    with pytest.raises(ValueError, match="name: got 'e'"):
        grid.node("e")
    with pytest.raises(ValueError, match="shorts: got 'ignore'"):
        grid_of(netlist, shorts="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["V1 a 0 1", "R1 b c 1"], "x.sp:2: r1: node 'b' floats: no path of resistors"),
        (["V1 a 0 1", "R1 a 0 1", "I1 z 0 1"], "x.sp:3: i1: node 'z' floats"),
        (["V1 a 0 1", "R1 a b 1", "C1 b c 1p"], "x.sp:3: c1: node 'c' floats"),
        (["V1 a 0 1", "V2 a 0 2"], "x.sp:2: v2: got 2 V at node 'a', expected 1 V"),
        (["V1 a 0 1", "L1 a 0 1n"], "x.sp:1: v1: got a source of 1 V between two nodes"),
        (["V1 a b 1", "R1 a 0 1", "R2 b 0 1"], "x.sp:1: v1: got a source of 1 V between two nodes"),
        (["R1 a 0 1", "V1 a b 0"], "x.sp:2: v1: got a short of 0 volt"),
    ],
)
def test_grids_without_a_solution_name_node_and_line(lines: list[str], message: str) -> None:
    netlist = spice.parse("\n".join([*lines, ".end"]), name="x.sp")
    with pytest.raises(spice.SpiceError, match=re.escape(message)):
        grid_of(netlist)


def test_sources_the_other_way_round_hold_and_draw_the_opposite() -> None:
    grid = grid_of(spice.parse("V1 0 a 1\nR1 a b 2\nI1 0 b 0.25\n.end\n"))
    volts = factor(grid).solve()
    assert volts[grid.node("a")] == -1.0
    assert volts[grid.node("b")] == pytest.approx(-0.5, rel=1e-14)
    assert volts[grid.node("0")] == 0.0


def test_names_of_files_keep_their_capitals(tmp_path: Path) -> None:
    (tmp_path / "Caps").mkdir()
    for name, ohm in (("Caps/A.sp", 1), ("a.sp", 2), ("A.sp", 3)):
        (tmp_path / name).write_text(f"R{ohm} a b {ohm}\n")
    top = tmp_path / "top.sp"
    top.write_text(".INCLUDE Caps/A.sp\n.include A.sp\n.end\n")
    assert spice.read(top).resistors.values.tolist() == [1.0, 3.0]


def test_what_is_no_file_is_not_included(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    for name in ("pipe", "one", ".", "a" * 5000):
        (tmp_path / "top.sp").write_text(f".include {name}\n.end\n")
        with pytest.raises(spice.SpiceError, match=r"top\.sp:1: \.include: "):
            spice.read(tmp_path / "top.sp")


def test_files_that_multiply_each_other_end(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}.sp").write_text(f".include {i + 1}.sp\n" * 10)
    (tmp_path / "12.sp").write_text("* nothing\n")
    with pytest.raises(spice.SpiceError, match="more than 4096 included files"):
        spice.read(tmp_path / "0.sp")


def test_a_byte_order_mark_and_a_comment_within_a_card_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.sp").write_bytes(b"\xef\xbb\xbfR1 a b\n$ note\n+ 5\n.end\n")
    assert spice.read(tmp_path / "a.sp").resistors.values.tolist() == [5.0]
