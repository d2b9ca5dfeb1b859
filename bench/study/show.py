"""`--quick`: the committed models measured now, what was recorded beside them."""

from __future__ import annotations

from collections.abc import Callable

from quernstone.bench.study import quick as committed
from quernstone.bench.study import summary, words
from quernstone.bench.study.export import LOSSES
from quernstone.bench.study.parts import KINDS


def quick(say: Callable[[str], None]) -> None:
    """Prints a line for each committed model, then the record."""
    warnings = []
    for kind in KINDS:
        for loss in LOSSES:
            try:
                found = committed.measure(kind, loss)
            except FileNotFoundError:
                say(f"measured  {kind}, {loss}: no checkpoint here")
                continue
            say(
                f"measured  {kind}, {loss}: {found.bits_per_byte:.4f} bits per byte, "
                f"CV {found.cv:.3f}, mean gate {found.gate:.2f}, "
                f"{len(found.heads['dead_heads'])} dead heads, zeroing them costs "
                f"{found.heads['without_dead_heads']:+.3f} nats"
            )
            if found.other_text and found.other_text not in warnings:
                warnings.append(found.other_text)
    for line in [*(f"warning: {text}" for text in warnings), *words.summary_lines(summary.read())]:
        say(line)
