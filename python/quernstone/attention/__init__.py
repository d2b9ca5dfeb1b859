"""Attention with sinks and gates, and what its gates say about the heads."""

from quernstone.attention import reference, schedules
from quernstone.attention.api import sink_attention
from quernstone.attention.balance import head_balance_loss, head_variation, most_important
from quernstone.attention.balancer import HeadBalancer
from quernstone.attention.hf import register_with_transformers
from quernstone.attention.modules import SinkAttention, split_gate
from quernstone.attention.report import HeadReport, head_report
from quernstone.attention.trainer import HeadBalanceMixin
from quernstone.attention.types import Aux, Kind

__all__ = [
    "Aux",
    "HeadBalanceMixin",
    "HeadBalancer",
    "HeadReport",
    "Kind",
    "SinkAttention",
    "head_balance_loss",
    "head_report",
    "head_variation",
    "most_important",
    "reference",
    "register_with_transformers",
    "schedules",
    "sink_attention",
    "split_gate",
]
