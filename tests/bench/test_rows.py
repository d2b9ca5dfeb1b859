"""The statistics of a row, and the row on its way through JSON."""

import json
import math

import numpy as np
import pytest

from quernstone.bench.rows import (
    KINDS,
    LimitResult,
    RivalResult,
    Row,
    Spread,
    quantile,
    upper_bound,
)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_quantile_agrees_with_numpy(count: int, share: float) -> None:
    sample = np.random.default_rng(count).normal(size=count).tolist()
    assert quantile(sample, share) == pytest.approx(np.quantile(sample, share))


def test_upper_bound_holds_for_a_skewed_sample() -> None:
    generator = np.random.default_rng(0)
    median = math.log(2)
    held = [upper_bound(generator.exponential(size=30).tolist()) >= median for _ in range(2000)]
    assert 0.945 < np.mean(held) < 0.99  # exact would be the next count above 0.95


def test_upper_bound_tightens_with_more_rounds() -> None:
    generator = np.random.default_rng(1)
    few, many = (generator.normal(1.0, 0.01, size=n).tolist() for n in (20, 400))
    assert 1.0 < upper_bound(many) < upper_bound(few) < 1.02


def test_upper_bound_of_too_few_rounds_is_infinite() -> None:
    assert upper_bound([1.0] * 4) == math.inf
    assert upper_bound([1.0] * 5) == 1.0


def test_one_disturbed_round_does_not_move_the_bound() -> None:
    calm = [1.0 + 0.001 * (index % 7) for index in range(60)]
    assert upper_bound([*calm[:-1], 50.0]) < 1.007


def test_row_survives_json() -> None:
    row = Row(
        "attention.x",
        "attention",
        "what",
        "ms",
        2,
        ours=1.5,
        rivals={"a": RivalResult(2.0, 1.9, 2.1, 1.3), "b": RivalResult(absent="why")},
        limit=LimitResult("torch.mm", 90.0, "GF/s"),
        target=[{"met": True}],
        met=True,
    )
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_row_has_every_field_of_the_schema() -> None:
    promised = {
        *("id", "vertical", "what", "unit", "threads", "ours", "p20", "p80", "rivals", "ratio"),
        *("limit", "percent_of_limit", "error", "kind", "target", "met", "versions"),
    }
    assert promised <= set(Row("a.b", "a", "", "ms", 1).to_json())
    assert Row("a.b", "a", "", "ms", 1).kind in KINDS


def test_spread_scales_with_its_unit() -> None:
    assert Spread.of([1.0, 2.0, 3.0]).scaled(1e3) == Spread(2000.0, 1400.0, 2600.0)
