"""The attention operators on a CUDA device.

A few queries against a cache go to the decode kernel of ``kernels/cuda``, where this installation
has it; everything else to the Triton kernels. `torch_op` imports this module when the first CUDA
tensor arrives.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

from torch import Tensor

from quernstone.attention import cuda_decode


@functools.cache
def _triton_op() -> ModuleType:
    try:
        return importlib.import_module("quernstone.attention.triton_op")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            "triton: not installed, expected for attention on a CUDA device; "
            "install it with: pip install triton"
        ) from error


def sink_attention(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    if cuda_decode.supports(q, k):
        return cuda_decode.decode(q, k, v, *others)[0]
    out: Tensor = _triton_op().sink_attention(q, k, v, *others)
    return out


def sink_attention_aux(
    q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if cuda_decode.supports(q, k):
        out, lse, importance = functools.partial(cuda_decode.decode, aux=True)(q, k, v, *others)
        assert lse is not None
        assert importance is not None
        return out, lse, importance
    found: tuple[Tensor, Tensor, Tensor] = _triton_op().sink_attention_aux(q, k, v, *others)
    return found


def sink_attention_training(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _triton_op().sink_attention_training(*arguments)
    return found


def sink_attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    found = _triton_op().sink_attention_backward(*arguments)
    return found
