"""The training study: committed models measured again, and what was recorded of the long runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quernstone.bench.harness import Absent, Measure, Named, rows
from quernstone.bench.study import panels, quick, summary, words
from quernstone.bench.study.parts import KINDS
from quernstone.bench.tinylm.checkpoint import BadCheckpoint
from quernstone.bench.tinylm.corpus import NoText

RUN = "python -m quernstone.bench.study"


@rows(
    *(
        Named(f"attention.study.tinylm.{kind}.{loss}", quick=True)
        for kind in KINDS
        for loss in ("plain", "balance")
    )
)
def bench_tinylm(case: Named, measure: Measure) -> None:
    kind, loss = case.id.split(".")[-2:]
    with_loss = "with" if loss == "balance" else "without"
    what = f"tinylm, {kind}, trained {with_loss} the balance loss: held-out bits per byte"
    try:
        found = quick.measure(kind, loss)
    except (FileNotFoundError, BadCheckpoint, NoText) as error:
        measure.absent(what=what, unit="bits", missing=Absent("checkpoint", str(error)))
    row = measure.value(what=what, unit="bits", compute=lambda: found.bits_per_byte)
    row.notes.append(f"CV of importance {found.cv:.3f}, mean gate {found.gate:.2f}")
    row.notes.append(
        f"{len(found.heads['dead_heads'])} dead heads; zeroing them costs "
        f"{found.heads['without_dead_heads']:+.3f} nats"
    )
    row.notes.append(f"seed {found.meta['seed']}; {found.meta['command']}")
    if found.other_text:
        row.notes.append(f"warning: {found.other_text}")


@rows(*(Named(f"attention.study.{kind}.loss", quick=True) for kind in KINDS))
def bench_loss(case: Named, measure: Measure) -> None:
    """The first of the two things that the balance loss is held to."""
    kind = case.id.split(".")[2]
    what = f"{kind}: held-out loss with the balance loss above that without, in sd over seeds"
    found = _verdict(kind, "loss_in_sd", measure, what, "sd")
    row = measure.value(
        what=what, unit="sd", compute=lambda: found["verdict"]["loss_in_sd"], kind="recorded"
    )
    row.notes.append(words.kind_line(kind, found))


@rows(*(Named(f"attention.study.{kind}.cv", quick=True) for kind in KINDS))
def bench_cv(case: Named, measure: Measure) -> None:
    """The second: vanilla attention is reported and held to nothing."""
    kind = case.id.split(".")[2]
    what = f"{kind}: CV of importance with the balance loss over that without"
    found = _verdict(kind, "cv_ratio", measure, what, "x")
    row = measure.value(
        what=what, unit="x", compute=lambda: found["verdict"]["cv_ratio"], kind="recorded"
    )
    row.notes.append(words.dead_line(kind, found))
    if kind == KINDS[-1]:
        for panel in panels.panels(summary.read()):
            measure.panel(*panel)


@rows(
    *(
        Named(f"attention.study.smollm2.{name}", quick=True)
        for name in ("before", "plain", "balance", "shared")
    )
)
def bench_smollm2(case: Named, measure: Measure) -> None:
    name = case.id.split(".")[-1]
    how = {"before": "as it comes", "plain": "fine-tuned with the plain loss"}.get(
        name, "fine-tuned with the balance loss" + (", shared heads" if name == "shared" else "")
    )
    what = f"SmolLM2-135M, {how}: held-out bits per byte"
    run = _recorded(measure, what, "bits")["smollm2"].get(name)
    if run is None:
        measure.absent(what=what, unit="bits", missing=_missing())
    row = measure.value(
        what=what, unit="bits", compute=lambda: run["bits_per_byte"], kind="recorded"
    )
    row.notes.append(words.smollm2_line(name, run))
    if name == "before":
        row.notes.append(words.drain_line(run))


def _missing() -> Absent:
    return Absent("not on record", RUN)


def _recorded(measure: Measure, what: str, unit: str) -> Mapping[str, Any]:
    try:
        return summary.read()
    except summary.BadSummary as error:
        measure.absent(what=what, unit=unit, missing=Absent("record", str(error)))


def _verdict(kind: str, figure: str, measure: Measure, what: str, unit: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = _recorded(measure, what, unit)["kinds"].get(kind, {})
    if found.get("verdict", {}).get(figure) is None:
        measure.absent(what=what, unit=unit, missing=_missing())
    return found
