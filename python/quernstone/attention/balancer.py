"""The head-balance loss of a model: importances gathered over layers, micro-batches and ranks.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.

The squared variation is not linear in the importance, so the importance of the whole batch comes
first. With n_r tokens in part r (a micro-batch on a rank), N = sum n_r, W ranks and L the loss,

    x = sum_r n_r Imp_r / N,  dL/dImp_r = (n_r / N) dL/dx,

of which every part computes its own share from W (n_r / N) (Imp_r - stop(Imp_r)) + stop(x): the
value of x and, after the mean over ranks that data parallelism takes, its gradient.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from quernstone.attention.api import sink_attention
from quernstone.attention.balance import (
    SharedHeads,
    check_options,
    head_balance_loss,
    head_variation,
)
from quernstone.attention.hf import PROBE
from quernstone.attention.hf_gates import fuse_gates, unfuse_gates, unfused
from quernstone.attention.hf_mask import KeyMask
from quernstone.attention.schedules import Schedule
from quernstone.attention.token_count import counted_tokens, token_mask

Accumulation = Literal["measured", "separate"]

_Tensors = tuple[Tensor, Tensor, Tensor]
_Records = dict[str, list[tuple[Tensor, Tensor]]]


class HeadBalancer:
    """Collects the importance of every head of a model as it trains, and makes the loss of it.

        balancer = HeadBalancer(model)
        with balancer:
            for batch in batches:
                loss = model(**batch).loss + balancer.loss()
                loss.backward()
                ...

    Works with transformers models that run with attn_implementation="quernstone" (the gates of
    Qwen3-Next are fused while it is attached) and with `SinkAttention` layers. Only passes through
    the given model in training mode are recorded. Passes without a loss between them are one
    batch; `reset` forgets them. A layer that is called several times in a pass counts once, with
    the mean over its calls. The weights are averaged over ranks as by DistributedDataParallel;
    other ways to distribute a model are untested.

    A batch in several micro-batches needs its importance before the first backward pass:

        for micro_batches in batches:
            balancer.measure(micro_batches)
            for batch in micro_batches:
                loss = model(**batch).loss / len(micro_batches)
                (loss + balancer.loss(micro_batches=len(micro_batches))).backward()

    That is exact and costs one more forward pass of the model without gradients. With
    accumulation="separate" there is none: each micro-batch is balanced by itself. The noise of
    its importances adds to their variation, so that the loss is too large, the more so the
    smaller the micro-batches are.

    Activation checkpointing works with use_reentrant=False; the reentrant kind hides the
    importance from autograd and is refused, and so is a compiled model. A copy or pickle of an
    attached model is not attached. A pass that raises leaves nothing behind.

    Args:
        model: to watch, or the DistributedDataParallel around it.
        weight: of the loss, or a function of the step, see `quernstone.attention.schedules`.
        shared, skip_layers, correction, shared_heads: as in `head_balance_loss`. Layers count in
            the order of the model's modules, from the time when they have first run.
        skip_first: leave out so many tokens at the start of each sequence. It is not known to us
            whether the paper counts the first one, which sees itself alone; here 0 counts it,
            where there is something to see (kind "vanilla": never).
        count_padding: let padding tokens count where they see a key. It is not known to us
            whether the paper does.
        accumulation: "measured" or "separate", see above.
        process_group: over whose ranks a batch is spread; None is that of the
            DistributedDataParallel, else the default one where torch.distributed is initialised.
            A process that trains alone there needs a group of its own.

    Raises:
        ValueError: an argument out of range; nn.DataParallel; a compiled model.

    Source: arXiv 2602.01203 (importance, loss, shared heads); the reduction is derived above.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float | Schedule = 1e-2,
        shared: int = 0,
        skip_layers: int = 0,
        correction: int = 0,
        shared_heads: SharedHeads | None = None,
        skip_first: int = 0,
        count_padding: bool = False,
        accumulation: Accumulation = "measured",
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        constant = 0.0 if callable(weight) else weight
        check_options(constant, shared, skip_layers, correction, shared_heads)
        if skip_first < 0:
            raise ValueError(f"skip_first: got {skip_first}, expected 0 or more")
        if accumulation not in get_args(Accumulation):
            raise ValueError(
                f"accumulation: got {accumulation!r}, expected 'measured' or 'separate'"
            )
        if isinstance(model, nn.DataParallel):
            raise ValueError("model: got nn.DataParallel, expected DistributedDataParallel")
        if isinstance(model, DistributedDataParallel):
            process_group = process_group or model.process_group
            model = model.module
        self.model = model
        self.weight = weight
        self.shared = shared
        self.skip_layers = skip_layers
        self.correction = correction
        self.shared_heads = shared_heads
        self.skip_first = skip_first
        self.count_padding = count_padding
        self.accumulation = accumulation
        self.process_group = process_group

        self._handles: list[Callable[[], None]] = []
        self._order: dict[int, tuple[int, str]] = {}
        self._positions: dict[str, int] = {}
        self._records: _Records = {}
        self._pass: _Records | None = None
        self._pass_has_grad = False
        self._records_have_grad = False
        self._measuring = False
        self._measured: _Batch | None = None
        self._importance: dict[str, Tensor] = {}

    def attach(self) -> HeadBalancer:
        """Watch the model from now on.

        Raises:
            ValueError: it is attached already, another balancer watches the model, or it is
                compiled.
        """
        if self._handles:
            raise ValueError("model: this balancer is attached already")
        modules = list(self.model.named_modules())
        for name, module in modules:
            # A copy of an attached model holds None.
            if module.__dict__.get(PROBE) is not None:
                raise ValueError(f"model: {name or 'it'} is watched by somebody else already")
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise ValueError(
                    f"model: {name or 'it'} is compiled, expected what torch.compile was given"
                )
        self._order = {id(module): (i, name) for i, (name, module) in enumerate(modules)}
        if unfused(self.model):
            fuse_gates(self.model)
            self._handles.append(lambda: unfuse_gates(self.model))
        probe = _Attached(self._attend, None)
        for _, module in modules:
            module.__dict__[PROBE] = probe
        self._handles.append(lambda: _unprobe(modules))
        hooks = (
            self.model.register_forward_pre_hook(_Attached(self._open, _do_nothing)),
            self.model.register_forward_hook(_Attached(self._keep, _do_nothing)),
            # After an error too.
            self.model.register_forward_hook(_Attached(self._close, _do_nothing), always_call=True),
        )
        self._handles.extend(hook.remove for hook in hooks)
        return self

    def detach(self) -> None:
        """Leave the model as it was, and forget what has been recorded."""
        for remove in self._handles:
            remove()
        self._handles.clear()
        self.reset()

    def __enter__(self) -> HeadBalancer:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Forget passes that no loss has been made of, and what was measured."""
        self._records = {}
        self._records_have_grad = False
        self._pass = None
        self._measured = None

    def measure(
        self,
        micro_batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        """Run the micro-batches of a step without gradients, for the importance of all of them.

        The losses that follow, one for each micro-batch, take their values from it. Random
        numbers of torch are drawn again by the passes that follow, so that dropout outside
        attention is the same. What a pass changes in the model, such as running statistics,
        changes twice. The model stays in its mode, training or not. With
        accumulation="separate" only `importance` is set. On several ranks all must call it.

        Args:
            micro_batches: keyword arguments of the model.
            forward: what to call with each of them instead of the model.

        Raises:
            ValueError: no micro-batch, no recorded layer, or ranks that do not fit.
        """
        self.reset()
        cuda = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
        count = 0
        self._measuring = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=sorted(cuda)):
                for batch in micro_batches:
                    count += 1
                    self.model(**batch) if forward is None else forward(batch)
            batch_of_all = self._gather(self._records, count)
        finally:
            self._measuring = False
            self._records = {}
            self._records_have_grad = False
        if self.accumulation == "measured":
            self._measured = batch_of_all

    def loss(self, *, micro_batches: int = 1, step: int | None = None) -> Tensor:
        """The loss of what has been recorded since the last one, to be added to the model's own.

        Over the micro-batches of a step values and gradients add up to those of the whole batch;
        over ranks their mean does. So it is not to be divided by the number of micro-batches.
        Without grad mode it is a number without a gradient, as everything in torch.

        Args:
            micro_batches: whose gradients are added up in this step.
            step: number of the optimiser step, for a `weight` that is a schedule.

        Returns:
            A scalar in the dtype of the importances, fp32.

        Raises:
            ValueError: nothing has been recorded, or in grad mode nothing with grad; several
                micro-batches without `measure`, or not as many as it has seen; a schedule without
                `step`; ranks that do not fit; layers that `measure` did not see; `shared`,
                `skip_layers` or `shared_heads` that do not fit the layers.

        On several ranks all must call it, and all raise if their layers differ.
        """
        # Whatever is wrong below, the next step starts afresh.
        records, self._records = self._records, {}
        has_grad, self._records_have_grad = self._records_have_grad, False
        weight = self._weight(step)
        if micro_batches < 1:
            raise ValueError(f"micro_batches: got {micro_batches}, expected 1 or more")
        measured = self._measured
        if measured is None and micro_batches != 1 and self.accumulation == "measured":
            raise ValueError(
                f"micro_batches: got {micro_batches} without measure(), expected 1; or take "
                'accumulation="separate"'
            )
        if measured is not None and micro_batches != measured.micro_batches:
            raise ValueError(
                f"micro_batches: got {micro_batches}, expected the {measured.micro_batches} that "
                "measure() has seen"
            )
        if measured is None:
            batch = self._gather(records, micro_batches)
        else:
            batch = measured
            batch.left -= 1
            if batch.left == 0:
                self._measured = None
        _refuse_nothing(records)
        if torch.is_grad_enabled() and not has_grad:
            raise ValueError(
                "HeadBalancer: got passes without grad alone, expected one with grad, activation "
                "checkpointing with use_reentrant=False, or loss() without grad too"
            )
        total = self._balance(batch, records, weight)
        if measured is None:
            return total / micro_batches
        # Its gradient is a share already, its value is that of the whole batch.
        return total - total.detach() * (1.0 - 1.0 / micro_batches)

    @property
    def importance(self) -> dict[str, Tensor]:
        """[h] of each layer by name, of the last batch that was measured or made a loss of.

        Empty before. `list(balancer.importance.values())` suits `most_important`.
        """
        return dict(self._importance)

    @property
    def mean_cv(self) -> float:
        """Mean over layers of the CV over all heads of `importance`: the paper's imbalance."""
        return float(head_variation(list(self._importance.values())).mean())

    @property
    def mean_gate(self) -> float:
        """Mean of `importance`. If it rises while the CV falls, gates were opened, not balanced."""
        return float(torch.stack([x.mean() for x in self._importance.values()]).mean())

    def _weight(self, step: int | None) -> float:
        if not callable(self.weight):
            return self.weight
        if step is None:
            raise ValueError("step: got None, expected a number with a schedule as weight")
        return self.weight(step)

    def _open(self, *_: object) -> None:
        # What is checkpointed runs again inside backward(), and has been recorded before.
        again = torch._C._current_graph_task_id() != -1
        self._pass = None if again else {}
        self._pass_has_grad = torch.is_grad_enabled()

    def _keep(self, *_: object) -> None:
        if self._pass:
            self._records_have_grad |= self._pass_has_grad
        for name, calls in (self._pass or {}).items():
            self._records.setdefault(name, []).extend(calls)

    def _close(self, *_: object) -> None:
        self._pass = None

    def _attend(
        self, module: nn.Module, tensors: _Tensors, options: dict[str, Any], mask: KeyMask
    ) -> Tensor:
        """What the layers call instead of `sink_attention`."""
        if torch.compiler.is_compiling():
            raise RuntimeError("HeadBalancer: cannot be compiled; detach it or do without compile")
        if not (module.training or self._measuring):
            plain: Tensor = sink_attention(*tensors, **options)
            return plain
        q, k, _ = tensors
        tokens = token_mask(
            mask, count_padding=self.count_padding, skip_first=self.skip_first, device=q.device
        )
        # In the second run of a checkpointed block too, which must save what the first one saved.
        out, aux = sink_attention(*tensors, **options, token_mask=tokens, return_aux=True)
        if self._pass is None:
            return out
        place, name = self._order[id(module)]
        if self._pass_has_grad and not torch.is_grad_enabled():
            raise ValueError(
                f"{name}: got a call without grad in a pass with grad, expected activation "
                "checkpointing with use_reentrant=False"
            )
        given = ("kind", "causal", "window", "key_start", "key_lengths")
        count = counted_tokens(
            *(q.shape[0], q.shape[2], k.shape[2]),
            **{x: options[x] for x in given},
            token_mask=tokens,
            device=q.device,
        )
        self._positions[name] = place
        self._pass.setdefault(name, []).append((aux.importance, count))
        return out

    def _balance(self, batch: _Batch, records: _Records, weight: float) -> Tensor:
        unseen = records.keys() - batch.mean.keys()
        if unseen:
            raise ValueError(f"measure: has not seen {sorted(unseen)}, which ran in this pass")
        layers = sorted(self._positions, key=self._positions.__getitem__)
        if self.skip_layers >= len(layers):
            raise ValueError(
                f"skip_layers: got {self.skip_layers}, expected fewer than {len(layers)} layers"
            )
        sets: dict[str, Any] = {}
        if self.shared_heads is not None:
            if len(self.shared_heads) != len(layers):
                raise ValueError(
                    f"shared_heads: got {len(self.shared_heads)} layers, expected {len(layers)}"
                )
            sets = dict(zip(layers, self.shared_heads, strict=True))
        balanced = [name for name in layers[self.skip_layers :] if name in batch.mean]
        if not balanced:
            raise ValueError(f"skip_layers: got {self.skip_layers}, and no later layer has run")
        dtype = next(iter(records.values()))[0][0].dtype
        total = head_balance_loss(
            [batch.joined(name, records.get(name, [])) for name in balanced],
            weight=weight,
            shared=self.shared,
            correction=self.correction,
            shared_heads=[sets[name] for name in balanced] if sets else None,
        )
        return total.to(dtype)

    def _gather(self, records: _Records, micro_batches: int) -> _Batch:
        """The importance of all that is recorded, here and on the other ranks."""
        names = sorted(records, key=self._positions.__getitem__)
        heads = [len(records[name][0][0]) for name in names]
        ranks = self._ranks()
        if ranks > 1:
            self._agree(names, heads)
        _refuse_nothing(records)
        device = records[names[0]][0][0].device
        tokens, weighted = [], []
        for name in names:
            calls = records[name]
            counts = [count.to(device, torch.float64) for _, count in calls]
            tokens.append(torch.stack(counts).sum())
            gates = [
                # A head that is NaN stays so, also where no token counts.
                n * x.detach().to(device, torch.float64)
                for (x, _), n in zip(calls, counts, strict=True)
            ]
            weighted.append(torch.stack(gates).sum(0))
        flat = torch.cat([torch.stack(tokens), *weighted])
        if ranks > 1:
            distributed.all_reduce(flat, group=self.process_group)
        tokens_by_layer, *sums = flat.split([len(names), *heads])
        batch = _Batch(micro_batches, ranks)
        for name, n, total in zip(names, tokens_by_layer, sums, strict=True):
            batch.tokens[name] = n.clamp(min=1.0)
            batch.mean[name] = total / batch.tokens[name]
        self._importance = {name: x.float() for name, x in batch.mean.items()}
        return batch

    def _ranks(self) -> int:
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self.process_group)

    def _agree(self, names: list[str], heads: list[int]) -> None:
        """Raise on every rank unless all have the same layers: what follows would hang."""
        digest = zlib.crc32(repr((names, heads)).encode())
        device = next(self.model.parameters()).device
        mine = torch.tensor([len(names), sum(heads), digest], dtype=torch.int64, device=device)
        all_of_them = [torch.empty_like(mine) for _ in range(self._ranks())]
        distributed.all_gather(all_of_them, mine, group=self.process_group)
        found = [tuple(x.tolist()) for x in all_of_them]
        if len(set(found)) > 1:
            what = ", ".join(
                f"rank {rank} recorded {layers} layers with {total} heads"
                for rank, (layers, total, _) in enumerate(found)
            )
            raise ValueError(f"layers: got other ones on other ranks ({what}), expected the same")


