"""The reference itself, against loops over scalars, autograd and numbers worked out by hand."""

import math

import pytest
import torch

from quernstone.attention import reference

from .cases import KINDS, PADDINGS, Case, split

NEVER = -math.inf


def by_hand(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, gates [b, h, t, d] and lse of a case, one scalar after the other."""
    (q, k, v), options = case.make()
    b, h, t, d = q.shape
    s = k.shape[2]
    scale = d**-0.5 if case.scale is None else case.scale
    start = options.get("key_start", torch.zeros(b, dtype=torch.int64)).tolist()
    length = options.get("key_lengths", torch.full((b,), s)).tolist()
    out = torch.zeros(b, h, t, d, dtype=torch.float64)
    gates = torch.zeros_like(out)
    lse = torch.full((b, h, t), NEVER, dtype=torch.float64)
    for i, head, query in torch.cartesian_prod(*map(torch.arange, (b, h, t))).tolist():
        position = query + s - t
        keys = [
            j
            for j in range(start[i], length[i])
            if (not case.causal or j <= position)
            and (case.window is None or position - case.window < j)
            and (case.window is None or case.causal or j < position + case.window)
        ]
        if not keys:
            continue
        group = head // case.ratio
        dots = [(q[i, head, query].double() @ k[i, group, j].double()).item() for j in keys]
        weights = {j: math.exp(scale * dot) for j, dot in zip(keys, dots, strict=True)}
        total = math.fsum(weights.values())
        lse[i, head, query] = math.log(total)
        plain = sum(w / total * v[i, group, j].double() for j, w in weights.items())
        if case.kind == "vanilla":
            gate = 1 - weights.get(start[i], 0.0) / total
        elif case.kind == "sink":
            gate = total / (total + math.exp(options["sinks"][head].item()))
        else:
            gate = 1 / (1 + (-options["gate"][i, head, query].double()).exp())
        gates[i, head, query] = gate
        out[i, head, query] = plain if case.kind == "vanilla" else gate * plain
    return out, gates, lse


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 3), (False, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_loops_over_scalars(
    kind: str, causal: bool, window: int | None, padding: str
) -> None:
    case = Case(
        kind=kind, ratio=2, queries=4, keys=7, width=3, causal=causal, window=window,
        scale=-0.7, padding=padding,
    )  # fmt: skip
    tensors, options = case.make()
    out, aux = split(reference.sink_attention(*tensors, **options))
    want, gates, lse = by_hand(case)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-14)
    assert aux is not None
    torch.testing.assert_close(aux.lse, lse, rtol=1e-12, atol=1e-14)
    seen = (lse > NEVER).any(1, keepdim=True).expand_as(lse)
    if kind == "vanilla":
        first_alone = ((gates == 0).all(-1) & seen).all(1, keepdim=True)
        seen = seen & ~first_alone
    for head in range(case.heads):
        want_importance = gates[:, head][seen[:, head]].mean()
        torch.testing.assert_close(aux.importance[head], want_importance, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_passes_gradcheck_through_output_and_aux(kind: str, padding: str) -> None:
    case = Case(kind=kind, queries=5, keys=4, width=3, ratio=2, padding=padding, some_tokens=True)
    (q, k, v), options = case.make()
    learnt = next((name for name in ("sinks", "gate") if name in options), None)

    def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        changed = options | ({learnt: inputs[3]} if learnt else {})
        out, aux = split(reference.sink_attention(*inputs[:3], **changed))
        assert aux is not None
        return out, aux.importance

    inputs = [q, k, v] + ([options[learnt]] if learnt else [])
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(call, inputs)


def test_keeps_a_gate_that_one_minus_the_weight_would_lose() -> None:
    q = torch.ones(1, 1, 2, 1)
    k = torch.tensor([60.0, 1.0]).view(1, 1, 2, 1)
    token = torch.tensor([[False, True]])
    _, aux = split(
        reference.sink_attention(
            q, k, k, kind="vanilla", scale=1.0, token_mask=token, return_aux=True
        )
    )
    assert aux is not None
    torch.testing.assert_close(aux.importance.item(), math.exp(-59), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kind": "softmax"}, "kind"),
        ({}, "sinks"),
        ({"kind": "gated"}, "gate"),
        ({"kind": "vanilla", "sinks": torch.zeros(1)}, "sinks"),
        ({"kind": "vanilla", "gate": torch.zeros(1, 1, 1)}, "gate"),
        ({"kind": "vanilla", "token_mask": torch.ones(1, 1, dtype=torch.bool)}, "token_mask"),
    ],
)
def test_names_what_a_kind_lacks_or_does_not_take(change: dict[str, object], name: str) -> None:
    x = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match=rf"^{name}: got .*, expected "):
        reference.sink_attention(x, x, x, **change)  # type: ignore[arg-type]
