"""`head_report` against eager attention weights, and against silencing heads by hand."""

import json
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quernstone.attention import HeadReport, head_report
from quernstone.attention.hf import PROBE, attention_forward
from quernstone.attention.hf_gates import unfused
from quernstone.attention.report import Ablation
from tests.attention.hf_tiny import (
    TOLERANCE,
    VOCABULARY,
    one_thread,  # noqa: F401  (a fixture)
    padding,
    randomised,
    run,
    tiny,
    tokens,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def _ready(name: str, **changes: Any) -> Any:
    model = tiny(name, **changes)
    model.set_attn_implementation("quernstone")
    return model


def _eager_weights(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """[b, h, t, s] of each layer."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation("quernstone")
    # A layer without attention has none.
    return [w for w in weights if w is not None]


def _mean(numbers: Tensor, counted: Tensor) -> np.ndarray:
    """Over the tokens [b, t] that count, of [b, h, t]."""
    return ((numbers * counted[:, None]).sum((0, 2)) / counted.sum()).double().numpy()


def _first_key(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Index of the first real token [b], and the real tokens [b, t]."""
    real = batch.get("attention_mask")
    real = torch.ones_like(batch["input_ids"]) if real is None else real
    return real.argmax(1), real.bool()


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert"])
def test_attention_to_the_first_token_is_that_of_eager(name: str, side: str | None) -> None:
    model, batch = _ready(name), {"input_ids": tokens(), "attention_mask": padding(side)}
    report = head_report(model, batch, ablation=False)
    start, real = _first_key(batch)
    for row, weights in zip(report.first_token, _eager_weights(model, batch), strict=True):
        first = weights[torch.arange(3), :, :, start]
        np.testing.assert_allclose(row, _mean(first, real), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_importance_without_a_sink_is_what_the_first_token_leaves(
    name: str, side: str | None
) -> None:
    model, batch = _ready(name), {"input_ids": tokens(), "attention_mask": padding(side)}
    report = head_report(model, batch, ablation=False)
    start, counted = _first_key(batch)
    # The first token sees nothing but itself and has no gate.
    counted = counted & (torch.arange(23) > start[:, None])
    for row, weights in zip(report.importance, _eager_weights(model, batch), strict=True):
        gate = 1 - weights[torch.arange(3), :, :, start]
        np.testing.assert_allclose(row, _mean(gate, counted), rtol=TOLERANCE, atol=TOLERANCE)
    assert report.kinds == ("vanilla",) * 2


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_importance_with_a_sink_is_what_the_sink_leaves(side: str | None) -> None:
    model, batch = _ready("gpt_oss"), {"input_ids": tokens(), "attention_mask": padding(side)}
    report = head_report(model, batch, ablation=False)
    _, real = _first_key(batch)
    for row, weights in zip(report.importance, _eager_weights(model, batch), strict=True):
        np.testing.assert_allclose(row, _mean(weights.sum(-1), real), rtol=TOLERANCE)
    assert report.kinds == ("sink",) * 2


def test_importance_of_a_gated_layer_is_its_mean_gate() -> None:
    model, batch = _ready("qwen3_next"), {"input_ids": tokens(), "attention_mask": padding("left")}
    layer, seen = model.model.layers[1].self_attn, []
    handle = layer.q_proj.register_forward_hook(lambda _m, _i, out: seen.append(out))
    report = head_report(model, batch, ablation=False)
    handle.remove()
    gate = seen[0].unflatten(-1, (4, 32))[..., 16:].sigmoid().mean(-1).transpose(1, 2)
    want = _mean(gate, _first_key(batch)[1])
    np.testing.assert_allclose(report.importance[0], want, rtol=TOLERANCE)
    assert report.kinds == ("gated",)
    assert report.layers == ("model.layers.1.self_attn",)
    assert unfused(model)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_silencing_a_head_is_the_loss_without_its_columns_of_the_projection(name: str) -> None:
    model, ids = _ready(name), tokens()
    mask = padding("left")
    assert mask is not None
    batch = {"input_ids": ids, "attention_mask": mask}
    ablation = head_report(model, batch, shares=(), heads_one_by_one=3).ablation
    assert ablation is not None
    assert len(ablation.single) == 3
    labels = ids.where((mask * mask.roll(1, dims=1)).bool(), -100)
    whole = _eager_loss(model, batch, labels)
    assert ablation.loss == pytest.approx(whole, rel=TOLERANCE)
    for (layer, head), gain in ablation.single.items():
        weight = model.model.layers[layer].self_attn.o_proj.weight
        columns = weight[:, 16 * head : 16 * (head + 1)]
        kept = columns.clone()
        with torch.no_grad():
            columns.zero_()
            loss = _eager_loss(model, batch, labels)
            columns.copy_(kept)
        assert gain == pytest.approx(loss - whole, abs=TOLERANCE * whole)


def _eager_loss(model: Any, batch: dict[str, Any], labels: Tensor) -> float:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss
    model.set_attn_implementation("quernstone")
    return float(loss)


def test_the_curves_begin_with_no_head_and_end_with_every_head() -> None:
    model, batch = _ready("llama"), {"input_ids": tokens()}
    report = head_report(model, batch, shares=(0.0, 0.5, 1.0))
    ablation = report.ablation
    assert ablation is not None
    assert ablation.least_important[0] == ablation.random[0] == 0.0
    assert ablation.least_important[1] != ablation.random[1]
    assert ablation.least_important[2] == ablation.random[2]
    other = head_report(model, batch, shares=(0.5,), seed=1).ablation
    assert other is not None
    assert other.least_important == ablation.least_important[1:2]
    assert other.random != ablation.random[1:2]


def test_the_loss_is_that_of_the_labels_where_the_batch_has_them() -> None:
    model, ids = _ready("llama"), tokens()
    labels = ids.clone()
    labels[:, :10] = -100
    ablation = head_report(model, {"input_ids": ids, "labels": labels}, shares=(0.5,)).ablation
    assert ablation is not None
    want = _eager_loss(model, {"input_ids": ids}, labels)
    assert ablation.loss == pytest.approx(want, rel=TOLERANCE)


def test_layers_that_share_a_module_have_a_row_each() -> None:
    import transformers as hf

    config = hf.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    model = hf.AlbertModel._from_config(config, attn_implementation="quernstone")
    report = head_report(randomised(model), {"input_ids": tokens()}, ablation=False)
    assert report.importance.shape == (3, 4)
    assert len(set(report.layers)) == 1


class _Watch(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_no_tensor_grows_with_the_square_of_the_length(name: str) -> None:
    length = 1024
    model = _ready(name, max_position_embeddings=length)
    with _Watch() as watch:
        head_report(model, {"input_ids": torch.randint(0, VOCABULARY, (1, length))}, shares=(0.5,))
    assert watch.largest < length * length


def test_leaves_the_model_as_it_was() -> None:
    model, batch = _ready("qwen3_next"), {"input_ids": tokens()}
    before = run(model, "quernstone", **batch)
    head_report(model, batch, shares=(0.5,))
    assert torch.equal(run(model, "quernstone", **batch), before)
    assert not any(PROBE in module.__dict__ for module in model.modules())
    with pytest.raises(ValueError, match="got packed sequences"):
        head_report(model, batch | {"position_ids": torch.zeros(3, 23).long(), "use_cache": False})
    assert not any(PROBE in module.__dict__ for module in model.modules())
    assert unfused(model)


class _Ragged(nn.Module):
    """Two attention calls with one head and with two."""

    def forward(self) -> None:
        for heads in (1, 2):
            x = torch.randn(1, heads, 4, 16)
            attention_forward(self, x, x, x, None)


def test_names_what_it_cannot_report_on() -> None:
    batch = {"input_ids": tokens()}
    with pytest.raises(ValueError, match=r"model: got one in training mode"):
        head_report(_ready("llama").train(), batch)
    model = _ready("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="model: no layer uses the quernstone attention"):
        head_report(model, batch)
    model = _ready("llama")
    for change, says in (
        ({"shares": (-0.5,)}, "shares: got"),
        ({"shares": (1.5,)}, "shares: got"),
        ({"heads_one_by_one": -1}, "heads_one_by_one: got -1"),
    ):
        with pytest.raises(ValueError, match=says):
            head_report(model, batch, **change)
    with torch.no_grad():
        cache = model(input_ids=tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="batch: got past_key_values"):
        head_report(model, batch | {"past_key_values": cache})
    with pytest.raises(ValueError, match="batch: got a loss of nan"):
        head_report(model, {"input_ids": tokens()[:, :1]})
    with pytest.raises(ValueError, match="model: got a compiled one"):
        head_report(torch.compile(model, backend="eager"), batch)
    with pytest.raises(ValueError, match="batch: no loss for BertModel, expected labels"):
        head_report(_ready("bert"), batch)
    with pytest.raises(ValueError, match=r"model: got \[1, 2\] heads per layer"):
        head_report(_Ragged().eval(), {}, ablation=False)


def _report(ablation: Ablation | None = None) -> HeadReport:
    return HeadReport(
        layers=("a", "b", "c"),
        kinds=("sink", "sink", "sink"),
        importance=np.array([[0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
        first_token=np.array([[0.1, 0.2, 0.4, 0.5], [0.3, 0.3, 0.3, 0.31], [0.0, 0.0, 0.0, 0.0]]),
        sink_epsilon=0.3,
        dead_below=0.1,
        ablation=ablation,
    )


def test_the_measures_of_balance() -> None:
    report = _report()
    np.testing.assert_allclose(report.cv, [0.0, 3.0**0.5, 0.0])
    np.testing.assert_allclose(report.effective_heads, [4.0, 1.0, 0.0])
    assert report.sink_rate == 3 / 12
    assert report.dead_heads == [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]


_MEASURED = Ablation(2.0, (0.25, 0.5), (0.0, 0.1), (0.2, 0.3), {(1, 2): 0.01})


@pytest.mark.parametrize("ablation", [None, _MEASURED])
def test_a_report_is_plain_numbers_and_a_figure(ablation: Ablation | None) -> None:
    report = _report(ablation)
    numbers = json.loads(json.dumps(report.to_dict()))
    assert numbers["importance"] == report.importance.tolist()
    assert numbers["sink_rate"] == report.sink_rate
    if ablation is None:
        assert numbers["ablation"] is None
    else:
        assert numbers["ablation"]["single"] == [[1, 2, 0.01]]
    figure = report.figure()
    labels = {(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes}
    assert {("head", "layer"), ("CV over heads", "")} <= labels
    assert (("heads set to zero (%)", "increase (nats)") in labels) == (ablation is not None)
    figure.savefig(file := BytesIO())
    assert file.getvalue().startswith(b"\x89PNG")
