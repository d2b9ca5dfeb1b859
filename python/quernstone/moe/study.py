"""All cache policies on one trace, beside what the papers report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quernstone.moe.cache.policies import NEED_SCORES, POLICIES, Policy
from quernstone.moe.replay import HitCurve, gap_closed, replay
from quernstone.moe.trace import Trace

PAPER_MRS_OVER_LRU = {
    ("Mixtral-8x7B", 0.25): (0.362, 0.302),
    ("DeepSeek-V2-Lite", 0.25): (0.527, 0.477),
    ("Qwen2-57B-A14B", 0.25): (0.528, 0.450),
    ("Mixtral-8x7B", 0.75): (0.833, 0.806),
}
"""Hit rates of MRS and LRU that HybriMoE (arXiv 2504.05897) reports, by model and share of the
experts that fit: 5.0 to 7.8 points at a quarter. Other models, traces and slots than ours, so the
difference is to be compared and not the rates."""


class StudyRow(NamedTuple):
    policy: Policy
    slots: int
    share: float
    """Slots as a share of the experts of a layer."""
    hit_rate: float
    gap_closed: float
    """0 is LRU, 1 is the bound (Belady), below 0 is worse than LRU; NaN where the two meet."""


@dataclass(frozen=True)
class Study:
    rows: tuple[StudyRow, ...]
    """By slots, and within by policy in the order of `POLICIES`."""
    left_out: tuple[Policy, ...]
    """The policies that go by scores, where the trace has none."""

    def row(self, policy: Policy, slots: int) -> StudyRow:
        for row in self.rows:
            if (row.policy, row.slots) == (policy, slots):
                return row
        raise ValueError(f"policy, slots: got {policy!r}, {slots}, expected a row of the study")

    def mrs_over_lru(self, slots: int) -> float:
        """Points of hit rate (hundredths) that MRS is above LRU."""
        return 100 * (self.row("mrs", slots).hit_rate - self.row("lru", slots).hit_rate)

    def best_online(self, slots: int) -> StudyRow:
        """The row of the best policy that does not know the future."""
        rows = [row for row in self.rows if row.slots == slots and row.policy != "belady"]
        return max(rows, key=lambda row: row.hit_rate)

    def to_text(self) -> str:
        """A table, and the difference between MRS and LRU beside the paper's."""
        lines = [f"{'policy':<8}{'slots':>6}{'share':>8}{'hit rate':>10}{'gap closed':>12}"]
        lines += [
            f"{row.policy:<8}{row.slots:>6}{row.share:>8.0%}{row.hit_rate:>10.4f}"
            f"{row.gap_closed:>12.1%}"
            for row in self.rows
        ]
        if "mrs" not in self.left_out:
            lines += [
                f"MRS - LRU at {slots} slots: {self.mrs_over_lru(slots):+.1f} points"
                for slots in dict.fromkeys(row.slots for row in self.rows)
            ]
            lines += [
                f"HybriMoE reports for {model} at {share:.0%}: {100 * (mrs - lru):+.1f} points"
                for (model, share), (mrs, lru) in PAPER_MRS_OVER_LRU.items()
            ]
        lines += [f"{policy}: left out, the trace has no scores" for policy in self.left_out]
        return "\n".join(lines)


def study(trace: Trace, sizes: Sequence[int]) -> Study:
    """Hit rate of every policy, with its defaults, for some numbers of slots of each layer.

    Args:
        trace: the routing of a model; random routing is no evidence for any policy.
        sizes: slots of each layer.

    Raises:
        ValueError: no size, or one below 0.
    """
    left_out = tuple(p for p in POLICIES if p in NEED_SCORES and trace.scores is None)
    curves: dict[Policy, HitCurve] = {
        policy: replay(trace, policy, sizes) for policy in POLICIES if policy not in left_out
    }
    lru, belady = curves["lru"], curves["belady"]
    closed = {policy: gap_closed(lru, belady, curve) for policy, curve in curves.items()}
    rows = [
        StudyRow(
            policy,
            slots,
            slots / trace.experts,
            float(curve.rate[i]),
            float(closed[policy][i]),
        )
        for i, slots in enumerate(sizes)
        for policy, curve in curves.items()
    ]
    return Study(tuple(rows), left_out)
