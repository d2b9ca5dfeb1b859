"""What every training here has in common: the schedule, one order of sums, states to go on from."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Balance:
    """Arguments of `quernstone.attention.head_balance_loss`."""

    weight: float = 1e-2
    shared: int = 0
    skip_layers: int = 0
    correction: int = 0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a training needs beside its model and its data; `seed` gives the order of the data."""

    steps: int
    seed: int = 0
    balance: Balance | None = None
    learning_rate: float
    warmup: int
    floor: float = 0.1
    """Of the learning rate, what the cosine ends at."""
    clip: float = 1.0
    threads: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        balance = values["balance"]
        return cls(**{**values, "balance": None if balance is None else Balance(**balance)})

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then half a cosine to `floor`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        share = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * share


@contextmanager
def same_bits(threads: int) -> Iterator[None]:
    """Deterministic algorithms and a fixed number of threads: the same sums on every run."""
    filling = torch.utils.deterministic
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = filling.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it writes it, and filling costs a tenth of a step.
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        filling.fill_uninitialized_memory = filled


class Loop(ABC):
    """Trains `trained` by AdamW step after step; `save` and `load` go on where another stopped.

    Args:
        trained: what is trained, by name; changed in place.
        decayed: the weight decay of matrices; vectors have none.
        faster: by the end of a name, the factor on the learning rate of what bears it.
        log_every: steps that a point of the curve is a mean of.
    """

    def __init__(
        self,
        schedule: Schedule,
        trained: Mapping[str, nn.Parameter],
        *,
        decayed: float,
        betas: tuple[float, float],
        log_every: int,
        faster: Mapping[str, float] | None = None,
    ) -> None:
        self.schedule, self.trained, self.step = schedule, dict(trained), 0
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, weight in trained.items():
            factor = next((f for end, f in (faster or {}).items() if name.endswith(end)), 1.0)
            decay = decayed if weight.dim() > 1 else 0.0
            groups.setdefault((factor, decay), []).append(weight)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": weights, "factor": factor, "weight_decay": decay}
                for (factor, decay), weights in groups.items()
            ],
            lr=0.0,
            betas=betas,
            fused=True,
        )
        self._log_every = log_every
        self.curve: list[list[float]] = []
        """[step, loss, CV, mean gate] of the training batches."""
        self._recent: list[list[float]] = []

    @abstractmethod
    def loss(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The loss of a step's batch in nats, and the importance [l, h], both with gradients."""

    def objective(self, step: int) -> tuple[Tensor, list[float]]:
        """What is minimised, with its gradient, and the figures of the curve."""
        loss, importance = self.loss(step)
        if importance is None:
            return loss, [loss.item(), math.nan, math.nan]
        figures = [loss.item(), mean_cv(importance), importance.detach().mean().item()]
        if self.schedule.balance is not None:
            from quernstone.attention import head_balance_loss

            loss = loss + head_balance_loss(importance, **asdict(self.schedule.balance))
        return loss, figures

    def run(
        self,
        until: int | None = None,
        *,
        state: Path | None = None,
        save_every: int = 50,
        each: Callable[[Self], None] | None = None,
    ) -> None:
        """Trains up to a step, by default to the end.

        Args:
            state: where `save` writes to after every `save_every` steps and after the last.
            each: called after every step.
        """
        schedule = self.schedule
        with same_bits(schedule.threads):
            while self.step < schedule.steps and (until is None or self.step < until):
                for group in self._optimizer.param_groups:
                    group["lr"] = group["factor"] * schedule.rate(self.step)
                self._optimizer.zero_grad()
                total, figures = self.objective(self.step)
                total.backward()
                torch.nn.utils.clip_grad_norm_(self.trained.values(), schedule.clip)
                self._optimizer.step()
                self.step += 1
                self._note(figures)
                done = self.step == schedule.steps
                if state is not None and (done or self.step % save_every == 0):
                    self.save(state)
                if each is not None:
                    each(self)

    def _note(self, figures: list[float]) -> None:
        self._recent.append(figures)
        if self.step % self._log_every == 0 or self.step == self.schedule.steps:
            mean = np.mean(self._recent, axis=0).tolist()
            self.curve.append([self.step, *(round(x, 6) for x in mean)])
            self._recent = []

    def save(self, path: Path) -> None:
        """Writes everything that `load` needs; a run that is killed leaves the older file."""
        state = {
            "schedule": self.schedule.to_dict(),
            "trained": {name: weight.detach() for name, weight in self.trained.items()},
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "curve": self.curve,
            "recent": self._recent,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".part")
        torch.save(state, fresh)
        fresh.replace(path)

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote.

        Raises:
            ValueError: the file is damaged, or of another schedule or model.
        """
        try:
            with warnings.catch_warnings():
                # Of garbage torch says first that its pickle is of an unknown protocol.
                warnings.simplefilter("ignore", UserWarning)
                state = torch.load(path, weights_only=True)
            schedule, trained = state["schedule"], state["trained"]
        except FileNotFoundError:
            raise
        except Exception as error:
            # Unpickling garbage may raise anything.
            raise ValueError(
                f"{path.name}: got a damaged file ({type(error).__name__}), expected the state of "
                "a training; remove it to train anew"
            ) from None
        if schedule != self.schedule.to_dict():
            raise ValueError(f"{path.name}: got {schedule}, expected {self.schedule.to_dict()}")
        shapes = {name: weight.shape for name, weight in trained.items()}
        expected = {name: weight.shape for name, weight in self.trained.items()}
        if shapes != expected:
            raise ValueError(f"{path.name}: got weights of another model, expected {expected}")
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(trained[name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.curve, self._recent = state["step"], state["curve"], state["recent"]


def mean_cv(importance: Tensor | Sequence[Sequence[float]]) -> float:
    """Mean over layers of the coefficient of variation over heads, variance over h.

    A layer whose gates are all 0 counts as balanced.
    """
    x = torch.as_tensor(importance).detach().double()
    mean = x.mean(1)
    ratio = x.std(1, correction=0) / torch.where(mean > 0, mean, 1.0)
    return float(ratio.mean())
