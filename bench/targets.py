"""The performance contract: reads targets.toml and says what a row owes to it."""

from __future__ import annotations

import operator
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quernstone.bench.rows import Row

PATH = Path(__file__).with_name("targets.toml")
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
RATIOS = ("ratio", "ratio_of_p20")
MEASURES = ("ours", "percent_of_limit", "error", *RATIOS)


@dataclass(frozen=True)
class Target:
    """One line of the contract: `measure` of the row `id`, `comparison`, `value`.

    `measure` is `ours`, `percent_of_limit`, `error`, `ratio` or `ratio_of_p20`; the last two name
    a `rival`. `ratio` is paired by rounds; `ratio_of_p20` compares the best fifths of both, for
    rivals whose times come in steps of a scheduler's quantum.
    """

    id: str
    measure: str
    comparison: str
    value: float
    words: str
    rival: str | None = None

    def judge(self, row: Row) -> dict[str, Any]:
        """The verdict: what was got, whether it is met, and by how much in percent.

        `margin` is positive on the good side of the value, None where nothing was measured.
        """
        got = self._read(row)
        met = got is not None and COMPARISONS[self.comparison](got, self.value)
        margin = None
        if got is not None and self.value:
            margin = 100 * (got / self.value - 1)
            if self.comparison.startswith("<"):
                margin = -margin
        return {
            "measure": self.measure if self.rival is None else f"{self.measure} to {self.rival}",
            "comparison": self.comparison,
            "value": self.value,
            "got": got,
            "met": met,
            "margin": margin,
            "words": self.words,
        }

    def _read(self, row: Row) -> float | None:
        if self.measure in RATIOS:
            rival = row.rivals.get(self.rival or "")
            if rival is None or self.measure == "ratio":
                return rival.ratio if rival else None
            return rival.p20 / row.p20 if rival.p20 and row.p20 else None
        got: float | None = getattr(row, self.measure)
        return got


class BadTargets(ValueError):
    """targets.toml says something that cannot be measured."""


def load(path: Path | None = None) -> list[Target]:
    """Reads `[[target]]` tables; `ids` names every row that the same line holds for.

    Raises BadTargets that says which table is wrong and why.
    """
    try:
        contract = tomllib.loads((path or PATH).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadTargets(f"{path or PATH}: {error}") from None
    tables = contract.pop("target", [])
    if contract or not isinstance(tables, list):
        raise BadTargets(f"{path or PATH}: expected [[target]] tables and nothing else")
    return [target for table in tables for target in _targets(table)]


def _targets(table: Any) -> list[Target]:
    fields: dict[str, Any] = dict(table) if isinstance(table, dict) else {}
    named = str(fields.get("id", fields.get("ids", table)))
    if ("id" in fields) == ("ids" in fields):
        raise BadTargets(f"{named}: expected either id or ids")
    ids = fields.pop("ids", None) or [fields.pop("id", None)]
    strange = sorted(fields.keys() - {"measure", "comparison", "value", "words", "rival"})
    if strange:
        raise BadTargets(f"{named}: got {', '.join(strange)}, which no target has")
    texts = [*ids, fields.get("words")] if isinstance(ids, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise BadTargets(f"{named}: expected a list of ids, and words that are words")
    value = fields.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadTargets(f"{named}: got the value {value!r}, expected a number")
    if fields.get("comparison") not in COMPARISONS:
        raise BadTargets(
            f"{named}: comparison {fields.get('comparison')!r}, expected one of {list(COMPARISONS)}"
        )
    if fields.get("measure") not in MEASURES:
        raise BadTargets(
            f"{named}: measure {fields.get('measure')!r}, expected one of {list(MEASURES)}"
        )
    if (fields["measure"] in RATIOS) != isinstance(fields.get("rival"), str):
        raise BadTargets(f"{named}: a ratio names its rival, and nothing else does")
    return [Target(id=row_id, **fields) for row_id in ids]


def judge(row: Row, targets: Iterable[Target]) -> None:
    """Writes the verdicts of the row's own targets into it."""
    row.target = [target.judge(row) for target in targets if target.id == row.id]
    row.met = all(verdict["met"] for verdict in row.target) if row.target else None


def unknown(targets: Iterable[Target], ids: Iterable[str]) -> list[str]:
    """Row ids that the contract names and no benchmark produces."""
    known = set(ids)
    return sorted({target.id for target in targets} - known)
