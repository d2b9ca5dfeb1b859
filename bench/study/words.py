"""The study in lines: what `--quick` prints and what the page says under the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Any]


def spread(of: Figures, digits: int = 4) -> str:
    """`2.1234 ± 0.0021`; a single run has no spread."""
    sd = of["sd"]
    return f"{of['mean']:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def kind_line(kind: str, found: Figures) -> str:
    """Loss and CV with and without the loss, and what the verdict is."""
    plain, balance = found.get("plain"), found.get("balance")
    if not plain or not balance or not found["paired"]:
        return f"{kind}: not all runs are on record"
    paired, verdict = found["paired"], found["verdict"]
    line = (
        f"{kind}: {spread(plain['bits'])} bits per byte, with the balance loss "
        f"{spread(balance['bits'])} (same seed: {paired['bits']['mean']:+.4f}"
        f"{_sd(paired['bits'])}); CV {spread(plain['cv'], 3)} to {spread(balance['cv'], 3)}, "
        f"mean gate {plain['gate']['mean']:.2f} to {balance['gate']['mean']:.2f}; "
        f"{plain['bits']['n']} seeds"
    )
    if verdict["loss_in_sd"] is None:
        return line
    line += f". Loss {'within one sd' if verdict['loss_met'] else 'worse by more than one sd'}"
    halved = verdict["cv_ratio"] <= 0.5
    return line + f", CV {'at least halved' if halved else 'not halved'}"


def _sd(of: Figures) -> str:
    return "" if of["sd"] is None else f" ± {of['sd']:.4f}"


def dead_line(kind: str, found: Figures) -> str:
    """Dead heads with and without the loss, and the cost of zeroing them."""
    parts = []
    for name, words in (("plain", "without"), ("balance", "with")):
        figures = found.get(name)
        if figures:
            parts.append(
                f"{words} the loss {figures['dead_heads']['mean']:.1f} dead heads, zeroing them "
                f"costs {figures['without_dead_heads']['mean']:+.3f} nats"
            )
    return f"{kind}: " + "; ".join(parts)


def run_line(name: str, run: Figures) -> str:
    """A row of the options or of the fine-tuning of tinylm."""
    paired = run.get("paired") or {}
    tail = f" ({paired['bits']['mean']:+.4f} to plain, same seed)" if paired else ""
    return (
        f"{name}: {spread(run['bits'])} bits per byte{tail}, CV {spread(run['cv'], 3)}, "
        f"mean gate {run['gate']['mean']:.2f}"
    )


def smollm2_line(name: str, run: Figures) -> str:
    line = f"{name}: {run['bits_per_byte']:.4f} bits per byte, CV {run['cv']:.3f}, mean gate "
    line += f"{run['gate']:.3f}, sink rate {run['heads']['sink_rate']:.0%}"
    pinning = run.get("pinning")
    if pinning and pinning["collapsed"]:
        line += (
            f"; gates of the {pinning['collapsed']} collapsed heads "
            f"{pinning['collapsed_rise']:+.3f}, of the others {pinning['others_rise']:+.3f}"
        )
    return line


def drain_line(run: Figures) -> str:
    """What the value of the first token is worth."""
    drain = run["drain"]
    ratios = [ratio for layer in drain["norm"] for ratio in layer]
    small = sum(ratio < 0.5 for ratio in ratios)
    return (
        f"the first token's value is below half the others' norm in {small} of {len(ratios)} key "
        f"heads; without it the loss is {drain['without_first']:+.4f} nats, without another "
        f"token's {drain['without_other']:+.4f}"
    )


def summary_lines(summary: Figures) -> list[str]:
    """Everything that is on record, marked as recorded."""
    done, planned = summary["parts"]
    lines = [f"recorded: {done} of {planned} parts, {_text(summary['corpus'])}"]
    for kind, found in summary["kinds"].items():
        lines += [f"recorded  {kind_line(kind, found)}", f"recorded  {dead_line(kind, found)}"]
    for title in ("options", "finetune"):
        group = summary[title]
        for name, run in (group.get("runs") or {}).items():
            lines.append(f"recorded  {title} ({group['kind']}) {run_line(name, run)}")
    for name, run in summary["smollm2"].items():
        lines.append(f"recorded  SmolLM2-135M {smollm2_line(name, run)}")
        if name == "before":
            lines.append(f"recorded  SmolLM2-135M {drain_line(run)}")
    return lines


def _text(corpus: Figures | None) -> str:
    if not corpus:
        return "no text"
    return f"documentation of Python {corpus['python']} ({corpus['sha256'][:12]})"