@dataclass
class _Batch:
    """The importance of a whole batch."""

    micro_batches: int
    ranks: int
    left: int = 0
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """fp64 scalar by layer, at least 1."""
    mean: dict[str, Tensor] = field(default_factory=dict)
    """fp64 [h] by layer."""

    def __post_init__(self) -> None:
        self.left = self.micro_batches

    def joined(self, name: str, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The mean, with the gradient that some of the calls have a share in."""
        x = self.mean[name]
        for importance, count in calls:
            share = self.ranks * count.to(x.device) / self.tokens[name]
            own = importance.to(x.device, torch.float64)
            x = x + share * (own - own.detach())
        return x


class _Attached:
    """What a balancer leaves in a model. In a copy of the model `instead` takes its place."""

    def __init__(self, call: Callable[..., Any], instead: Callable[..., Any] | None) -> None:
        self._call = call
        self._instead = instead

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        return _itself, (self._instead,)


def _unprobe(modules: list[tuple[str, nn.Module]]) -> None:
    for _, module in modules:
        module.__dict__.pop(PROBE, None)


def _itself(x: Any) -> Any:
    return x


def _do_nothing(*_: object) -> None:
    return None


def _refuse_nothing(records: _Records) -> None:
    if not records:
        raise ValueError(
            "HeadBalancer: nothing recorded, expected a pass through the model that it was given, "
            'attached and in training mode, with attn_implementation="quernstone" or SinkAttention'
        )
