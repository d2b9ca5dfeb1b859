"""Models of transformers on packed experts: `accelerate` replaces what costs time and memory.

Axes: t tokens, m hidden width, e experts, k choices of a token, n shared experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn

from quernstone.moe.block import PackedBlock, Source, shared_of, source_of
from quernstone.moe.cache.base import whole
from quernstone.moe.cache.policies import Policy as CachePolicy
from quernstone.moe.cost import CostModel
from quernstone.moe.devices import Device
from quernstone.moe.experts import Compute, Experts, ExpertsShape, Format
from quernstone.moe.gating import AdaptiveGating
from quernstone.moe.routing import MoeBlock, moe_blocks
from quernstone.moe.runtime import Runtime, check_device
from quernstone.moe.schedule import Policy
from quernstone.quant.linear import (
    MatrixShape,
    PackedLinear,
    PackedMatrix,
    check_compute,
    pack_into,
)
from quernstone.quant.rounding import MAX_CLIPS

ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
"""`config.model_type` of the models that `accelerate` takes."""

Attention = Literal["model", "quernstone"]

_QKV = ("q_proj", "k_proj", "v_proj")
_ROWS = 16  # of a packed block; a matrix that ends with one can be continued by another


@dataclass(frozen=True)
class Packing:
    """How weights are stored and computed with.

    Args:
        format: of the experts, "int4", "int8" or "bf16".
        group: inputs of a group of int4; None is 32.
        zero_points: whether int4 has zero points.
        clips: how many clipped ranges of a group are tried, see `quant.quantize`.
        linear: format of the linear layers of attention, of dense layers and of the output, with
            the same group; None leaves them as they are. Routers are never touched.

    Raises:
        ValueError: a value out of its range.
    """

    format: Format = "int4"
    group: int | None = None
    zero_points: bool = False
    clips: int = 4
    linear: Format | None = None

    def __post_init__(self) -> None:
        for name in ("format", "linear"):
            value = getattr(self, name)
            if value not in get_args(Format) and not (name == "linear" and value is None):
                raise ValueError(f"{name}: got {value!r}, expected one of {get_args(Format)}")
        if not isinstance(self.zero_points, bool):
            raise TypeError(f"zero_points: got {self.zero_points!r}, expected a bool")
        if not 1 <= whole("clips", self.clips) <= MAX_CLIPS:
            raise ValueError(f"clips: got {self.clips}, expected 1 to {MAX_CLIPS}")
        for format in {self.format, self.linear or self.format}:
            self.matrix_shape(1, 32, format)

    def matrix_shape(self, outputs: int, inputs: int, format: Format) -> MatrixShape:
        group = (self.group or 32) if format == "int4" else 0
        return MatrixShape(outputs, inputs, format, group, self.zero_points and format == "int4")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def experts(
        self,
        source: Source,
        expert: Callable[[int], tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> Experts:
        """The experts of a block, the shared ones last.

        Args:
            source: the block's weights.
            expert: gives those of an expert, `source.expert` where it is None.
        """
        count, hidden, width = source.down.shape
        of = self.matrix_shape(width, hidden, self.format)
        shape = ExpertsShape(
            count + source.shared_count, hidden, width, of.format, of.group, of.zero_points
        )
        experts = Experts.empty(shape)
        for index in range(shape.count):
            gate, up, down = (expert or source.expert)(index)
            experts.place(index, gate, up, down, clips=self.clips)
        return experts

    def matrices(self, weights: Mapping[str, Tensor]) -> dict[str, PackedMatrix]:
        """Matrices behind one another in memory, of inputs that are the same.

        Args:
            weights: [., k] by name; all but the last have whole blocks of 16 outputs.
        """
        assert self.linear is not None
        rows = [len(weight) for weight in weights.values()]
        inputs = next(iter(weights.values())).shape[1]
        shape = self.matrix_shape(sum(rows), inputs, self.linear)
        whole = PackedMatrix.empty(shape)
        made, begin = {}, 0
        for (name, weight), count in zip(weights.items(), rows, strict=True):
            part = whole.rows(begin, begin + count)
            pack_into(f"{name}.weight", weight, part.shape, part.data, clips=self.clips)
            made[name] = part
            begin += count
        return made


class RuntimeOptions(TypedDict, total=False):
    """What `Runtime` takes beside the layers."""

    device: Device | None
    costs: CostModel | None
    policy: Policy
    cache: CachePolicy
    slots: int | Sequence[int] | None
    prefetch: int
    reproducible: bool


@dataclass
class Acceleration:
    """What stands behind an accelerated model; `model.quernstone`."""

    runtime: Runtime
    experts: Mapping[str, Experts]
    """Of each block by its name, the shared experts last."""
    blocks: Mapping[str, PackedBlock]
    linears: Mapping[str, PackedLinear]
    gating: AdaptiveGating | None = None
    compiled: bool = False
    """Whether steps run through the compiled decoder, see `quernstone.moe.decoder`."""
    _closed: bool = field(default=False, repr=False)

    def step_bytes(self, active: float | None = None) -> int:
        """Bytes of packed weights that one token reads: what a step can take at the least.

        Args:
            active: routed experts of a token in a layer; None is what the routers choose.
        """
        total = sum(layer.matrix.shape.nbytes for layer in self.linears.values())
        for name, block in self.blocks.items():
            router: Any = block.gate
            chosen = (router.top_k if active is None else active) + block.shared
            total += round(chosen * self.experts[name].shape.expert_bytes)
        return total

    def close(self) -> None:
        """Ends the runtime's workers; the model computes no more. May be called twice."""
        self._closed = True
        self.runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


