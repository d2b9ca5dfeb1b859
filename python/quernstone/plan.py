"""Who does what when: intervals on resources, buffers with lifetimes, and their picture.

A schedule before it runs, a simulation, or what has been recorded: it begins at time 0.
"""

import math
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from operator import index
from typing import Any

from quernstone import _document
from quernstone._checks import number, text

_FORMAT, _VERSION = "quernstone.plan", 1


@dataclass(frozen=True)
class Interval:
    """A resource is taken by one thing from `start` to `end`."""

    resource: str
    start: float
    end: float
    label: str
    kind: str = "work"
    """What sort of thing it is ("work", "transfer" ...): its colour."""

    def __post_init__(self) -> None:
        text("resource", self.resource)
        text("label", self.label, empty=True)
        text("kind", self.kind)
        _check_times(self)


@dataclass(frozen=True)
class Buffer:
    """Bytes that a memory space holds from `start` until just before `end`."""

    name: str
    space: str
    bytes: int
    start: float
    end: float

    def __post_init__(self) -> None:
        text("name", self.name)
        text("space", self.space)
        try:
            object.__setattr__(self, "bytes", index(self.bytes))
        except TypeError:
            got = type(self.bytes).__name__
            raise TypeError(f"bytes: got {got}, expected a whole number") from None
        if not 0 <= self.bytes < 2**1000:  # sums of them fit float64
            raise ValueError(f"bytes: got {self.bytes}, expected 0 or more and below 2^1000")
        _check_times(self)


