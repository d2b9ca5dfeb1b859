"""The grouped Triton kernels in Triton's interpreter, on CPU tensors, in processes of their own.

Whether kernels are interpreted is settled when they are imported, and the rest of the tests must
not notice.
"""

import os

import torch
from torch import Tensor

from tests.moe.device_cases import Call, DeviceCase


def begin() -> None:
    """Makes this process one that interprets."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from quernstone.moe import triton_experts

    # The interpreter multiplies the bits of bf16 numbers: there, products take fp32 copies.
    triton_experts.DOT_IN_FP32 = True


def results(case: DeviceCase, *blocks: int) -> tuple[Tensor, Tensor]:
    """What the kernels make of a case with tokens in bf16, and what it should be in fp64."""
    call = case.make()
    x = call.x.bfloat16()
    rounded = Call(call.experts, call.counts, x.float(), call.tokens)
    return _run(call, x, blocks), rounded.expected()


def alone_and_together(case: DeviceCase) -> tuple[Tensor, Tensor]:
    """The last assignment in a call of its own, and in that of the case."""
    call = case.make()
    x = call.x.bfloat16()
    together = _run(call, x, (16, 16, 32))[-1:]
    alone = Call(call.experts, (1,), call.x, call.tokens[-1:])
    offset = call.offsets[-1]
    return _run(alone, x, (16, 16, 32), [offset]), together


def what_a_nan_reaches(case: DeviceCase) -> tuple[list[bool], list[bool]]:
    """Whether each assignment's row has a NaN, and whether its token has."""
    call = case.make()
    x = call.x.bfloat16()
    x[2, -1] = float("nan")
    out = _run(call, x, (16, 16, 32))
    return out.isnan().any(1).tolist(), (call.tokens == 2).tolist()


def _run(
    call: Call, x: Tensor, blocks: tuple[int, ...], offsets: list[int] | None = None
) -> Tensor:
    from quernstone.kernels.triton.moe_configs import Config
    from quernstone.moe import triton_experts

    config = Config(*blocks, warps=4, stages=1)
    # Fresh memory is NaN under torch's deterministic algorithms.
    torch.use_deterministic_algorithms(True)
    shape, data, places, counts, rows, _ = call.arguments
    made = triton_experts.grouped_experts(
        shape, data, offsets or places, counts, rows, x, config=config
    )
    made.gate_up()
    out = made.down()
    torch.use_deterministic_algorithms(False)
    return out