def accelerate(
    model: nn.Module,
    *,
    format: Format = "int4",
    group: int | None = None,
    zero_points: bool = False,
    clips: int = 4,
    compute: Compute | None = None,
    linear: Format | None = None,
    attention: Attention = "model",
    gating: AdaptiveGating | None = None,
    **options: Unpack[RuntimeOptions],
) -> nn.Module:
    """Puts packed experts, run by a `Runtime`, in the place of a model's mixtures of experts.

    The model is changed in place and for inference only; its memory is given back layer by layer.
    Every block keeps its own router, with the rules of its architecture: softmax or sigmoid,
    groups, normalisation and scaling. Shared experts are packed beside the routed ones and
    scheduled with them. `generate` works as before.

    With `linear` and attention="quernstone", a step of one sequence without padding runs through a
    compiled decoder where the architecture allows it (all but DeepSeek's): the same arithmetic with
    fp32 between the layers, where a bf16 model would round. Whatever it does not cover (hidden
    states or router logits asked for, hooks, padding, other caches) runs through transformers.

    Args:
        model: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 or DeepSeek-V3 of transformers,
            with a language model's head or without, in fp32 or bf16, on the CPU.
        format, group, zero_points, clips, linear: see `Packing`.
        compute: "float" leaves activations as they are, "int8" rounds them to 8 bits in groups of
            32; "mixed" takes bf16 where 64 tokens or more share weights, see `Experts`: a prompt's
            first token comes sooner. None is "int8" with int4 and int8 weights.
        attention: "quernstone" computes it by `quernstone.attention`, "model" leaves it.
        gating: drops experts whose weight is small, see `AdaptiveGating`; it counts what it did.
        options: of `Runtime`: device, costs, policy, cache, slots, prefetch, reproducible.

    Returns:
        `model`, with an `Acceleration` as its attribute `quernstone`.

    Raises:
        ValueError: another architecture, activation, device or dtype; weights on no device; a value
            out of its range. The model is as it was, unless a weight was not finite.
        TypeError: a value of another type.
        MemoryError: the device has not enough. The experts of the model are gone then.

    Source: HybriMoE, arXiv 2504.05897; AdapMoE, arXiv 2408.10284. Oracle: the same model of
    transformers with the weights that `Experts.matrices` and `PackedMatrix.unpack` give back.
    """
    packing = Packing(format, group, zero_points, clips, linear)
    check_compute(compute, format)
    _check_attention(attention)
    check_model(model)
    blocks = moe_blocks(model)
    _check_gating(gating, blocks)
    _check_options(options, packing, check_compute(compute, format), len(blocks))
    experts: dict[str, Experts] = {}
    for block in blocks:
        made = packing.experts(source_of(block.module))
        made.compute = check_compute(compute, format)
        experts[block.name] = made
        # One layer at a time: the model and its packed copy need not fit memory together.
        _empty(block.experts)
    matrices = {}
    if packing.linear is not None:
        layers = linears_of(model)
        for names in together(layers):
            matrices.update(
                packing.matrices({name: layers[name].weight.detach() for name in names})
            )
    return install(
        model,
        experts,
        matrices,
        compute=compute,
        attention=attention,
        gating=gating,
        runtime=runtime_of(options),
        prefetch=options.get("prefetch", 0),
    )