@dataclass(frozen=True)
class Plan:
    """A set of resources, what takes them when, and what the memory holds meanwhile.

    Args:
        resources: names, in the order of the picture's rows.
        intervals: in any order. Those of one resource do not overlap; times that differ by no more
            than the rounding of running sums count as one (n eps times the latest time, for n
            intervals or buffers).
        buffers: in any order. Those of one space may overlap, unless they bear one name.
        unit: of all times; "s", "ms", "us" and "ns" are rescaled in the picture, others are not.
        title: of the picture.

    Raises:
        ValueError: a time that is negative, not finite or before its start; an unknown resource;
            an overlap; a name that is empty or given twice.
        TypeError: a value of another type.
    """

    resources: tuple[str, ...]
    intervals: tuple[Interval, ...]
    buffers: tuple[Buffer, ...] = ()
    unit: str = "s"
    title: str = ""

    def __post_init__(self) -> None:
        resources: object = self.resources
        if isinstance(resources, str):
            raise TypeError("resources: got a string, expected a sequence of them")
        for name, kind in (("resources", str), ("intervals", Interval), ("buffers", Buffer)):
            items = tuple(getattr(self, name))
            for at, item in enumerate(items):
                if not isinstance(item, kind):
                    got = type(item).__name__
                    raise TypeError(f"{name}[{at}]: got {got}, expected {kind.__name__}")
            object.__setattr__(self, name, items)
        for at, resource in enumerate(self.resources):
            text(f"resources[{at}]", resource)
            if resource in self.resources[:at]:
                raise ValueError(f"resources[{at}]: got {resource!r} again, expected another name")
        text("unit", self.unit)
        text("title", self.title, empty=True)
        for at, one in enumerate(self.intervals):
            if one.resource not in self.resources:
                known = ", ".join(self.resources)
                raise ValueError(f"intervals[{at}].resource: got {one.resource!r}, not in {known}")
        self._check_apart("intervals", [(i.resource, i.label, i) for i in self.intervals])
        self._check_apart(
            "buffers", [(f"{b.name!r} in {b.space!r}", b.name, b) for b in self.buffers]
        )

    def _check_apart(self, name: str, items: Sequence[tuple[str, str, Interval | Buffer]]) -> None:
        """Refuses what overlaps among items of one place."""
        rounding = self._rounding
        for (place, label, one), (next_place, next_label, following) in pairwise(
            sorted(items, key=lambda item: (item[0], item[2].start, item[2].end))
        ):
            if place == next_place and following.start < one.end - rounding:
                raise ValueError(
                    f"{name}: got {next_label!r} from {following.start} on, expected it after the "
                    f"end of {label!r} at {one.end} ({place})"
                )

    @property
    def _rounding(self) -> float:
        """How far apart two times are that are meant to be one: sums of up to n durations, off by
        n u each, u = eps / 2."""
        count = len(self.intervals) + len(self.buffers)
        return count * sys.float_info.epsilon * self._latest

    @property
    def _latest(self) -> float:
        """The end of the last interval or buffer."""
        return max((self.makespan, *(buffer.end for buffer in self.buffers)))

    @property
    def makespan(self) -> float:
        """The end of the last interval; 0 without any."""
        return max((one.end for one in self.intervals), default=0.0)

    def busy(self, resource: str) -> float:
        """How long a resource is taken, in `unit`."""
        if resource not in self.resources:
            raise ValueError(f"resource: got {resource!r}, not in {', '.join(self.resources)}")
        return math.fsum(one.end - one.start for one in self.intervals if one.resource == resource)

    def occupancy(self, space: str) -> list[tuple[float, int]]:
        """Steps (time, bytes that a space holds from then on), in the order of time.

        Changes no further apart than rounding fall together, so that a buffer may follow another
        in the same place; one that lives no longer than that is not seen.
        """
        buffers = [buffer for buffer in self.buffers if buffer.space == space]
        changes = [(buffer.start, buffer.bytes) for buffer in buffers]
        changes += [(buffer.end, -buffer.bytes) for buffer in buffers]
        rounding = self._rounding
        steps: list[tuple[float, int]] = []
        used = 0
        for time, change in sorted(changes):
            used += change
            if steps and time - steps[-1][0] <= rounding:
                steps[-1] = (steps[-1][0], used)
            else:
                steps.append((time, used))
        return steps

    def peak_bytes(self, space: str) -> int:
        """The most bytes that a space holds at any time; 0 for a space without buffers."""
        return max((used for _, used in self.occupancy(space)), default=0)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it; `from_json` gives an equal plan back."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "title": self.title,
            "unit": self.unit,
            "resources": list(self.resources),
            "intervals": [asdict(one) for one in self.intervals],
            "buffers": [asdict(buffer) for buffer in self.buffers],
        }

    @classmethod
    def from_json(cls, data: Any) -> "Plan":
        """The plan of `to_json`.

        Raises:
            ValueError: another format or version; a field that is missing, unknown, of another type
                or out of its range. It is named.
        """
        found = _document.body(data, _FORMAT, _VERSION, **_PLAN_FIELDS)
        for name, kind, types in _ITEMS:
            items = []
            for at, item in enumerate(found[name]):
                values = _document.fields(item, f"{name}[{at}]", **types)
                try:
                    items.append(kind(**values))
                except ValueError as error:
                    raise ValueError(f"{name}[{at}].{error}") from error
            found[name] = items
        try:
            return cls(**found)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON; a file of that name stays whole until it is replaced."""
        _document.write(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads what `save` wrote.

        Raises:
            ValueError: as `from_json`, with the path before the field; no JSON.
            OSError: the file cannot be read.
        """
        return _document.read(path, cls.from_json)

    def svg(
        self,
        *,
        width: int = 720,
        until: float | None = None,
        kinds: Sequence[str] | None = None,
    ) -> str:
        """The plan as a chart: a row for each resource, a lane for each space of the buffers.

        Its text takes colour and font of the page around it. Right of a row stands the share of
        the makespan that the resource is busy, right of a lane the peak. A label is left out where
        it does not fit its bar; every bar tells its own when it is pointed at.

        Args:
            width: of the picture, pixels, 240 to 100,000; it shrinks with its page.
            until: the time at the right edge, so that plans can stand one above the other; None is
                this plan's own end.
            kinds: the kinds in the order of the colours, for the same purpose; None takes them in
                the order in which the intervals name them. There are six colours; further kinds
                share a grey.

        Returns:
            An <svg> element that stands alone or inside HTML: no ids, no script, no style that
            reaches beyond it.

        Raises:
            ValueError: a width out of its range, a time before the end of the plan.
        """
        if not _MIN_WIDTH <= number("width", width) <= _MAX_WIDTH:
            raise ValueError(f"width: got {width}, expected {_MIN_WIDTH} to {_MAX_WIDTH}")
        latest = self._latest
        if until is not None and not latest <= number("until", until):
            raise ValueError(f"until: got {until}, expected {latest} or more, the plan's end")
        return _Chart(self, width, until or latest or 1.0, kinds).svg()


_TIMES = {"start": float, "end": float}
_PLAN_FIELDS = {"title": str, "unit": str, "resources": list, "intervals": list, "buffers": list}
_ITEMS: list[tuple[str, type, dict[str, type]]] = [
    ("intervals", Interval, {"resource": str, **_TIMES, "label": str, "kind": str}),
    ("buffers", Buffer, {"name": str, "space": str, "bytes": int, **_TIMES}),
]


