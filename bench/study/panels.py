"""The study's part of the page: title, figure as an <svg> element, caption."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quernstone.bench import plots
from quernstone.bench.study import figures, words

NOT_A_REPLICATION = (
    "A small model on a small text: it shows what the loss does at this size, and is no "
    "replication of the scores of arXiv 2602.01203."
)


def panels(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Every figure that the record has rows for."""
    kinds, smollm2 = summary["kinds"], summary["smollm2"]
    lines = " ".join(f"{words.kind_line(kind, found)}." for kind, found in kinds.items())
    dead = " ".join(f"{words.dead_line(kind, found)}." for kind, found in kinds.items())
    drain = f"{words.drain_line(smollm2['before']).capitalize()}." if smollm2 else ""
    tuned = " ".join(f"{words.smollm2_line(name, run)}." for name, run in smollm2.items())
    drawn = (
        ("cv", "Balance of heads over training, recorded", figures.cv_curves,
         f"Mean over seeds, shaded by one sd. {lines} {NOT_A_REPLICATION}"),
        ("maps", "Importance without and with the loss, recorded", figures.importance,
         "tinylm, one seed of each kind, on held-out text."),
        ("ablation", "What zeroing heads costs, recorded", figures.ablation, dead),
        ("gates", "Distribution of the gates, recorded", figures.gates,
         "All layers, heads and tokens of held-out text; a logarithmic scale."),
        ("smollm2", "SmolLM2-135M fine-tuned, recorded", figures.smollm2_importance, tuned),
        ("drain", "Value drain of the first token, recorded", figures.value_drain, drain),
    )  # fmt: skip
    for name, title, draw, caption in drawn:
        figure = draw(summary)
        if figure is not None:
            yield title, plots.svg(figure, f"study-{name}"), caption