def runtime_of(options: RuntimeOptions) -> Callable[[Mapping[str, Experts]], Runtime]:
    """What makes a runtime of experts."""
    return lambda layers: Runtime(layers, **options)


def install(
    model: nn.Module,
    experts: Mapping[str, Experts],
    matrices: Mapping[str, PackedMatrix],
    *,
    compute: Compute | None,
    attention: Attention,
    gating: AdaptiveGating | None,
    runtime: Callable[[Mapping[str, Experts]], Runtime],
    prefetch: int,
) -> nn.Module:
    """Puts packed experts and matrices in the places that bear their names."""
    _check_attention(attention)
    made = runtime(experts)
    blocks: dict[str, PackedBlock] = {}
    for block in moe_blocks(model):
        old: Any = block.module
        count = int(old.gate.weight.shape[0])
        packed = PackedBlock(
            block.name,
            block.router,
            made.layer(block.name),
            count=count,
            shared=experts[block.name].shape.count - count,
            shared_gate=getattr(old, "shared_expert_gate", None),
            gating=gating,
            scores=made.device is not None,
        )
        if prefetch:
            made.set_router(block.name, old.gate.weight)
        _replace(model, block.name, packed)
        blocks[block.name] = packed
    linears = {}
    for name, matrix in matrices.items():
        layer: Any = model.get_submodule(name)
        how = None if compute == "int8" and matrix.shape.format == "bf16" else compute
        linears[name] = PackedLinear(matrix, layer.bias, how)
        _replace(model, name, linears[name])
    model.requires_grad_(False)
    model.eval()
    if attention == "quernstone":
        from quernstone.attention import register_with_transformers

        register_with_transformers()
        chosen: Any = model
        chosen.set_attn_implementation("quernstone")
    changed: Any = model
    changed.quernstone = Acceleration(made, dict(experts), blocks, linears, gating)
    _change_class(changed)
    return model


def _change_class(model: Any) -> None:
    """Steps through the compiled decoder where there is one, and no saving of half a model."""
    from quernstone.moe import decoder

    kind = type(model)
    handle = model.quernstone
    steps = decoder.Decoder(model) if decoder.unsupported(model) is None else None
    handle.compiled = steps is not None

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError("model: got an accelerated one, expected a checkpoint for `moe pack`")

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Its runtime has workers, and its class is made here.
        raise TypeError(
            "model: got an accelerated one, which cannot be copied or pickled, expected one that "
            "is not; copy it before `accelerate`, or load what `moe pack` made again"
        )

    methods: dict[str, Any] = {
        "save_pretrained": save_pretrained,
        "__reduce_ex__": __reduce_ex__,
        "__module__": kind.__module__,
    }
    if steps is not None:
        methods["forward"] = _forward(kind, steps)
    # The signature is what generate() asks a model for.
    model.__class__ = type(kind.__name__, (kind,), methods)


