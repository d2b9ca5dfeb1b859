"""Accelerated models of transformers beside the models with the same weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quernstone.moe import (
    PRESETS,
    AdaptiveGating,
    CostModel,
    EmulatedDevice,
    Experts,
    ExpertsShape,
    accelerate,
    drop_experts,
    record_routing,
)
from quernstone.moe.routing import moe_blocks
from quernstone.quant import PackedLinear
from tests.moe.hf_tiny import MODELS, relative, tiny, tokens, twin, typical

# Three layers of fp32 sums in another order, relative to the logits' norm.
FP32 = 2e-5
# Activations rounded to 8 bits: an error of 1 / (127 sqrt 12) of the largest of 32, which is about
# 2.2 deviations, so 0.005 a product; eight products follow one another in each of three layers.
INT8 = 0.005 * 24**0.5
# Rounded to bf16, activations and int4's numbers deviate by 2^-8 / sqrt 3 of themselves at most.
TILES = 2.0**-8 * (2 / 3 * 24) ** 0.5


def logits(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, **settings).logits
    return found


def compiled(name: str, **changes: Any) -> Any:
    """A model all of whose layers have experts, as the compiled decoder wants it."""
    return tiny(name, **({"mlp_only_layers": []} if name == "qwen2_moe" else {}), **changes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("format", "linear"), [("bf16", None), ("int4", "int8")])
def test_logits_are_those_of_transformers_with_the_packed_weights(
    name: str, format: Any, linear: Any
) -> None:
    model, ids = tiny(name), tokens()
    got = accelerate(copy.deepcopy(model), format=format, linear=linear, compute="float")
    assert relative(logits(got, ids), logits(twin(model, got), ids)) < FP32


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_rounded_activations_stay_near(name: str) -> None:
    model, ids = tiny(name), tokens()
    got = accelerate(copy.deepcopy(model), format="int4", linear="int4")
    assert typical(logits(got, ids), logits(twin(model, got), ids)) < INT8


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v3"])
def test_bf16_experts_lose_nothing_of_a_bf16_model(name: str) -> None:
    model, ids = tiny(name, dtype=torch.bfloat16), tokens()
    # Of the same weights in fp32: what both are compared with.
    exact = logits(copy.deepcopy(model).float(), ids)
    theirs = typical(logits(model, ids), exact)
    got = accelerate(model, format="bf16", linear="bf16")
    ours = logits(got, ids)
    assert ours.dtype == torch.bfloat16
    assert typical(ours, exact) < 1.5 * theirs


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_generates_the_tokens_of_transformers(name: str) -> None:
    model, ids = tiny(name), tokens(1)
    got = accelerate(copy.deepcopy(model), format="int8", linear="int8", compute="float")
    same = twin(model, got)
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(got.generate(ids, **settings), same.generate(ids, **settings))


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_shared_experts_are_packed_beside_the_routed(name: str) -> None:
    model = tiny(name)
    got = accelerate(model)
    for block, experts in got.quernstone.experts.items():
        packed = got.get_submodule(block)
        assert experts.shape.count == packed.count + packed.shared
        # 80 rows beside experts of 32 take three, the last half full.
        assert packed.shared == {"qwen2_moe": 3, "deepseek_v2": 2, "deepseek_v3": 1}[name]
        assert len(packed.experts(torch.ones(1, 64), torch.tensor([[0]]), torch.ones(1, 1)))


@pytest.mark.parametrize(
    ("name", "attention"),
    [("mixtral", "model"), ("mixtral", "quernstone"), ("qwen2_moe", "quernstone")],
)
@pytest.mark.parametrize("format", ["int4", "bf16"])
def test_mixed_models_take_tiles_for_many_tokens_and_lose_less_than_bytes_would(
    name: str, format: Any, attention: Any, isa: str
) -> None:
    model, ids = compiled(name), tokens(1, 256)
    settings: dict[str, Any] = {"format": format, "linear": format, "attention": attention}
    got = accelerate(copy.deepcopy(model), compute="mixed", **settings)
    other = accelerate(copy.deepcopy(model), **settings)
    assert got.quernstone.compiled == (attention == "quernstone")
    found, plain = logits(got, ids), logits(other, ids)
    if isa == "avx512_amx":
        assert not torch.equal(found, plain)
        exact = logits(twin(model, got), ids)
        assert typical(found, exact) < TILES
        if format == "int4":
            assert typical(found, exact) < typical(plain, exact)
    else:
        assert torch.equal(found, plain)
    # Of few tokens no level makes tiles.
    assert torch.equal(logits(got, ids[:, :63]), logits(other, ids[:, :63]))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_mixed_bf16_model_is_as_near_as_its_own(name: str) -> None:
    model, ids = tiny(name, dtype=torch.bfloat16), tokens(1, 256)
    exact = logits(copy.deepcopy(model).float(), ids)
    theirs = typical(logits(model, ids), exact)
    got = accelerate(model, format="bf16", linear="bf16", compute="mixed")
    assert typical(logits(got, ids), exact) < 1.5 * theirs


@pytest.mark.parametrize("format", ["int4", "bf16"])
def test_a_mixed_model_has_the_same_bits_beside_a_device(format: Any) -> None:
    model, ids = compiled("mixtral"), tokens(1, 256)
    settings: dict[str, Any] = {"format": format, "linear": "int8", "compute": "mixed"}
    want = logits(accelerate(copy.deepcopy(model), **settings), ids)
    device = EmulatedDevice("rtx4090", factor=1e-3)
    with accelerate(model, device=device, prefetch=2, **settings).quernstone:
        for _ in range(2):
            assert torch.equal(logits(model, ids), want)


class TestCompiledDecoder:
    @pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_steps_are_those_of_transformers(self, name: str, dtype: torch.dtype) -> None:
        model, ids = compiled(name, dtype=dtype), tokens(1, 17)
        got = accelerate(
            copy.deepcopy(model),
            format="bf16",
            linear="bf16",
            attention="quernstone",
        )
        assert got.quernstone.compiled
        exact = logits(twin(model, got).float(), ids)
        if dtype == torch.float32:
            assert relative(logits(got, ids), exact) < FP32
        else:
            theirs = typical(logits(model, ids), exact)
            assert typical(logits(got, ids), exact) < 1.5 * theirs

    @pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
    def test_token_by_token_is_bit_for_bit_all_at_once(self, name: str) -> None:
        got = accelerate(compiled(name), linear="int4", attention="quernstone")
        ids = tokens(1, 17)
        whole = logits(got, ids)
        with torch.no_grad():
            first = got(ids[:, :5])
            cache, parts = first.past_key_values, [first.logits]
            parts += [got(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 17)]
        assert cache.get_seq_length() == 17
        assert torch.equal(torch.cat(parts, 1), whole)

    def test_the_cache_goes_from_one_way_to_the_other_and_back(self) -> None:
        got = accelerate(compiled("mixtral"), linear="int8", attention="quernstone")
        ids = tokens(1, 300)
        want = logits(got, ids)
        with torch.no_grad():
            first = got(ids[:, :4], output_hidden_states=True)
            assert len(first.hidden_states) == 4
            cache = first.past_key_values
            # Past the first capacity, so that buffers are made anew in between.
            for begin, end, asked in (
                (4, 9, False),
                (9, 260, True),
                (260, 261, False),
                (261, 300, False),
            ):
                out = got(ids[:, begin:end], past_key_values=cache, output_hidden_states=asked)
        assert relative(out.logits, want[:, 261:]) < FP32

    def test_cropped_and_repeated_caches_are_seen(self) -> None:
        got = accelerate(compiled("mixtral"), linear="int8", attention="quernstone")
        ids = tokens(1, 12)
        with torch.no_grad():
            cache = got(ids).past_key_values
            cache.crop(-4)
            again = got(ids[:, 8:], past_key_values=cache).logits
        assert torch.equal(again, logits(got, ids)[:, 8:])
        beams = got.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False)
        assert beams.shape == (1, 16)

    def test_padding_and_batches_go_through_transformers(self) -> None:
        model, ids = compiled("qwen3_moe"), tokens(2, 9)
        got = accelerate(
            copy.deepcopy(model), linear="int8", compute="float", attention="quernstone"
        )
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        want = logits(twin(model, got), ids, attention_mask=mask)
        assert relative(logits(got, ids, attention_mask=mask)[1], want[1]) < FP32
        alone = logits(got, ids[:1, 3:])
        assert relative(logits(got, ids, attention_mask=mask)[:1, 3:], alone) < FP32

    def test_hooks_of_others_are_called(self) -> None:
        got = accelerate(compiled("mixtral"), linear="int8", attention="quernstone")
        ids = tokens(1)
        trace = record_routing(got, [ids], lambda batch: got(batch))
        assert trace.ids.shape[:2] == (3, 9)
        with torch.no_grad():
            routed = got(ids, output_router_logits=True).router_logits
        assert len(routed) == 3

    def test_a_failed_step_leaves_the_cache_as_it_was(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        got = accelerate(compiled("mixtral"), linear="int8", attention="quernstone")
        ids = tokens(1)
        with torch.no_grad():
            cache = got(ids[:, :5]).past_key_values
            experts = got.quernstone.blocks["model.layers.2.mlp"].experts
            with monkeypatch.context() as patch:
                patch.setattr(experts, "forward", _fail)
                with pytest.raises(RuntimeError, match="interrupted"):
                    got(ids[:, 5:6], past_key_values=cache)
            assert cache.get_seq_length() == 5
            after = got(ids[:, 5:], past_key_values=cache).logits
        assert torch.equal(after, logits(got, ids)[:, 5:])

    @pytest.mark.parametrize(
        "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
    )
    def test_a_copied_cache_goes_on_by_itself(self, copied: Callable[[Any], Any]) -> None:
        got = accelerate(compiled("mixtral"), linear="int8", attention="quernstone")
        ids = tokens(1)
        whole = logits(got, ids)
        with torch.no_grad():
            cache = got(ids[:, :5]).past_key_values
            other = copied(cache)
            other.layers = [copied(layer) for layer in other.layers]
            assert got.quernstone.compiled
            got(ids[:, 2:4], past_key_values=other)
            again = copied(cache)
            again.layers = [copied(layer) for layer in again.layers]
            assert torch.equal(got(ids[:, 5:], past_key_values=again).logits, whole[:, 5:])
            assert torch.equal(got(ids[:, 5:], past_key_values=cache).logits, whole[:, 5:])

    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
    def test_torchs_default_dtype_changes_nothing(self, default: torch.dtype) -> None:
        model, ids = compiled("qwen2_moe"), tokens(2)
        device = EmulatedDevice("rtx4090", factor=1e-3)
        settings: dict[str, Any] = {"linear": "int8", "attention": "quernstone"}
        want = logits(accelerate(copy.deepcopy(model), **settings), ids[:1])
        torch.set_default_dtype(default)
        try:
            got = accelerate(model, device=device, cache="lru", **settings)
            found = logits(got, ids[:1])
            logits(got, ids)
        finally:
            torch.set_default_dtype(torch.float32)
        got.quernstone.close()
        assert torch.equal(found, want)

    def test_a_model_that_is_cast_goes_through_transformers(self) -> None:
        got = accelerate(compiled("mixtral"), linear="int8", attention="quernstone")
        assert got.quernstone.compiled
        got.to(torch.bfloat16)
        assert logits(got, tokens(1)).dtype is torch.bfloat16

    def test_another_output_layer_is_used(self) -> None:
        got = accelerate(compiled("mixtral"), linear="int8", attention="quernstone")
        got.lm_head = torch.nn.Linear(64, 7)
        assert logits(got, tokens(1)).shape == (1, 9, 7)

    @pytest.mark.parametrize("part", ["norm", "written", "layers", "attention", "router"])
    def test_a_part_that_is_replaced_or_written_to_is_used(self, part: str) -> None:
        got = accelerate(compiled("mixtral"), linear="int8", attention="quernstone")
        ids = tokens(1)
        before = logits(got, ids)
        inner = got.model
        if part == "norm":
            inner.norm = copy.deepcopy(inner.norm)
            inner.norm.weight.data *= 2.0
        elif part == "written":
            with torch.no_grad():
                inner.layers[0].input_layernorm.weight.mul_(2.0)
        elif part == "layers":
            inner.layers = inner.layers[:1]
        elif part == "attention":
            inner.layers[0].self_attn.o_proj = torch.nn.Linear(64, 64)
        else:
            gate = inner.layers[0].mlp.gate
            gate.weight = torch.nn.Parameter(-gate.weight)
        assert relative(logits(got, ids), before) > 0.05

    def test_goes_on_from_a_cache_of_the_model_it_was(self) -> None:
        model, ids = compiled("mixtral", num_key_value_heads=2), tokens(1)
        got = accelerate(copy.deepcopy(model), format="bf16", linear="bf16", attention="quernstone")
        cache, other = (model(ids[:, :5]).past_key_values for _ in range(2))  # with gradients
        with torch.no_grad():
            found = got(ids[:, 5:], past_key_values=cache).logits
            want = twin(model, got)(ids[:, 5:], past_key_values=other).logits
        assert relative(found, want) < FP32

    def test_logits_are_those_asked_for(self) -> None:
        got = accelerate(compiled("olmoe"), linear="int8", attention="quernstone")
        ids = tokens(1)
        whole = logits(got, ids)
        for keep in (1, 3, 99):
            assert torch.equal(logits(got, ids, logits_to_keep=keep), whole[:, -keep:])
        with torch.no_grad():
            first = got(ids, return_dict=False, use_cache=False)[0]
        assert relative(first, whole) < FP32


def _fail(*_: Any) -> torch.Tensor:
    raise RuntimeError("interrupted")


class TestGating:
    def gating(self, model: Any, threshold: float) -> AdaptiveGating:
        return AdaptiveGating({block.name: 1.0 for block in moe_blocks(model)}, threshold)

    @pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "deepseek_v3"])
    def test_drops_what_drop_experts_drops(self, name: str) -> None:
        model, ids = tiny(name), tokens()
        hooked = self.gating(model, 0.05)
        got = accelerate(copy.deepcopy(model), format="bf16", gating=self.gating(model, 0.05))
        same = twin(model, got)
        with hooked.on(same):
            want = logits(same, ids)
        assert relative(logits(got, ids), want) < FP32
        ours, theirs = got.quernstone.gating.use(), hooked.use()
        assert ours == theirs
        assert 1.0 <= ours.active < MODELS[name][1].get("num_experts_per_tok", 2)

    @pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
    def test_compiled_steps_drop_the_same(self, name: str) -> None:
        model, ids = compiled(name), tokens(1, 40)
        settings: dict[str, Any] = {"format": "bf16", "linear": "bf16"}
        one = accelerate(
            copy.deepcopy(model),
            attention="quernstone",
            gating=self.gating(model, 0.08),
            **settings,
        )
        two = accelerate(model, gating=self.gating(model, 0.08), **settings)
        assert one.quernstone.compiled
        assert relative(logits(one, ids), logits(two, ids)) < FP32
        assert one.quernstone.gating.use() == two.quernstone.gating.use()

    def test_a_threshold_of_zero_drops_nothing(self) -> None:
        model, ids = tiny("mixtral"), tokens()
        plain = accelerate(copy.deepcopy(model))
        gated = accelerate(copy.deepcopy(model), gating=self.gating(model, 0.0))
        assert torch.equal(logits(plain, ids), logits(gated, ids))
        assert (
            drop_experts(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]), 1.0, 0.0)[0].min() == 0
        )


def test_the_model_counts_the_bytes_of_a_step() -> None:
    got = accelerate(tiny("mixtral"), linear="int4")
    handle = got.quernstone
    experts = sum(2 * made.shape.expert_bytes for made in handle.experts.values())
    linears = sum(layer.matrix.data.nbytes for layer in handle.linears.values())
    assert handle.step_bytes() == experts + linears
    assert handle.step_bytes(1) == experts // 2 + linears


def test_linear_layers_share_a_run_of_memory_that_the_decoder_takes_as_one() -> None:
    got = accelerate(tiny("mixtral"), linear="int4")
    attention = got.model.layers[0].self_attn
    assert isinstance(attention.q_proj, PackedLinear)
    whole = attention.q_proj.matrix.whole
    assert whole is attention.v_proj.matrix.whole
    weights = [getattr(attention, name).matrix.unpack() for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(whole.unpack(), torch.cat(weights))


class TestRefusals:
    def test_names_another_architecture(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
        with pytest.raises(ValueError, match="model: got 'llama', expected one of mixtral"):
            accelerate(LlamaForCausalLM(config))
        with pytest.raises(TypeError, match="model: got int"):
            accelerate(3)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"format": "fp4"}, "format: got 'fp4'"),
            ({"linear": "int3"}, "linear: got 'int3'"),
            ({"group": 48}, "group"),
            ({"compute": "bf16"}, "compute: got 'bf16'"),
            ({"format": "bf16", "compute": "int8"}, "compute: got 'int8'"),
            ({"attention": "flash"}, "attention: got 'flash'"),
            ({"policy": "luck"}, "policy: got 'luck'"),
            ({"cache": "luck"}, "got 'luck', expected one of lru"),
            ({"prefetch": 9}, "prefetch: got 9"),
            ({"gating": AdaptiveGating({}, 0.1)}, "gating: got no sensitivity for 'model.layers.0"),
        ],
    )
    def test_names_the_setting_and_leaves_the_model(
        self, settings: dict[str, Any], words: str
    ) -> None:
        model, ids = tiny("mixtral"), tokens()
        want = logits(model, ids)
        with pytest.raises(ValueError, match=words):
            accelerate(model, **settings)
        assert torch.equal(logits(model, ids), want)

    def test_names_what_it_cannot_compute(self) -> None:
        with pytest.raises(ValueError, match="hidden_act: got 'gelu'"):
            accelerate(tiny("mixtral", hidden_act="gelu"))
        with pytest.raises(ValueError, match=r"dtype: got torch\.float16"):
            accelerate(tiny("mixtral", dtype=torch.float16))
        with torch.device("meta"):
            model = type(tiny("mixtral"))(tiny("mixtral").config)
        with pytest.raises(ValueError, match="device: got meta, expected cpu"):
            accelerate(model)
        broken = tiny("mixtral")
        with torch.no_grad():
            broken.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
        with pytest.raises(ValueError, match="finite"):
            accelerate(broken)

    def test_an_accelerated_model_is_neither_accelerated_nor_saved(self, tmp_path: Any) -> None:
        got = accelerate(tiny("mixtral"))
        with pytest.raises(ValueError, match="accelerated already"):
            accelerate(got)
        with pytest.raises(ValueError, match="moe pack"):
            got.save_pretrained(tmp_path)

    def test_closing_twice_is_allowed(self) -> None:
        got = accelerate(tiny("mixtral"))
        with got.quernstone as handle:
            assert isinstance(next(iter(handle.experts.values())), Experts)
        got.quernstone.close()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"slots": [1]}, ValueError, "slots: got 1 numbers, expected 3"),
        (
            {"slots": -1, "device": EmulatedDevice("rtx4090")},
            ValueError,
            r"slots\[0\]: got -1, expected at least 0",
        ),
        *(
            (
                {**of, "reproducible": True},
                ValueError,
                f"compute: got '{how}', expected 'int8' with reproducible",
            )
            for of, how in (
                ({"format": "bf16"}, "float"),
                ({"compute": "float"}, "float"),
                ({"compute": "mixed"}, "mixed"),
            )
        ),
        ({"format": "bf16", "linear": "int4", "clips": 0}, ValueError, "clips: got 0, expected 1"),
        ({"format": "bf16", "linear": "int4", "group": 48}, ValueError, "group: got 48, expected"),
        ({"clips": "many"}, TypeError, "clips: got str 'many', expected int"),
        ({"zero_points": 3}, TypeError, "zero_points: got 3, expected a bool"),
        ({"device": 3}, TypeError, "device: got int, expected a Device or None"),
        (
            {"costs": CostModel.of_machine(PRESETS["rtx4090"], ExpertsShape(1, 32, 32))},
            ValueError,
            "costs: got some without a device, expected None",
        ),
    ],
)
def test_a_setting_that_is_refused_leaves_the_model_as_it_was(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    model, ids = tiny("mixtral"), tokens()
    want = logits(model, ids)
    with pytest.raises(error, match=words):
        accelerate(model, **settings)
    assert torch.equal(logits(model, ids), want)


def test_an_accelerated_model_is_neither_copied_nor_pickled() -> None:
    got = accelerate(tiny("mixtral"))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="accelerated one, which cannot be copied"):
            copied(got)
