"""Sink attention in whole models: same logits, same text, same embeddings, less time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from quernstone.bench import machine, plots
from quernstone.bench.cases import attention_model as models
from quernstone.bench.cases.attention_model import OURS, ModelCase, Variant
from quernstone.bench.harness import Absent, Check, Measure, Pace, Rival, rows

PROMPT = "Explain in three sentences what an attention sink is in a language model."
NEW_TOKENS = 32
# The promised agreement has rows of its own. A timed model may not be wrong, and a wrong mask,
# scale or pad moves logits by whole units.
WRONG_LOGITS = 1e-2
WRONG_EMBEDDINGS = 1e-4
SLOW = Pace(seconds=20.0, least=3, most=15)
SLOW_QUICK = Pace(seconds=6.0, least=2, most=5)


@rows(ModelCase("attention.model.smollm2.logits", tokens=512, quick=True))
def bench_logits(case: ModelCase, measure: Measure) -> None:
    what = f"SmolLM2-135M, {case.tokens} tokens: largest difference of a logit from eager"
    eager, ours = _load(measure, what, "logit", models.smollm2)
    ids = models.tokens(eager[1], case.tokens)

    def difference() -> float:
        expected = models.logits(eager[0], ids)
        return models.largest_difference(models.logits(ours[0], ids), expected)

    measure.value(what=what, unit="logit", compute=difference)


@rows(ModelCase("attention.model.smollm2.text", quick=True))
def bench_text(case: ModelCase, measure: Measure) -> None:
    what = f"SmolLM2-135M: the same {NEW_TOKENS} greedy tokens as eager"
    eager, ours = _load(measure, what, "yes", models.smollm2)
    texts: list[str] = []

    def same() -> float:
        for model, tokenizer in (eager, ours):
            texts.append(models.greedy(model, tokenizer, PROMPT, NEW_TOKENS))
        return float(texts[0] == texts[1])

    row = measure.value(what=what, unit="yes", compute=same, smaller_is_better=False)
    row.notes.append(f"“{texts[1]}”")


@rows(
    *(
        ModelCase(f"attention.model.smollm2.prefill.s{tokens}.t{threads}", tokens, threads, quick)
        for tokens, threads, quick in (
            (512, 1, False),
            (512, 2, True),
            (2048, 1, False),
            (2048, 2, True),
        )
    )
)
def bench_prefill(case: ModelCase, measure: Measure) -> None:
    what = f"SmolLM2-135M, prefill of {case.tokens} tokens"
    variants = _load(measure, what, "ms", models.smollm2, ("eager", OURS, "sdpa"))
    ids = models.tokens(variants[0][1], case.tokens)
    expected = models.prefill(variants[0][0], ids)
    check = Check(lambda logits: models.largest_difference(logits, expected), WRONG_LOGITS)
    _beside(measure, what, variants, lambda model: models.prefill(model, ids), check)


@rows(ModelCase("attention.model.smollm2.heads", tokens=256, quick=True))
def bench_heads(case: ModelCase, measure: Measure) -> None:
    """The head report of the main job, which goes into the page."""
    what = "SmolLM2-135M: share of the heads that rest on the first token"
    _, (model, tokenizer) = _load(measure, what, "%", models.smollm2)
    from quernstone.attention import head_report

    found: list[Any] = []

    def sink_rate() -> float:
        found.append(head_report(model, {"input_ids": models.tokens(tokenizer, case.tokens)}))
        return 100.0 * float(found[-1].sink_rate)

    row = measure.value(what=what, unit="%", compute=sink_rate)
    report = found[0]
    layers, heads = report.importance.shape
    row.notes.append(f"a head counts with mean attention above {report.sink_epsilon:g} to it")
    row.notes.append(
        f"mean CV of importance over the heads of a layer {report.cv.mean():.2f}, "
        f"{len(report.dead_heads)} of {layers * heads} heads below {report.dead_below:g}"
    )
    measure.panel(
        "Which heads of SmolLM2-135M work",
        plots.svg(report.figure(), "heads"),
        f"Importance of a head: its mean gate over {case.tokens} tokens of real text, summed in "
        "the attention kernel. A dark head rests on the first token. Below, what the loss gains "
        f"when heads are silenced. {row.notes[-1].capitalize()}.",
    )


@rows(ModelCase("attention.model.minilm.embeddings", quick=True))
def bench_embeddings(case: ModelCase, measure: Measure) -> None:
    what = f"MiniLM, {models.SENTENCES} sentences: largest difference of an embedding from eager"
    eager, ours = _load(measure, what, "component", models.minilm)
    batch = models.sentence_batch(eager[1])

    def difference() -> float:
        expected = models.embeddings(eager[0], batch)
        return models.largest_difference(models.embeddings(ours[0], batch), expected)

    measure.value(what=what, unit="component", compute=difference)


@rows(
    ModelCase("attention.model.minilm.batch32.t1", threads=1),
    ModelCase("attention.model.minilm.batch32.t2", threads=2, quick=True),
)
def bench_minilm(case: ModelCase, measure: Measure) -> None:
    what = f"MiniLM, a padded batch of {models.SENTENCES} sentences"
    variants = _load(measure, what, "ms", models.minilm, ("eager", OURS, "sdpa"))
    batch = models.sentence_batch(variants[0][1])
    expected = models.embeddings(variants[0][0], batch)
    check = Check(lambda result: models.largest_difference(result, expected), WRONG_EMBEDDINGS)
    _beside(measure, what, variants, lambda model: models.embeddings(model, batch), check)


def _load(
    measure: Measure,
    what: str,
    unit: str,
    load: Callable[[str], Variant],
    implementations: Sequence[str] = ("eager", OURS),
) -> list[Variant]:
    try:
        return [load(name) for name in implementations]
    except ImportError as error:
        measure.absent(what=what, unit=unit, missing=Absent("not here", str(error)))


def _beside(
    measure: Measure,
    what: str,
    variants: Sequence[Variant],
    call: Callable[[Any], Any],
    check: Check,
) -> None:
    (eager, _), (ours, _), (sdpa, _) = variants
    versions = machine.versions(("transformers",))
    measure.speed(
        what=what,
        ours=lambda: call(ours),
        check=check,
        rivals=[
            Rival("transformers eager", lambda: call(eager), check, versions),
            Rival("transformers sdpa", lambda: call(sdpa), check, versions),
        ],
        pace=SLOW_QUICK if measure.quick else SLOW,
        patience=math.inf,
    )
