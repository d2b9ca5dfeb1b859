"""The table of all policies, and that the learned one learns on routers it was not set on."""

import dataclasses
import math

import pytest

from quernstone.moe.cache import POLICIES
from quernstone.moe.replay import gap_closed, replay
from quernstone.moe.study import study

from .routing import ar1_trace

TRACE = ar1_trace(1, layers=2, tokens=300, experts=16, top_k=2)


def test_a_study_has_a_row_for_each_policy_and_size() -> None:
    table = study(TRACE, [4, 8])
    assert [(row.policy, row.slots) for row in table.rows] == [
        (policy, slots) for slots in (4, 8) for policy in POLICIES
    ]
    assert [row.share for row in table.rows] == [0.25] * 8 + [0.5] * 8
    lru, belady = replay(TRACE, "lru", [4, 8]), replay(TRACE, "belady", [4, 8])
    for policy in POLICIES:
        curve = replay(TRACE, policy, [4, 8])
        closed = gap_closed(lru, belady, curve)
        for i, slots in enumerate((4, 8)):
            row = table.row(policy, slots)
            assert (row.hit_rate, row.gap_closed) == (curve.rate[i], closed[i])
    assert table.row("lru", 4).gap_closed == 0.0
    assert table.row("belady", 4).gap_closed == 1.0


def test_mrs_stands_beside_lru_and_what_the_paper_has() -> None:
    table = study(TRACE, [4])
    difference = 100 * (table.row("mrs", 4).hit_rate - table.row("lru", 4).hit_rate)
    assert table.mrs_over_lru(4) == difference
    text = table.to_text()
    assert f"MRS - LRU at 4 slots: {difference:+.1f} points" in text
    assert "HybriMoE reports for Mixtral-8x7B at 25%: +6.0 points" in text
    assert "HybriMoE reports for DeepSeek-V2-Lite at 25%: +5.0 points" in text
    assert "HybriMoE reports for Qwen2-57B-A14B at 25%: +7.8 points" in text
    assert len(text.splitlines()) == 1 + 8 + 1 + 4


def test_the_best_online_policy_does_not_know_the_future() -> None:
    table = study(TRACE, [4])
    best = table.best_online(4)
    assert best.policy != "belady"
    assert best.hit_rate == max(r.hit_rate for r in table.rows if r.policy != "belady")


def test_without_scores_two_policies_are_left_out_and_named() -> None:
    table = study(dataclasses.replace(TRACE, scores=None), [4])
    assert table.left_out == ("mrs", "reuse")
    assert len(table.rows) == 6
    text = table.to_text()
    assert "mrs: left out, the trace has no scores" in text
    assert "MRS - LRU" not in text
    with pytest.raises(ValueError, match="got 'mrs', 4, expected a row of the study"):
        table.row("mrs", 4)


def test_where_everything_fits_there_is_no_gap_to_close() -> None:
    table = study(TRACE, [16])
    assert math.isnan(table.row("mrs", 16).gap_closed)


@pytest.mark.parametrize(
    ("seed", "experts", "top_k", "memory", "bias"),
    [(101, 32, 4, 0.9, 0.3), (102, 64, 8, 0.85, 0.0), (103, 48, 4, 0.7, 0.8)],
)
def test_the_learned_policy_closes_a_fifth_of_the_gap_on_routers_it_was_not_set_on(
    seed: int, experts: int, top_k: int, memory: float, bias: float
) -> None:
    """Synthetic routers, and so no evidence for any model: that it learns is all this shows."""
    trace = ar1_trace(seed, tokens=3000, experts=experts, top_k=top_k, memory=memory, bias=bias)
    slots = [experts // 4, experts // 2]
    lru, belady = replay(trace, "lru", slots), replay(trace, "belady", slots)
    closed = {
        policy: gap_closed(lru, belady, replay(trace, policy, slots)) for policy in ("mrs", "reuse")
    }
    assert (closed["reuse"] > 0.2).all()
    assert (closed["reuse"] > closed["mrs"]).all()
