"""Attention with sinks as others offer it on the CPU.

Layouts, masks and cached constants are prepared outside the timed call; what a user has to do
with every new query, key and value is inside.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from quernstone.bench import machine
from quernstone.bench.cases.attention import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    AttentionCase,
    Inputs,
    gradient_error,
    relative_error,
    trained,
)
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


def steps(case: AttentionCase, x: Inputs) -> list[Rival | Absent]:
    """Forward and backward of the rivals that have gradients."""
    return [step(forward, case, x) for forward in (flash, hugging_face_eager, zero_key)]


def step(
    forward: Callable[[AttentionCase, Inputs], Rival | Absent], case: AttentionCase, x: Inputs
) -> Rival | Absent:
    """A rival's forward pass and the gradients of every input that it has them for."""
    plain = forward is flash
    leaves = Inputs(*(tensor.detach().clone() for tensor in x))
    wanted = trained(replace(case, kind="vanilla") if plain else case, leaves)
    rival = forward(case, leaves)
    if isinstance(rival, Absent):
        return rival
    dout = case.incoming()

    def run() -> dict[str, Tensor]:
        gradients = torch.autograd.grad(rival.run(), list(wanted.values()), dout)
        return dict(zip(wanted, gradients, strict=True))

    return replace(rival, run=run, check=gradient_check(case, plain=plain))


def gradient_check(case: AttentionCase, *, plain: bool = False, slack: float = SLACK) -> Check:
    """Gradients of ours or of a rival against the fp64 reference's."""
    return Check(
        lambda gradients: gradient_error(gradients, case.expected_gradients(plain=plain)),
        slack * GRADIENT_TOLERANCE[case.dtype],
    )


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
        training=False,
    )
    mask = _mask(case, x.q.dtype)
    eager = gpt_oss.eager_attention_forward

    def run() -> Tensor:
        module.sinks = x.sinks.to(x.q.dtype)
        out: Tensor = eager(module, x.q, x.k, x.v, mask, case.width**-0.5)[0]
        return out.transpose(1, 2)

    return Rival(EAGER, run, check(case), machine.versions(("transformers",)))


def zero_key(case: AttentionCase, x: Inputs) -> Rival:
    """torch's SDPA with one more key of no value, whose mask column is the sink."""
    groups = case.heads // case.kv_heads
    shape = (1, case.heads, case.queries, case.keys)
    seen = _mask(case, x.q.dtype).expand(shape)

    def with_sinks() -> Tensor:
        column = x.sinks.to(x.q.dtype).view(1, -1, 1, 1).expand(*shape[:3], 1)
        return torch.cat([seen, column], dim=-1)

    # Sinks that are trained are others at every step.
    mask = None if x.sinks.requires_grad else with_sinks()

    def run() -> Tensor:
        k, v = (torch.nn.functional.pad(tensor, (0, 0, 0, 1)) for tensor in (x.k, x.v))
        return torch.nn.functional.scaled_dot_product_attention(
            x.q, k, v, attn_mask=with_sinks() if mask is None else mask, enable_gqa=groups > 1
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
