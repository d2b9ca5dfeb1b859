"""Mixture-of-experts inference on a CPU beside a GPU: which expert is computed where, and when."""

from quernstone.moe import reference_schedule
from quernstone.moe.schedule import (
    Kept,
    Layer,
    Policy,
    Prefetch,
    Schedule,
    cancel,
    prefetch,
    schedule_layer,
)

__all__ = [
    "Kept",
    "Layer",
    "Policy",
    "Prefetch",
    "Schedule",
    "cancel",
    "prefetch",
    "reference_schedule",
    "schedule_layer",
]
