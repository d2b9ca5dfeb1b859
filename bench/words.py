"""Figures as people read them."""

from __future__ import annotations

from typing import Any

from quernstone.bench.rows import RivalResult, Row


def number(value: float | None) -> str:
    """Three significant digits; powers of ten where zeros would hide them."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    if size >= 100:
        return f"{value:,.0f}"
    if size < 1:
        return f"{value:.3g}"
    return f"{value:.{2 if size < 10 else 1}f}"


def figure(value: float | None, unit: str) -> str:
    """A number with its unit; a share of a percent matters where a ratio is near 1."""
    if value is None:
        return "–"
    if unit == "yes":
        return "yes" if value >= 1 else "no"
    if unit == "x":
        return f"{value:.3f}×"
    if unit in ("relative", "logit", "component"):
        return number(value)
    return f"{number(value)} {unit.replace('us', 'µs')}"


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} %"


def nearest_rival(row: Row) -> tuple[str, RivalResult] | None:
    """The rival that comes closest to ours, or beats it."""
    timed = [(name, rival) for name, rival in row.rivals.items() if rival.ratio is not None]
    return min(timed, key=lambda pair: pair[1].ratio or 0.0) if timed else None


def verdict(target: dict[str, Any]) -> str:
    """`80.1 %, promised >= 80 %: met by 0.1 %`"""
    unit = {"percent_of_limit": " %", "ratio": "×", "ratio_of_p20": "×"}.get(
        target["measure"].split(" ")[0], ""
    )
    asked = f"{target['comparison']} {target['value']:g}{unit}"
    if target["got"] is None:
        return f"not measured, promised {asked}"
    got = f"{number(target['got'])}{unit}"
    if unit == "" and 0.5 < target["got"] < 2:
        got = f"{target['got']:.4f}"
    how = "met" if target["met"] else "missed"
    margin = target["margin"]
    by = f" by {abs(margin):.1f} %" if margin is not None else ""
    return f"{got}, promised {asked}: {how}{by}"
