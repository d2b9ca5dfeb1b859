"""The attention layer, against torch's own and against those of transformers."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quernstone.attention import HeadBalancer, SinkAttention, head_balance_loss, split_gate
from quernstone.attention.hf import PROBE
from quernstone.attention.hf_mask import KeyMask

from .hf_tiny import tiny
from .tolerances import U_BF16, U_FP32, relative_error

BATCH, LENGTH, WIDTH = 3, 19, 64

# A few sums of WIDTH products, in another order.
SAME = 16 * WIDTH**0.5 * U_FP32

KINDS: list[dict[str, Any]] = [
    {"kind": "sink"},
    {"kind": "vanilla"},
    {"kind": "gated"},
    {"kind": "gated", "gate": "element"},
]


def inputs(length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, length, WIDTH)


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert relative_error(got.detach(), want.detach()) <= SAME


def gradients(layer: nn.Module, out: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    (out.square().sum() / out.numel()).backward()
    return {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_vanilla_is_multihead_attention(padded: bool, causal: bool, bias: bool) -> None:
    other = nn.MultiheadAttention(WIDTH, 4, bias=bias, batch_first=True)
    layer = SinkAttention(WIDTH, 4, kind="vanilla", bias=bias, causal=causal)
    with torch.no_grad():
        for name, weight in zip("qkv", other.in_proj_weight.chunk(3), strict=True):
            getattr(layer, f"{name}_proj").weight.copy_(weight)
        layer.o_proj.weight.copy_(other.out_proj.weight)
        if bias:
            other.in_proj_bias.normal_()
            for name, weight in zip("qkv", other.in_proj_bias.chunk(3), strict=True):
                getattr(layer, f"{name}_proj").bias.copy_(weight)
            layer.o_proj.bias.copy_(other.out_proj.bias)
    x = inputs()
    lengths = torch.tensor([LENGTH, 11, 3]) if padded else None
    position = torch.arange(LENGTH)
    want, _ = other(
        *(x, x, x),
        attn_mask=position > position[:, None] if causal else None,
        key_padding_mask=None if lengths is None else position >= lengths[:, None],
    )
    got = layer(x, key_lengths=lengths)
    assert_close(got, want)
    found, wanted = gradients(layer, got), gradients(other, want)
    stacked = torch.cat([found[f"{name}_proj.weight"] for name in "qkv"])
    assert_close(stacked, wanted["in_proj_weight"])
    assert_close(found["o_proj.weight"], wanted["out_proj.weight"])


@pytest.mark.parametrize("index", [0, 1])
def test_sink_is_the_attention_of_gpt_oss(index: int) -> None:
    """One layer slides, the other does not."""
    model = tiny("gpt_oss")
    model.set_attn_implementation("eager")
    other = model.model.layers[index].self_attn
    layer = SinkAttention(
        WIDTH, 4, num_kv_heads=2, head_dim=16, bias=True, window=other.sliding_window
    )
    layer.load_state_dict(other.state_dict())
    x = inputs()
    position = torch.arange(LENGTH)
    # Its rotation has a cosine for each pair of channels.
    cos, sin = model.model.rotary_emb(x, position[None])
    hidden = position > position[:, None]
    if other.sliding_window is not None:
        hidden |= position <= position[:, None] - other.sliding_window
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(hidden, torch.finfo(torch.float32).min)
    want, _ = other(x, (cos, sin), mask[None, None])
    got = layer(x, rotary=(torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)))
    assert_close(got, want)
    found, wanted = gradients(layer, got), gradients(other, want)
    assert found.keys() == wanted.keys()
    for name in found.keys() - {"k_proj.bias"}:
        assert_close(found[name], wanted[name])


def test_gated_is_the_attention_of_qwen3_next() -> None:
    model = tiny("qwen3_next")
    model.set_attn_implementation("eager")
    other = model.model.layers[1].self_attn
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    layer = SinkAttention(WIDTH, 4, num_kv_heads=2, head_dim=16, kind="gated", gate="element")
    weights = {n: p for n, p in other.state_dict().items() if "norm" not in n}
    q, gate = split_gate(weights.pop("q_proj.weight"), **sizes, layout="qwen3_next")
    layer.load_state_dict({**weights, "q_proj.weight": q, "gate_proj.weight": gate})
    x = inputs()
    cos, sin = model.model.rotary_emb(x, torch.arange(LENGTH)[None])
    turned = cos.shape[-1]

    def normalise_and_rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        def rotate(y: Tensor) -> Tensor:
            turning, rest = y[..., :turned], y[..., turned:]
            left, right = turning.chunk(2, dim=-1)
            return torch.cat((turning * cos + torch.cat((-right, left), -1) * sin, rest), -1)

        return rotate(other.q_norm(q)), rotate(other.k_norm(k))

    position = torch.arange(LENGTH)
    hidden = position > position[:, None]
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(hidden, torch.finfo(torch.float32).min)
    want, _ = other(x, (cos, sin), mask[None, None])
    got = layer(x, rotary=normalise_and_rotate)
    assert_close(got, want)
    found, wanted = gradients(layer, got), gradients(other, want)
    for name, both in zip(
        ("q_proj", "gate_proj"),
        split_gate(wanted["q_proj.weight"], **sizes, layout="qwen3_next"),
        strict=True,
    ):
        assert_close(found[f"{name}.weight"], both)


@pytest.mark.parametrize("element", [False, True])
def test_the_gates_of_gated_attention_stand_behind_the_queries_of_a_key_head(
    element: bool,
) -> None:
    """By the published forward: view by key head, split, reshape to heads."""
    heads, groups, width = 6, 2, 16
    outputs = heads * width + heads * (width if element else 1)
    q_proj = torch.randn(outputs, WIDTH)
    x = inputs()
    per_group = (x @ q_proj.T).view(BATCH, LENGTH, groups, -1)
    ratio = heads // groups
    want_q, want_gate = per_group.split(
        [ratio * width, per_group.shape[-1] - ratio * width], dim=-1
    )
    q, gate = split_gate(
        q_proj, num_heads=heads, num_kv_heads=groups, head_dim=width, layout="gated_attention"
    )
    assert_close(x @ q.T, want_q.reshape(BATCH, LENGTH, -1))
    assert_close(x @ gate.T, want_gate.reshape(BATCH, LENGTH, -1))
    bias = torch.randn(outputs)
    for rows, cut in zip(
        split_gate(
            bias, num_heads=heads, num_kv_heads=groups, head_dim=width, layout="gated_attention"
        ),
        (q, gate),
        strict=True,
    ):
        assert rows.shape == cut.shape[:1]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_decoding_with_a_cache_gives_the_rows_of_the_whole(
    options: dict[str, Any], window: int | None
) -> None:
    layer = SinkAttention(WIDTH, 4, num_kv_heads=2, window=window, **options).eval()
    x, start = inputs(), torch.tensor([0, 4, 2])
    cos, sin = torch.randn(LENGTH, 16), torch.randn(LENGTH, 16)
    with torch.no_grad():
        want = layer(x, rotary=(cos, sin), key_start=start)
        past, rows = None, []
        for first, last in ((0, 7), (7, 8), (8, LENGTH)):
            out, past = layer(
                x[:, first:last],
                rotary=(cos[first:last], sin[first:last]),
                key_start=start,
                past=past,
                use_cache=True,
            )
            rows.append(out)
    assert_close(torch.cat(rows, dim=1), want)


def test_rotary_takes_positions_of_each_sequence() -> None:
    layer, x = SinkAttention(WIDTH, 4), inputs()
    cos, sin = torch.randn(LENGTH, 16), torch.randn(LENGTH, 16)
    want = layer(x, rotary=(cos, sin))
    assert torch.equal(
        layer(x, rotary=(cos.expand(BATCH, -1, -1), sin.expand(BATCH, -1, -1))), want
    )


@pytest.mark.parametrize("padded", ["start", "lengths", None])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_balancer_reads_its_importance(options: dict[str, Any], padded: str | None) -> None:
    model = nn.Sequential(
        SinkAttention(WIDTH, 4, **options),
        SinkAttention(WIDTH, 8, num_kv_heads=2, head_dim=16, **options),
    )
    x = inputs()
    padding = {
        "start": {"key_start": torch.tensor([0, 4, 2])},
        "lengths": {"key_lengths": torch.tensor([LENGTH, 4, 9])},
        None: {},
    }[padded]
    seen: list[Tensor] = []

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                seen.append(x)
                x = layer(x, **padding)
            return x

    whole = Padded()
    with HeadBalancer(whole, weight=1.0) as balancer:
        out = whole(x)
        loss = balancer.loss()
    assert torch.equal(out, whole(x))
    found = list(balancer.importance.values())
    assert [len(row) for row in found] == [4, 8]
    position = torch.arange(LENGTH)
    for layer, y, row in zip(model, seen, found, strict=False):
        # The same again through an input whose padding was cut off.
        total, count = torch.zeros(len(row)), 0
        for i in range(BATCH):
            first = padding["key_start"][i] if padded == "start" else 0
            last = padding["key_lengths"][i] if padded == "lengths" else LENGTH
            cut = y[i : i + 1, first:last]
            n = len(position[first:last]) - (layer.kind == "vanilla")
            with HeadBalancer(layer) as single:
                layer(cut)
                single.loss()
            total += n * single.importance[""]
            count += n
        torch.testing.assert_close(row, total / count, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, head_balance_loss(found, weight=1.0), rtol=1e-4, atol=0)


def test_padding_is_passed_to_a_probe_as_both_limits_or_none() -> None:
    layer, found = SinkAttention(WIDTH, 4), []

    def probe(_module: nn.Module, tensors: Any, _options: Any, mask: KeyMask) -> Tensor:
        found.append(mask)
        return tensors[0]

    layer.__dict__[PROBE] = probe
    layer(inputs(), key_start=torch.tensor([0, 4, 2]))
    layer(inputs(), key_lengths=torch.tensor([5, 4, 2]))
    layer(inputs())
    assert found[0].key_lengths.tolist() == [LENGTH] * 3
    assert found[1].key_start.tolist() == [0] * 3
    assert found[2].key_start is found[2].key_lengths is None


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_state_copies_and_types(options: dict[str, Any]) -> None:
    layer = SinkAttention(WIDTH, 4, num_kv_heads=2, bias=True, out_bias=False, **options)
    assert layer.o_proj.bias is None
    x = inputs()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = SinkAttention(WIDTH, 4, num_kv_heads=2, bias=True, out_bias=False, **options)
    assert not torch.equal(twin(x), layer(x))
    twin.load_state_dict(torch.load(file))
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    low = layer.to(torch.bfloat16)
    assert low(x.bfloat16()).dtype == torch.bfloat16
    meta = SinkAttention(WIDTH, 4, device="meta", dtype=torch.bfloat16, **options)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}
    names = set(layer.state_dict())
    assert ("sinks" in names) == (options["kind"] == "sink")
    assert ("gate_proj.weight" in names) == (options["kind"] == "gated")


def test_reset_draws_weights_again_and_clears_sinks() -> None:
    layer = SinkAttention(WIDTH, 4)
    before = layer.q_proj.weight.clone()
    with torch.no_grad():
        layer.sinks.fill_(3.0)
    layer.reset_parameters()
    assert not layer.sinks.any()
    assert not torch.equal(layer.q_proj.weight, before)
    assert "num_heads=4, num_kv_heads=4, head_dim=16, kind='sink', causal=True" in repr(layer)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_shapes_are_told_without_numbers(options: dict[str, Any]) -> None:
    layer = SinkAttention(WIDTH, 4, **options, device="meta")
    assert layer(torch.empty(BATCH, LENGTH, WIDTH, device="meta")).shape == (BATCH, LENGTH, WIDTH)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_autocast_takes_fp32_rotations_and_caches(options: dict[str, Any], cached: bool) -> None:
    layer, x = SinkAttention(WIDTH, 4, **options), inputs()
    angles = torch.randn(LENGTH, 16)
    rotary = angles.cos(), angles.sin()
    past = None
    if cached:
        with torch.no_grad():
            _, past = layer(x, rotary=rotary, use_cache=True)
    want = layer(x, rotary=rotary, past=past)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x, rotary=rotary, past=past)
    assert got.dtype == torch.bfloat16
    # Six roundings on the way: x, weights, projections, rotated, attended, projected.
    assert relative_error(got.detach(), want.detach()) <= 6 * U_BF16
    exact, rounded = gradients(layer, want), gradients(layer, got.float())
    off = [(rounded[name] - exact[name]).norm() for name in exact]
    whole = torch.stack([x.norm() for x in exact.values()]).norm()
    assert torch.stack(off).norm() <= 12 * U_BF16 * whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 0}, "num_heads: got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads: got 3, expected a divisor of 4"),
        ({"embed_dim": 65}, "embed_dim: got 65, expected a multiple of the 4 heads"),
        ({"head_dim": 8}, "head_dim: got 8, expected 16 to 256"),
        ({"kind": "flash"}, "kind: got 'flash'"),
        ({"kind": "gated", "gate": "wise"}, "gate: got 'wise', expected 'head' or 'element'"),
    ],
    ids=str,
)
def test_says_which_argument_is_wrong(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SinkAttention(**({"embed_dim": WIDTH, "num_heads": 4} | change))


def test_says_which_input_is_wrong() -> None:
    layer, x = SinkAttention(WIDTH, 4), inputs()
    with pytest.raises(ValueError, match=r"x.shape: got \(3, 64\), expected \(batch, tokens, 64\)"):
        layer(x[:, 0])
    _, past = layer(x, use_cache=True)
    with pytest.raises(ValueError, match="key_lengths: got a tensor beside past"):
        layer(x, past=past, key_lengths=torch.tensor([5, 5, 5]))
    sizes: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    with pytest.raises(ValueError, match=r"q_proj.shape\[0\]: got 64, expected 68 or 128"):
        split_gate(torch.zeros(64, 8), **sizes, layout="qwen3_next")
    with pytest.raises(ValueError, match="layout: got 'x', expected 'qwen3_next' or"):
        split_gate(torch.zeros(68, 8), **sizes, layout="x")