def _check_times(item: Interval | Buffer) -> None:
    """Times are finite, not negative and in order; they become floats."""
    for name in ("start", "end"):
        object.__setattr__(item, name, float(number(name, getattr(item, name))))
    if item.start < 0.0:
        raise ValueError(f"start: got {item.start}, expected 0 or more")
    if item.end < item.start:
        raise ValueError(f"end: got {item.end}, expected at least the start, {item.start}")


_MIN_WIDTH, _MAX_WIDTH = 240, 100_000
_ROW, _LANE, _AXIS, _LINE, _SIZE = 28, 52, 34, 20, 12
_WHITE, _BLACK = "#ffffff", "#1b1e22"
# Fill and text on it; apart from each other with any colour vision, and from light and dark pages.
_COLORS = [
    ("#0f6b6b", _WHITE),
    ("#d08a1d", _BLACK),
    ("#6aa6cf", _BLACK),
    ("#b2452c", _WHITE),
    ("#b98ab0", _BLACK),
    ("#4b5fa3", _WHITE),
]
_OTHER = ("#9aa0a8", _BLACK)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


class _Chart:
    """Lays a plan out: names on the left, times in the middle, figures on the right."""

    def __init__(self, plan: Plan, width: int, until: float, kinds: Sequence[str] | None) -> None:
        self.plan, self.width, self.until = plan, width, until
        order = list(kinds) if kinds is not None else [one.kind for one in plan.intervals]
        self.colors = dict(zip(dict.fromkeys(order), _COLORS, strict=False))
        self.spaces = list(dict.fromkeys(buffer.space for buffer in plan.buffers))
        names = max((_text_width(name) for name in (*plan.resources, *self.spaces)), default=0.0)
        self.left = min(names, 0.25 * width) + 14.0
        self.span = width - self.left - 74.0
        self.parts: list[str] = []
        self.y = 0.0
        seconds = _SECONDS.get(plan.unit)
        self.unit, self.per_unit = plan.unit, 1.0
        if seconds is not None:
            fitting = [unit for unit, size in _SECONDS.items() if until * seconds >= size]
            self.unit = fitting[0] if fitting else "ns"
            self.per_unit = seconds / _SECONDS[self.unit]

    def svg(self) -> str:
        plan = self.plan
        if plan.title:
            self._text(0, self.y + 14, plan.title, weight="600", size=13)
            self.y += 26
        self._legend()
        top = self.y
        for resource in plan.resources:
            self._row(resource)
        for space in self.spaces:
            self._lane(space)
        self._axis(top)
        label = escape(_clean(plan.title or "plan"))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.y:g}" '
            f'viewBox="0 0 {self.width} {self.y:g}" role="img" aria-label="{label}" '
            f'style="max-width:min(100%,{self.width}px);height:auto" font-size="{_SIZE}" '
            f'fill="currentColor">{_ALONE}{"".join(self.parts)}</svg>'
        )

    def _legend(self) -> None:
        """The kinds that occur, unless one colour needs no explanation."""
        present = dict.fromkeys(one.kind for one in self.plan.intervals)
        shown = [(kind, fill) for kind, (fill, _) in self.colors.items() if kind in present]
        if any(kind not in self.colors for kind in present):
            shown.append(("other", _OTHER[0]))
        if len(shown) < 2:
            return
        x = 0.0
        for name, fill in shown:
            needed = 30 + _text_width(name)
            if x and x + needed > self.width:
                x, self.y = 0.0, self.y + _LINE
            self._rect(x, self.y + 3, 10, 10, fill)
            self._text(x + 15, self.y + 12, name, opacity=0.75)
            x += needed
        self.y += _LINE + 6

    def _row(self, resource: str) -> None:
        plan, middle = self.plan, self.y + _ROW / 2
        self._name(resource, middle)
        for one in plan.intervals:
            if one.resource == resource:
                self._bar(one)
        if plan.makespan:
            share = plan.busy(resource) / plan.makespan
            self._text(self.width, middle + 4, f"{100 * share:.0f} %", anchor="end", opacity=0.75)
        self.y += _ROW

    def _bar(self, one: Interval) -> None:
        fill, ink = self.colors.get(one.kind, _OTHER)
        x, end = self._x(one.start), self._x(one.end)
        # A pixel of the page between neighbours; the shortest can still be seen.
        room = max(end - x - 1.0, 0.75)
        words = ", ".join(filter(None, (one.label, one.kind)))
        times = f"{one.start * self.per_unit:.6g} to {one.end * self.per_unit:.6g} {self._unit()}"
        self.parts.append(f"<g><title>{escape(_clean(f'{words}: {times}'))}</title>")
        self._rect(x, self.y + 4, room, _ROW - 8, fill)
        if one.label and _text_width(one.label) + 8 <= room:
            self._text(x + room / 2, self.y + 18, one.label, anchor="middle", color=ink)
        self.parts.append("</g>")

    def _lane(self, space: str) -> None:
        """The bytes of a space over time, as steps below their peak."""
        peak = self.plan.peak_bytes(space)
        base, height = self.y + _LANE - 4, _LANE - 14
        self._name(space, base - height / 2)
        points = [f"M{self._x(0):.2f} {base:g}"]
        for time, used in self.plan.occupancy(space):
            points.append(f"H{self._x(time):.2f}V{base - height * used / max(peak, 1):.2f}")
        path = f"{''.join(points)}V{base:g}H{self._x(0):.2f}Z"
        self.parts.append(
            f'<path d="{path}" fill-opacity="0.16" stroke="currentColor" stroke-opacity="0.5"/>'
        )
        self._text(self.width, base - height + 5, _bytes(peak), anchor="end", opacity=0.75)
        self.y += _LANE

    def _axis(self, top: float) -> None:
        bottom = self.y + 4
        lines, step, decimals = [], *_tick_step(self.until * self.per_unit, self.span / 80)
        for at in range(int(self.until * self.per_unit / step * (1 + 1e-12)) + 1):
            x = self._x(at * step / self.per_unit)
            lines.append(f"M{x:.2f} {top:g}V{bottom:g}")
            label = f"{at * step:,.{decimals}f}" if decimals < 5 else f"{at * step:g}"
            self._text(x, bottom + 15, label, anchor="middle", opacity=0.75)
        self._text(self.width, bottom + 15, self._unit(), anchor="end", opacity=0.75)
        # Below everything else.
        self.parts.insert(
            0, f'<path d="{"".join(lines)}" stroke="currentColor" stroke-opacity="0.16"/>'
        )
        self.y += _AXIS - 10

    def _name(self, name: str, middle: float) -> None:
        shown = name
        while _text_width(shown) > self.left - 14 and len(shown) > 2:
            shown = shown.rstrip("…")[:-1] + "…"
        self._text(0, middle + 4, shown)

    def _x(self, time: float) -> float:
        return self.left + self.span * (time / self.until)

    def _unit(self) -> str:
        return {"us": "µs"}.get(self.unit, self.unit)

    def _rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self.parts.append(
            f'<rect x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}" rx="1.5" '
            f'fill="{fill}"/>'
        )

    def _text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        anchor: str = "start",
        color: str = "",
        opacity: float = 1.0,
        weight: str = "",
        size: int = 0,
    ) -> None:
        settings = {
            "text-anchor": anchor if anchor != "start" else "",
            "fill": color,
            "fill-opacity": f"{opacity:g}" if opacity < 1.0 else "",
            "font-weight": weight,
            "font-size": str(size or ""),
        }
        given = "".join(f' {name}="{value}"' for name, value in settings.items() if value)
        self.parts.append(f'<text x="{x:.2f}" y="{y:g}"{given}>{escape(_clean(words))}</text>')


# The root is this element only where the picture is a document of its own: then a grey that can be
# read on white and on black, and a font.
_ALONE = (
    "<style>svg:root{color:#777d86;font-family:Helvetica,Arial,sans-serif}"
    "svg:root text{fill-opacity:1}</style>"
)


def _tick_step(end: float, most: float) -> tuple[float, int]:
    """Distance of at most `most` ticks up to `end`, 1, 2 or 5 times a power of ten; decimals."""
    rough = max(end / max(most, 1.0), sys.float_info.min)
    power = math.floor(math.log10(rough))
    for factor, exponent in ((1, power), (2, power), (5, power), (1, power + 1)):
        step = factor * 10.0**exponent
        if step >= rough * (1 - 1e-12):
            break
    return step, max(0, -exponent)


def _bytes(count: int) -> str:
    """With three digits, in the unit that leaves a number of 1 or more."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def _text_width(words: str) -> float:
    """Pixels at the usual size, rather too many: characters of unknown fonts are not measured."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in words)
    return _SIZE * (0.58 * (len(words) - wide) + 1.02 * wide)


def _clean(words: str) -> str:
    """Without characters that XML has no way to write."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", words)
