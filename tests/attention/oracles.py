"""Attention with sinks as others compute it: what our own reference is not the judge of.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def gpt_oss_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    *,
    window: int | None = None,
    attended: Tensor | None = None,
) -> Tensor:
    """Eager attention of gpt-oss in transformers under transformers' own causal mask.

    `attended` is the bool [b, s] padding mask of a tokenizer. Queries are the last t positions.
    """
    from transformers.masking_utils import (
        causal_mask_function,
        eager_mask,
        sliding_window_causal_mask_function,
    )
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    mask = eager_mask(
        batch_size=q.shape[0],
        q_length=q.shape[2],
        kv_length=k.shape[2],
        q_offset=k.shape[2] - q.shape[2],
        mask_function=rule,
        attention_mask=attended,
        dtype=q.dtype,
    )
    module = SimpleNamespace(
        num_key_value_groups=q.shape[1] // k.shape[1], sinks=sinks, training=False
    )
    out, _ = eager_attention_forward(module, q, k, v, mask, q.shape[-1] ** -0.5)
    return out.transpose(1, 2)


def onnx_runtime(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *, lengths: list[int], window: int = -1
) -> Tensor:
    """Causal GroupQueryAttention with head_sink of ONNX Runtime; t = s, right padding."""
    import onnx
    import onnxruntime

    (b, h, t, d), g = q.shape, k.shape[1]
    names = ["q", "k", "v", "past_k", "past_v", "seqlens_k", "total", "", "", "", "", "sinks"]
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=h,
        kv_num_heads=g,
        scale=d**-0.5,
        local_window_size=window,
    )
    feeds: dict[str, np.ndarray] = {
        "q": q.transpose(1, 2).reshape(b, t, h * d).numpy(),
        "k": k.transpose(1, 2).reshape(b, t, g * d).numpy(),
        "v": v.transpose(1, 2).reshape(b, t, g * d).numpy(),
        "past_k": np.zeros((b, g, 0, d), np.float32),
        "past_v": np.zeros((b, g, 0, d), np.float32),
        "seqlens_k": np.array(lengths, np.int32) - 1,
        "total": np.array(t, np.int32),
        "sinks": sinks.numpy(),
    }
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape
        )
        for name, x in feeds.items()
    ]
    outputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in node.output
    ]
    graph = onnx.helper.make_graph([node], "attention", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (out,) = session.run(["out"], feeds)
    return torch.from_numpy(out).view(b, t, h, d).transpose(1, 2)


def torch_sdpa(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """torch's scaled_dot_product_attention; a sink is one more key, with value 0 and logit s_h.

    `seen` is a bool mask that broadcasts to [b, h, t, s].
    """
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, float("-inf"))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if sinks is not None:
        b, h, t, _ = q.shape
        column = sinks.to(q.dtype).view(1, h, 1, 1).expand(b, h, t, 1)
        bias = torch.cat([bias.expand(b, h, t, -1), column], dim=-1)
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def torch_flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and fp32 log-sum-exp of torch's own flash attention for CPUs; t = s when causal."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse
