"""Attention with sinks as others offer it on the CPU.

Layouts, masks and cached constants are prepared outside the timed call; what a user has to do
with every new query, key and value is inside.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from quernstone.bench import machine
from quernstone.bench.cases.attention import TOLERANCE, AttentionCase, Inputs, relative_error
from quernstone.bench.harness import Absent, Check, Rival
from quernstone.bench.optional import get_extra

EXTRA = get_extra("attention")
EAGER = "Hugging Face eager"
FLASH = "torch flash"
ZERO_KEY = "SDPA zero key"
ONNX = "ONNX Runtime"
# A rival may be less exact than ours has to be; it may not compute something else.
SLACK = 4.0


def check(case: AttentionCase, *, plain: bool = False, slack: float = SLACK) -> Check:
    """A result of ours or of a rival against the fp64 reference."""
    return Check(
        lambda out: relative_error(out, case.expected(plain=plain)),
        slack * TOLERANCE[case.dtype],
    )


def all_of(case: AttentionCase, x: Inputs) -> list[Rival | Absent]:
    """Every rival that knows the case's type."""
    found = [flash(case, x), hugging_face_eager(case, x), zero_key(case, x)]
    if case.dtype == "fp32":
        found.append(onnx_runtime(case, x))
    return found


def flash(case: AttentionCase, x: Inputs) -> Rival:
    """torch's CPU flash attention. It has no sinks: less work than ours, held to its own result."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return Rival(
        FLASH,
        lambda: op(x.q, x.k, x.v, 0.0, case.causal)[0],
        check(case, plain=True),
        machine.versions(("torch",)),
    )


def hugging_face_eager(case: AttentionCase, x: Inputs) -> Rival | Absent:
    """gpt-oss's eager attention, the only one with sinks that transformers runs on a CPU."""
    try:
        gpt_oss = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    except ImportError as error:
        return Absent(EAGER, f"{error}; {EXTRA}")
    module = SimpleNamespace(
        num_key_value_groups=case.heads // case.kv_heads,
        sinks=x.sinks.to(x.q.dtype),
        training=False,
    )
    mask = _mask(case, x.q.dtype)
    eager = gpt_oss.eager_attention_forward

    def run() -> Tensor:
        out: Tensor = eager(module, x.q, x.k, x.v, mask, case.width**-0.5)[0]
        return out

    return Rival(EAGER, run, _transposed(check(case)), machine.versions(("transformers",)))


def zero_key(case: AttentionCase, x: Inputs) -> Rival:
    """torch's SDPA with one more key of no value, whose mask column is the sink."""
    heads, sinks = case.heads, x.sinks.to(x.q.dtype)
    column = sinks.view(1, heads, 1, 1).expand(1, heads, case.queries, 1)
    mask = _mask(case, x.q.dtype).expand(1, heads, case.queries, case.keys)
    mask = torch.cat([mask, column], dim=-1)
    groups = heads // case.kv_heads

    def run() -> Tensor:
        k, v = (torch.nn.functional.pad(tensor, (0, 0, 0, 1)) for tensor in (x.k, x.v))
        return torch.nn.functional.scaled_dot_product_attention(
            x.q, k, v, attn_mask=mask, enable_gqa=groups > 1
        )

    return Rival(ZERO_KEY, run, check(case), machine.versions(("torch",)))


def onnx_runtime(case: AttentionCase, x: Inputs) -> Rival | Absent:
    """ONNX Runtime's GroupQueryAttention with head_sink."""
    try:
        run = _onnx_session(case, x)
    except ImportError as error:
        return Absent(ONNX, f"{error}; {EXTRA}")
    expected = check(case)

    def difference(result: Any) -> float:
        flat = torch.from_numpy(result)
        shape = (case.batch, case.queries, case.heads, case.width)
        return expected.error(flat.view(shape).transpose(1, 2))

    return Rival(
        ONNX, run, Check(difference, expected.tolerance), machine.versions(("onnxruntime",))
    )


def _onnx_session(case: AttentionCase, x: Inputs) -> Callable[[], Any]:
    onnx = importlib.import_module("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    runtime = importlib.import_module("onnxruntime")
    past = (case.batch, case.kv_heads, 0, case.width)
    feeds = {
        "q": _rows_first(x.q),
        "k": _rows_first(x.k),
        "v": _rows_first(x.v),
        "past_k": torch.empty(past),
        "past_v": torch.empty(past),
        "seqlens": torch.full((case.batch,), case.keys - 1, dtype=torch.int32),
        "total": torch.tensor(case.keys, dtype=torch.int32),
        "sinks": x.sinks,
    }
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    # Inputs 8 to 11 (rotary caches, positions, bias) stay empty.
    names = [*list(feeds)[:7], "", "", "", "", "sinks"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
        scale=case.width**-0.5,
        local_window_size=-1 if case.window is None else case.window,
    )
    inputs = [
        helper.make_tensor_value_info(
            name, types.INT32 if name in ("seqlens", "total") else types.FLOAT, array.shape
        )
        for name, array in arrays.items()
    ]
    outputs = [
        helper.make_tensor_value_info(name, types.FLOAT, None)
        for name in ("out", "present_k", "present_v")
    ]
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    # Idle workers that spin would take the cores from whoever runs in the other slots.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(["out"], arrays)[0]


def _rows_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1).contiguous()


def _mask(case: AttentionCase, dtype: torch.dtype) -> Tensor:
    """[1, 1, t, s], 0 where a key is seen and -inf elsewhere."""
    position = torch.arange(case.queries).view(-1, 1) + case.keys - case.queries
    key = torch.arange(case.keys)
    seen = key <= position if case.causal else torch.ones(case.queries, case.keys).bool()
    if case.window is not None:
        seen = seen & (key > position - case.window)
    mask = torch.zeros(case.queries, case.keys, dtype=dtype).masked_fill(~seen, float("-inf"))
    return mask.view(1, 1, case.queries, case.keys)


def _transposed(inner: Check) -> Check:
    """transformers puts the heads after the tokens."""
    return Check(lambda out: inner.error(out.transpose(1, 2)), inner.tolerance)
