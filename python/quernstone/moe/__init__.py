"""Mixture-of-experts inference on a CPU beside a GPU: the experts, and what is where, when.

`experts` computes them from packed weights, `file` keeps those; `cost` knows what one costs, and
`schedule` what is computed where; `cache` and `slots` which ones stay on the GPU, `gating` which
are not needed; `runtime` runs them, on the CPU and on one of `devices`. `routing` and `trace` know
what a model's routers choose, `replay` and `simulate` what a cache and a schedule would have made
of it.
"""

from quernstone.moe import reference, reference_schedule
from quernstone.moe.checkpoint import load_packed, pack_checkpoint
from quernstone.moe.cost import MODELS, PRESETS, CostModel, Curve, ModelShape, profile_machine
from quernstone.moe.cuda_device import CudaDevice
from quernstone.moe.devices import Device, EmulatedDevice, Work
from quernstone.moe.experts import Experts, ExpertsShape, route
from quernstone.moe.file import ExpertsWriter, Memory, load_experts, save_experts
from quernstone.moe.gating import (
    AdaptiveGating,
    drop_experts,
    layer_sensitivity,
    search_threshold,
    threshold_candidates,
)
from quernstone.moe.hf import Acceleration, Packing, accelerate
from quernstone.moe.replay import HitCurve, gap_closed, replay
from quernstone.moe.routing import moe_blocks, prediction_accuracy, record_routing
from quernstone.moe.runtime import HybridMoE, Runtime
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
from quernstone.moe.slots import LayerUse, allocate_slots, expected_loads, measured_loads
from quernstone.moe.trace import Trace

__all__ = [
    "MODELS",
    "PRESETS",
    "Acceleration",
    "AdaptiveGating",
    "CostModel",
    "CudaDevice",
    "Curve",
    "Device",
    "EmulatedDevice",
    "Experts",
    "ExpertsShape",
    "ExpertsWriter",
    "HitCurve",
    "HybridMoE",
    "Kept",
    "Layer",
    "LayerUse",
    "Memory",
    "ModelShape",
    "Packing",
    "Policy",
    "Prefetch",
    "Runtime",
    "Schedule",
    "Trace",
    "Work",
    "accelerate",
    "allocate_slots",
    "cancel",
    "drop_experts",
    "expected_loads",
    "gap_closed",
    "layer_sensitivity",
    "load_experts",
    "load_packed",
    "measured_loads",
    "moe_blocks",
    "pack_checkpoint",
    "prediction_accuracy",
    "prefetch",
    "profile_machine",
    "record_routing",
    "reference",
    "reference_schedule",
    "replay",
    "route",
    "save_experts",
    "schedule_layer",
    "search_threshold",
    "threshold_candidates",
]
