"""What has been found so far: one JSON line for each finished part of the study."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = ("part", "setting", "corpus", "result")


class BadLedger(ValueError):
    """A line of the results is no row of the study."""


@dataclass(frozen=True)
class Ledger:
    """Rows in the order in which their parts ended; of a part, the last row counts."""

    path: Path

    def rows(self) -> list[dict[str, Any]]:
        """All rows.

        Raises:
            BadLedger: names the line that is cut off or is no row of the study.
        """
        if not self.path.exists():
            return []
        found = []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadLedger(self._words(number, f"{error}")) from None
            missing = [key for key in KEYS if not isinstance(row, dict) or key not in row]
            if missing:
                raise BadLedger(self._words(number, f"without {', '.join(missing)}"))
            found.append(row)
        return found

    def by_part(self) -> dict[str, dict[str, Any]]:
        return {row["part"]: row for row in self.rows()}

    def finished(self, part: str, setting: Mapping[str, Any], corpus: str) -> dict[str, Any] | None:
        """The row of a part with the same setting and the same text, where it is on record."""
        row = self.by_part().get(part)
        same = row is not None and row["setting"] == json.loads(json.dumps(dict(setting)))
        return row if same and row is not None and row["corpus"]["sha256"] == corpus else None

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row in a single write: a run that is killed leaves whole lines."""
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise BadLedger(f"row: got one without {', '.join(missing)}, expected {KEYS}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _words(self, number: int, what: str) -> str:
        return (
            f"{self.path.name}, line {number}: got a line that is no row of the study ({what}), "
            "expected JSON; remove the line, its part is then run again"
        )
