"""Sink attention in whole models: same logits, same text, same embeddings, less time."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from quernstone.bench import machine
from quernstone.bench.cases import attention_model as models
from quernstone.bench.cases.attention_model import OURS, ModelCase
from quernstone.bench.harness import Absent, Check, Measure, Pace, Rival, rows

PROMPT = "Explain in three sentences what an attention sink is in a language model."
NEW_TOKENS = 48
# The promised agreement has rows of its own. A timed model may not be wrong, and a wrong mask,
# scale or pad moves logits by whole units.
WRONG_LOGITS = 1e-2
WRONG_EMBEDDINGS = 1e-4
SLOW = Pace(seconds=20.0, least=3, most=15)
SLOW_QUICK = Pace(seconds=6.0, least=2, most=5)


@rows(ModelCase("attention.model.smollm2.logits", tokens=512, quick=True))
def bench_logits(case: ModelCase, measure: Measure) -> None:
    what = f"SmolLM2-135M, {case.tokens} tokens: largest difference of a logit from eager"
    eager, ours = models.smollm2("eager"), models.smollm2(OURS)
    if isinstance(eager, Absent) or isinstance(ours, Absent):
        return _missing(measure, what, "logit", eager, ours)
    ids = models.tokens(eager[1], case.tokens)

    def difference() -> float:
        expected = models.logits(eager[0], ids)
        return models.largest_difference(models.logits(ours[0], ids), expected)

    measure.value(what=what, unit="logit", compute=difference)


@rows(ModelCase("attention.model.smollm2.text", quick=True))
def bench_text(case: ModelCase, measure: Measure) -> None:
    what = f"SmolLM2-135M: the same {NEW_TOKENS} greedy tokens as eager"
    eager, ours = models.smollm2("eager"), models.smollm2(OURS)
    if isinstance(eager, Absent) or isinstance(ours, Absent):
        return _missing(measure, what, "yes", eager, ours)
    texts: list[str] = []

    def same() -> float:
        texts.extend(
            models.greedy(model, tokenizer, PROMPT, NEW_TOKENS) for model, tokenizer in (eager, ours)
        )
        return float(texts[0] == texts[1])

    row = measure.value(what=what, unit="yes", compute=same, smaller_is_better=False)
    row.notes.append(texts[1])


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
    variants = {name: models.smollm2(name) for name in (OURS, "eager", "sdpa")}
    missing = [variant for variant in variants.values() if isinstance(variant, Absent)]
    if missing:
        return _missing(measure, what, "ms", *missing)
    ids = models.tokens(variants["eager"][1], case.tokens)
    expected = models.prefill(variants["eager"][0], ids)
    check = Check(
        lambda logits: models.largest_difference(logits, expected), WRONG_LOGITS
    )
    _beside(measure, what, lambda name: lambda: models.prefill(variants[name][0], ids), check)


@rows(ModelCase("attention.model.minilm.embeddings", quick=True))
def bench_embeddings(case: ModelCase, measure: Measure) -> None:
    what = f"MiniLM, {models.SENTENCES} sentences: largest difference of an embedding from eager"
    eager, ours = models.minilm("eager"), models.minilm(OURS)
    if isinstance(eager, Absent) or isinstance(ours, Absent):
        return _missing(measure, what, "component", eager, ours)
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
    variants = {name: models.minilm(name) for name in (OURS, "eager", "sdpa")}
    missing = [variant for variant in variants.values() if isinstance(variant, Absent)]
    if missing:
        return _missing(measure, what, "ms", *missing)
    batch = models.sentence_batch(variants["eager"][1])
    expected = models.embeddings(variants["eager"][0], batch)
    check = Check(
        lambda result: models.largest_difference(result, expected), WRONG_EMBEDDINGS
    )
    _beside(measure, what, lambda name: lambda: models.embeddings(variants[name][0], batch), check)


def _beside(
    measure: Measure, what: str, call: Callable[[str], Callable[[], Any]], check: Check
) -> None:
    versions = machine.versions(("transformers",))
    measure.speed(
        what=what,
        ours=call(OURS),
        check=check,
        rivals=[Rival(name, call(name), check, versions) for name in ("eager", "sdpa")],
        pace=SLOW_QUICK if measure.quick else SLOW,
    )


def _missing(measure: Measure, what: str, unit: str, *variants: Any) -> None:
    for variant in variants:
        if isinstance(variant, Absent):
            measure.absent(what=what, unit=unit, missing=variant)