def _forward(kind: Any, steps: Any) -> Any:
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    @functools.wraps(kind.forward)
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: Any = 0,
        **kwargs: Any,
    ) -> Any:
        if use_cache is None:
            use_cache = self.config.use_cache
        cache = past_key_values
        if use_cache and cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.config)
        others = {
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_router_logits": output_router_logits,
            **kwargs,
        }
        if steps.holds(self) and steps.takes(
            input_ids, cache, attention_mask, position_ids, logits_to_keep, others
        ):
            logits = steps(input_ids, cache, logits_to_keep)
            return MoeCausalLMOutputWithPast(logits=logits, past_key_values=cache)
        return kind.forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    return forward


def check_model(model: nn.Module, *, weights: bool = True) -> None:
    """Refuses what `accelerate` would not compute rightly.

    Args:
        weights: whether they have to be there, on the CPU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a model of transformers")
    if hasattr(model, "quernstone"):
        raise ValueError("model: got one that is accelerated already, expected one that is not")
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("model: got one that is quantised, expected weights in fp32 or bf16")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model: got {kind or type(model).__name__!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    act = getattr(config, "hidden_act", None)
    if act not in ("silu", "swish"):
        raise ValueError(f"model.config.hidden_act: got {act!r}, expected 'silu'")
    for block in moe_blocks(model):
        experts: Any = block.experts
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name, None)
            if not isinstance(weight, Tensor):
                raise ValueError(f"{block.name}.experts: got no {name}, expected stacked weights")
            if weight.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(
                    f"{block.name}.experts.{name}.dtype: got {weight.dtype}, expected "
                    "torch.float32 or torch.bfloat16"
                )
            if weights and weight.device.type != "cpu":
                raise ValueError(
                    f"{block.name}.experts.{name}.device: got {weight.device}, expected cpu"
                )
        shared = shared_of(block.module)
        for name, layer in [] if shared is None else shared.named_children():
            if getattr(layer, "bias", None) is not None:
                raise ValueError(f"{block.name}.{name}.bias: got one, expected none")


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers outside of mixtures of experts: attention, dense layers, the output."""
    inside = tuple(f"{block.name}." for block in moe_blocks(model))
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith(inside)
    }


def together(layers: Mapping[str, nn.Linear]) -> list[list[str]]:
    """Names of linear layers; queries, keys and values of a layer, where they can, in one list."""
    lists: list[list[str]] = []
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        of = [f"{parent}.{part}" for part in _QKV]
        fits = all(part in layers and not layers[part].out_features % _ROWS for part in of)
        if leaf not in _QKV or not fits:
            lists.append([name])
        elif leaf == _QKV[0]:
            lists.append(of)
    return lists


def _check_attention(attention: Attention) -> None:
    if attention not in get_args(Attention):
        raise ValueError(f"attention: got {attention!r}, expected one of {get_args(Attention)}")


def _check_options(
    options: RuntimeOptions, packing: Packing, compute: Compute, layers: int
) -> None:
    """Has a runtime of small experts refuse what can be refused before anything is packed."""
    of = packing.matrix_shape(1, 32, packing.format)
    probe = Experts.empty(ExpertsShape(1, 32, 32, of.format, of.group, of.zero_points))
    probe.compute = compute
    check_device(options.get("device"), options.get("costs"))
    bare: RuntimeOptions = {"device": None, "costs": None}
    runtime_of({**options, **bare})({str(i): probe for i in range(layers)}).close()


def _check_gating(gating: AdaptiveGating | None, blocks: Sequence[MoeBlock]) -> None:
    if gating is None:
        return
    if not isinstance(gating, AdaptiveGating):
        raise TypeError(f"gating: got {type(gating).__name__}, expected AdaptiveGating")
    for block in blocks:
        if block.name not in gating.sensitivity:
            raise ValueError(f"gating: got no sensitivity for {block.name!r}, expected one")


def _empty(experts: nn.Module) -> None:
    for parameter in experts.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
