"""The Hamming regulariser beside torch.compile and the memory's limit, and MiniLM trained by it."""

from __future__ import annotations

from quernstone.bench import limits
from quernstone.bench.cases import pim_lhr as cases
from quernstone.bench.cases.pim_lhr import Layer, SpeedCase, Tuned
from quernstone.bench.harness import Absent, Check, Measure, Named, Rival, distance, rows
from quernstone.bench.rivals import pim_lhr as rivals
from quernstone.bench.rows import Spread
from quernstone.pim import hamming_regulariser_into

FACTOR = 1e-3
BYTES = 12
"""A weight read for the value, read for the gradient, and a gradient written."""
# fp32 sums in another order, slopes that are small integers.
TOLERANCE = 1e-5


@rows(
    SpeedCase("tensor", 1, quick=True),
    SpeedCase("tensor", 2, quick=True),
    SpeedCase("channel", 1),
    SpeedCase("channel", 2),
    SpeedCase("tensor", 1, bits=16),
)
def bench_regulariser(case: SpeedCase, measure: Measure) -> None:
    """Value and gradient, the gradient into memory that is there on both sides."""
    size = case.shape[0] * case.shape[1] * 4
    with limits.buffer(size, "2M") as one, limits.buffer(size, "2M") as other:
        layer = Layer(case, (one, other))
        theirs = rivals.compiled(case.bits)
        check = Check(lambda value: layer.error(float(value), FACTOR), TOLERANCE)
        with limits.copying() as limit:
            measure.speed(
                what=f"Hamming regulariser and gradient, {size / 4e6:.0f} M weights, "
                f"int{case.bits}, scales by {case.scales}",
                ours=lambda: hamming_regulariser_into(
                    *(layer.weight, layer.scales, layer.grad),
                    factor=FACTOR,
                    accumulate=False,
                    bits=case.bits,
                ),
                check=check,
                rivals=[
                    Rival(
                        "torch.compile",
                        lambda: theirs(layer.weight, layer.inverse, layer.grad, FACTOR),
                        check,
                    )
                ],
                limit=limit,
                work=BYTES * size / 4,
                notes=[
                    "weights and gradient in pages of 2 MB, the same for both",
                    f"{BYTES} bytes a weight: two readings and a writing; ours keeps slopes of a "
                    "byte in the gradient's memory instead of the second reading, 10 bytes",
                ],
            )


def _tuned(measure: Measure, what: str, unit: str) -> Tuned:
    try:
        return cases.tuned()
    except ImportError as error:
        measure.absent(what=what, unit=unit, missing=Absent("MiniLM", str(error)))


@rows(Named("pim.lhr.minilm.cut"))
def bench_minilm_cut(case: Named, measure: Measure) -> None:
    """Ones of the linear layers, int8 by channel, after fine-tuning without labels."""
    what = "MiniLM fine-tuned: ones gone, of those of plain int8 by channel"
    done = _tuned(measure, what, "%")
    report = done.report
    recipe = cases.Recipe()
    measure.value(
        what=what,
        unit="%",
        compute=lambda: 100 * report.cut,
        smaller_is_better=False,
        notes=[
            f"HR {report.before:.4f} to {report.after:.4f}, codes shifted by {recipe.shift}",
            f"{recipe.steps} steps on {done.sentences} sentences, distilled from fp32 embeddings",
        ],
    )


@rows(Named("pim.lhr.minilm.cosine"))
def bench_minilm_cosine(case: Named, measure: Measure) -> None:
    """Embeddings of that network against those in fp32, on documents that training did not see."""
    what = "MiniLM fine-tuned: cosine to the fp32 embeddings of held-out sentences"
    done = _tuned(measure, what, "cosine")
    measure.value(
        what=what,
        unit="cosine",
        compute=lambda: _mean(done),
        smaller_is_better=False,
        rivals={"rounded, not trained": float(done.untrained.mean())},
        notes=[
            f"least {float(done.cosines.min()):.4f} of {len(done.cosines)}",
            f"validation sentences, which the price of a one was chosen with: "
            f"{float(done.validation.mean()):.4f}",
        ],
    )


@rows(Named("pim.lhr.minilm.price"))
def bench_minilm_price(case: Named, measure: Measure) -> None:
    """Chooses the recipe again, with sentences that neither training nor `cosine` sees."""
    what = "MiniLM fine-tuned: distance of its price of a one from that of validation sentences"
    _tuned(measure, what, "price")
    measure.value(
        what=what,
        unit="price",
        compute=lambda: distance(cases.chosen_price(), cases.Recipe().price),
        notes=[f"of {cases.PRICES}; enough: a cosine of {cases.WANTED} on validation sentences"],
    )


def _mean(done: Tuned) -> Spread:
    whole = Spread.of(done.cosines.tolist())
    return Spread(float(done.cosines.mean()), whole.p20, whole.p80)
