"""The head-balance loss in the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quernstone.attention.balancer import HeadBalancer


class HeadBalanceMixin:
    """Adds the head-balance loss to what a transformers Trainer minimises.

        class BalancedTrainer(HeadBalanceMixin, Trainer): ...
        BalancedTrainer(model, args, train_dataset=data, head_balance={"weight": 1e-2}).train()

    A callback of the Trainer cannot change the loss, so this stands before the Trainer, or one of
    its subclasses, in the order of base classes. The model must run with
    attn_implementation="quernstone" and without attention dropout. With
    gradient_accumulation_steps above 1 each step begins with a forward pass of all its
    micro-batches without gradients (`HeadBalancer.measure`), unless `head_balance` holds
    "accumulation": "separate". The gradient is right whether the Trainer divides the losses by
    the number of micro-batches or the model by the number of tokens. A schedule as weight sees
    the Trainer's global step.

    Logs, beside a `loss` that includes it: `head_balance_loss`, its mean since the last log, and
    of the last batch `head_cv`, the imbalance of the paper, and `mean_gate`, which tells a
    balance by work from one by open gates.

    Several processes work with DistributedDataParallel; DeepSpeed, FSDP and tensor or sequence
    parallelism are untested.

    Args:
        *args, **kwargs: of the Trainer.
        head_balance: options of `HeadBalancer`.

    Raises:
        ValueError: an option that `HeadBalancer` refuses; nn.DataParallel (several GPUs in one
            process) or torch.compile, when training starts.

    Source: transformers 5.23, `Trainer.compute_loss` and `Trainer.training_step` (what is divided
    by what). Oracle: a training loop written out.
    """

    model: Any
    args: Any
    state: Any
    current_gradient_accumulation_steps: int

    def __init__(
        self, *args: Any, head_balance: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._head_balance = dict(head_balance or {})
        if self.model is not None:
            # Refuses wrong options now rather than after the data have been loaded.
            HeadBalancer(self.model, **self._head_balance)
        self._balancer: HeadBalancer | None = None
        self._loss_sum: Tensor | float = 0.0
        self._loss_steps = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave the model unwatched whatever happens."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self._balancer is not None:
                self._balancer.detach()
                self._balancer = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, after their importance has been measured."""
        found = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        balancer = self._watch()
        balancer.reset()
        if len(found[0]) > 1 and balancer.accumulation == "measured":
            self.model.train()
            balancer.measure(found[0], self._measure)
        self._loss_steps += len(found[0]) > 0
        return found

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss and, in training, the head-balance loss."""
        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if self._balancer is not None and self.model.training:
            parts = self.current_gradient_accumulation_steps
            balance = self._balancer.loss(micro_batches=parts, step=self.state.global_step)
            self._loss_sum = self._loss_sum + balance.detach()
            loss = loss + (balance if self._scaled(num_items_in_batch) else balance * parts)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the balance of the heads beside the training loss."""
        if "loss" in logs and self._balancer is not None and self._loss_steps:
            logs["head_balance_loss"] = float(self._loss_sum) / self._loss_steps
            logs["head_cv"] = self._balancer.mean_cv
            logs["mean_gate"] = self._balancer.mean_gate
            self._loss_sum, self._loss_steps = 0.0, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _watch(self) -> HeadBalancer:
        if self._balancer is None:
            if self.args.n_gpu > 1:
                raise ValueError(
                    f"args: got {self.args.n_gpu} GPUs in one process (nn.DataParallel), expected "
                    "one process for each"
                )
            if self.args.torch_compile:
                raise ValueError("args.torch_compile: got True, expected False")
            # Not before: `model_init` makes the model when training starts.
            self._balancer = HeadBalancer(self.model, **self._head_balance).attach()
            self._loss_sum, self._loss_steps = 0.0, 0
        return self._balancer

    def _measure(self, batch: Mapping[str, Any]) -> object:
        inputs = self._prepare_inputs(batch)  # type: ignore[attr-defined]
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            return self.model(**inputs)

    def _scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer leaves the loss as it is; else it divides it by the micro-batches."""
        told: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return told
        by_model = getattr(self, "model_accepts_loss_kwargs", False)
        by_function = getattr(self, "compute_loss_func", None) is not None
        return (by_model and num_items_in_batch is not None) or by_function
