"""The rows of the study condensed: means and standard deviations over seeds, never the best run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quernstone.bench.study.ledger import Ledger
from quernstone.bench.study.parts import (
    FEW_SEEDS,
    FINE,
    FINE_KIND,
    KINDS,
    OPTIONS,
    OPTIONS_KIND,
    Part,
    plan,
)

RECORDED = Path(__file__).with_name("recorded.json")
"""The summary that travels with the package: the rows themselves stay in the repository."""

LOSS_WITHIN_SD = 1.0
CV_AT_MOST = 0.5
# A head below this before fine-tuning counts as collapsed.
COLLAPSED_BELOW = 0.5

Rows = Mapping[str, Mapping[str, Any]]


class BadSummary(ValueError):
    """recorded.json is no summary of the study."""


def summarise(ledger: Ledger, corpus: str, parts: Sequence[Part] | None = None) -> dict[str, Any]:
    """Of the rows that belong to the planned parts, with their settings and this text."""
    parts = plan() if parts is None else parts
    rows = {}
    for part in parts:
        row = ledger.finished(part.name, part.setting, corpus)
        if row is not None:
            rows[part.name] = row
    results = {name: row["result"] for name, row in rows.items()}
    found: dict[str, Any] = {
        "parts": [len(rows), len(parts)],
        "corpus": next((row["corpus"] for row in rows.values()), None),
        "commits": sorted({str(row.get("commit", "")) for row in rows.values()}),
        "versions": next((row.get("versions") for row in rows.values()), None),
        "kinds": {kind: _kind(results, kind) for kind in KINDS if _runs(results, kind, "plain")},
        "options": _options(results),
        "finetune": _finetune(results),
        "smollm2": _smollm2(results),
    }
    return found


def _runs(results: Rows, *words: str) -> dict[int, Mapping[str, Any]]:
    """By seed, the results of tinylm's parts under a name."""
    start = "/".join(("tinylm", *words, "seed"))
    return {
        int(name.removeprefix(start)): result
        for name, result in results.items()
        if name.startswith(start)
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation over runs (n - 1) and their number."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}


def _figures(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    values = list(runs.values())
    return {
        "bits": spread([run["bits_per_byte"] for run in values]),
        "cv": spread([run["cv"] for run in values]),
        "gate": spread([run["gate"] for run in values]),
        "lowest_gate": spread([float(np.min(run["importance"])) for run in values]),
        "dead_heads": spread([len(run["heads"]["dead_heads"]) for run in values]),
        "without_dead_heads": spread([run["heads"]["without_dead_heads"] for run in values]),
        "sink_rate": spread([run["heads"]["sink_rate"] for run in values]),
        "shares": values[0]["heads"]["shares"],
        "least_important": _over_runs([run["heads"]["least_important"] for run in values]),
        "random": _over_runs([run["heads"]["random"] for run in values]),
    }


def _over_runs(curves: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    table = np.array(curves)
    sd = table.std(0, ddof=1) if len(table) > 1 else np.full(table.shape[1], math.nan)
    return {"mean": _short(table.mean(0)), "sd": _short(sd)}


def _short(values: Any) -> list[float]:
    return [round(float(x), 6) for x in values]


def _kind(results: Rows, kind: str) -> dict[str, Any]:
    plain, balance = _runs(results, kind, "plain"), _runs(results, kind, "balance")
    found: dict[str, Any] = {}
    for name, runs in (("plain", plain), ("balance", balance)):
        if runs:
            curves = [run["curve"] for run in runs.values()]
            first = runs[min(runs)]
            found[name] = {
                **_figures(runs),
                "curve": {
                    "step": [point[0] for point in curves[0]],
                    "cv": _over_runs([[point[2] for point in curve] for curve in curves]),
                },
                "gates": _short(np.mean([run["gates"] for run in runs.values()], axis=0)),
                "importance": first["importance"],
                "seed": min(runs),
            }
    if balance:
        found["paired"] = _paired(plain, balance)
        found["verdict"] = _verdict(found, kind)
    return found


def _paired(
    base: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Differences of runs with the same seed: the same first weights and the same batches."""
    seeds = sorted(base.keys() & other.keys())
    if not seeds:
        return {}
    bits = [other[s]["bits_per_byte"] - base[s]["bits_per_byte"] for s in seeds]
    ratios = [other[s]["cv"] / base[s]["cv"] for s in seeds]
    gates = [other[s]["gate"] - base[s]["gate"] for s in seeds]
    return {"bits": spread(bits), "cv_ratio": spread(ratios), "gate": spread(gates)}


def _verdict(found: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What the study is held to; the CV of vanilla attention is reported as found."""
    plain, balance = found["plain"], found["balance"]
    worse = balance["bits"]["mean"] - plain["bits"]["mean"]
    in_sd = worse / plain["bits"]["sd"] if plain["bits"]["sd"] > 0 else math.nan
    ratio = balance["cv"]["mean"] / plain["cv"]["mean"]
    return {
        "loss_in_sd": in_sd,
        "loss_met": in_sd <= LOSS_WITHIN_SD,
        "cv_ratio": ratio,
        "cv_met": None if kind == "vanilla" else ratio <= CV_AT_MOST,
    }


def _options(results: Rows) -> dict[str, Any]:
    plain = _runs(results, OPTIONS_KIND, "plain")
    default = _runs(results, OPTIONS_KIND, "balance")
    found = {}
    for name in OPTIONS:
        runs = _runs(results, "options", name)
        if runs:
            found[name] = {**_figures(runs), "paired": _paired(plain, runs)}
    same = {seed: run for seed, run in default.items() if seed in FEW_SEEDS}
    if found and same:
        found = {"default": {**_figures(same), "paired": _paired(plain, same)}, **found}
    return {"kind": OPTIONS_KIND, "runs": found} if found else {}


def _finetune(results: Rows) -> dict[str, Any]:
    runs = {name: _runs(results, "finetune", name) for name in FINE}
    if not runs["plain"]:
        return {}
    before = _runs(results, FINE_KIND, "plain")
    before = {seed: run for seed, run in before.items() if seed in runs["plain"]}
    found = {"before": _figures(before)} if before else {}
    for name, of in runs.items():
        if of:
            found[name] = {**_figures(of), "paired": _paired(runs["plain"], of)}
    return {"kind": FINE_KIND, "runs": found}


def _smollm2(results: Rows) -> dict[str, Any]:
    before = results.get("smollm2/before")
    if before is None:
        return {}
    found = {"before": dict(before)}
    for name in FINE:
        after = results.get(f"smollm2/finetune/{name}")
        if after is not None:
            found[name] = {**after, "pinning": _pinning(before, after)}
    return found


def _pinning(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """How far collapsed heads rose and the others did: the question of head pinning."""
    old, new = np.array(before["importance"]), np.array(after["importance"])
    low = old < COLLAPSED_BELOW
    change = new - old
    return {
        "collapsed": int(low.sum()),
        "collapsed_rise": float(change[low].mean()) if low.any() else math.nan,
        "others_rise": float(change[~low].mean()) if (~low).any() else math.nan,
    }


def write(summary: Mapping[str, Any], path: Path = RECORDED) -> None:
    # JSON has no NaN; a spread of one run has no standard deviation.
    path.write_text(json.dumps(_without_nan(summary), indent=1) + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path = RECORDED) -> dict[str, Any]:
    """What was recorded.

    Raises:
        BadSummary: the file is missing, cut off or of another shape.
    """
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        summary["kinds"], summary["smollm2"], summary["parts"]
    except FileNotFoundError:
        raise BadSummary(
            f"{path.name}: not here; python -m quernstone.bench.study writes it"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadSummary(
            f"{path.name}: got a file that cannot be read ({type(error).__name__}), expected a "
            "summary of the study; python -m quernstone.bench.study --export writes it anew"
        ) from None
    return dict(summary)
