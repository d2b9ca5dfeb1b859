"""The head-balance loss in a transformers Trainer, against a training loop written out."""

import copy
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional

from quernstone.attention import HeadBalanceMixin, HeadBalancer, schedules

from .hf_tiny import VOCABULARY, tiny
from .tolerances import U_FP32

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# Small, so that the rounding of one step does not grow in the next.
RATE = 0.01
# So large that half of the gradient of a random model comes from the balance of its heads.
OPTIONS: dict[str, Any] = {"weight": 100.0, "shared": 1}


def data(count: int, length: int = 15) -> list[dict[str, Tensor]]:
    """Sequences with padding on the right, of unequal length."""
    rng = torch.Generator().manual_seed(11)
    found = []
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (length,), generator=rng)
        tokens = int(torch.randint(4, length + 1, (), generator=rng))
        mask = (torch.arange(length) < tokens).long()
        found.append(
            {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}
        )
    return found


class Run:
    """One training run, with its gradients and the micro-batches of every step."""

    def __init__(
        self,
        folder: Path,
        model: Any,
        *,
        count: int,
        micro_batches: int,
        head_balance: dict[str, Any],
        divided: bool = False,
        **arguments: Any,
    ) -> None:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        self.gradients: list[dict[str, Tensor]] = []
        self.steps: list[list[dict[str, Tensor]]] = []
        run = self

        class BalancedTrainer(HeadBalanceMixin, Trainer):
            def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
                found = super().get_batch_samples(*args, **kwargs)
                run.steps.append(copy.deepcopy(found[0]))
                return found

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
                run.gradients.append(
                    {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                )

        self.trainer = BalancedTrainer(
            model,
            TrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=micro_batches,
                num_train_epochs=1,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                **arguments,
            ),
            train_dataset=data(count),
            eval_dataset=data(2),
            head_balance=head_balance,
            callbacks=[Watch()],
        )
        if divided:
            self.trainer.model_accepts_loss_kwargs = False
        self.trainer.train()
        self.logs = [row for row in self.trainer.state.log_history if "head_cv" in row]


def written_out(
    model: Any,
    steps: list[list[dict[str, Tensor]]],
    *,
    head_balance: dict[str, Any],
    divided: bool = False,
) -> tuple[list[dict[str, Tensor]], list[float], float]:
    """Gradients and balance losses of steps, each batch joined into one."""
    weights = head_balance["weight"]
    gradients, losses, cv = [], [], 1.0
    model.train()
    for step, parts in enumerate(steps):
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        labels = whole.pop("labels")[:, 1:]
        weight = weights(step) if callable(weights) else weights
        separate = head_balance.get("accumulation") == "separate"
        with HeadBalancer(model, **head_balance | {"weight": weight}) as balancer:
            logits = model(**whole).logits[:, :-1]
            balance = balancer.loss()
            cv = min(cv, balancer.mean_cv)
            if separate:
                shares = []
                for part in parts:
                    model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
                    shares.append(balancer.loss())
                    # Each part's loss divides by its own spread, which may be smaller.
                    cv = min(cv, balancer.mean_cv)
                balance = torch.stack(shares).mean()
        each = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
        ).view_as(labels)
        counted = labels != -100
        if divided:
            sizes = [len(part["labels"]) for part in parts]
            means = [
                x.sum() / n.sum()
                for x, n in zip(each.split(sizes), counted.split(sizes), strict=True)
            ]
            base = torch.stack(means).mean()
        else:
            base = each.sum() / counted.sum()
        model.zero_grad()
        (base + balance).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(found)
        losses.append(balance.item())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= RATE * p.grad
    return gradients, losses, cv


def assert_same(got: list[dict[str, Tensor]], want: list[dict[str, Tensor]], cv: float) -> None:
    # As in the tests of the balancer; the steps before leave their rounding in the weights.
    allowed = len(want) * (1e-6 + 8 * U_FP32 / cv)
    for found, wanted in zip(got, want, strict=True):
        assert found.keys() == wanted.keys()
        whole = torch.cat([x.flatten() for x in wanted.values()]).norm()
        for weight, x in wanted.items():
            assert (found[weight] - x).norm() <= allowed * (x.norm() + whole), weight


def model_of(name: str) -> Any:
    torch.manual_seed(1)
    model = tiny(name)
    model.set_attn_implementation("quernstone")
    return model


@pytest.mark.parametrize(
    ("name", "count", "micro_batches", "divided", "more"),
    [
        ("gpt_oss", 6, 1, False, {}),
        ("gpt_oss", 10, 2, False, {}),
        ("llama", 12, 2, False, {}),
        ("llama", 10, 2, True, {}),
        ("gpt_oss", 12, 2, False, {"accumulation": "separate"}),
        ("gpt_oss", 12, 2, True, {"weight": schedules.linear_warmup(100.0, 2)}),
    ],
    ids=[
        "one pass",
        "the last step is smaller",
        "divided by tokens",
        "divided by micro-batches",
        "separate",
        "schedule",
    ],
)
def test_gradients_of_each_step_are_those_of_a_loop_written_out(
    tmp_path: Path,
    name: str,
    count: int,
    micro_batches: int,
    divided: bool,
    more: dict[str, Any],
) -> None:
    head_balance = OPTIONS | more
    run = Run(
        tmp_path,
        model_of(name),
        count=count,
        micro_batches=micro_batches,
        head_balance=head_balance,
        divided=divided,
    )
    want, losses, cv = written_out(
        model_of(name), run.steps, head_balance=head_balance, divided=divided
    )
    assert len(run.gradients) == len(want) == 3
    assert_same(run.gradients, want, cv)
    logged = [row["head_balance_loss"] for row in run.logs]
    assert logged == pytest.approx(losses, rel=1e-4)


def train_on_rank(rank: int, folder: str, port: int) -> None:
    """What a process of the next test runs."""
    torch.set_num_threads(1)
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
    }
    model, options = model_of("gpt_oss"), {"micro_batches": 2, "head_balance": OPTIONS}
    run = Run(Path(folder), model, count=16, ddp_backend="gloo", **options)
    found = {"gradients": run.gradients, "steps": run.steps, "logs": run.logs}
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_gradients_on_two_ranks_are_those_of_a_loop_over_both(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(
        train_on_rank, (str(tmp_path), port), nprocs=2, start_method="spawn"
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    steps = [a + b for a, b in zip(*(rank["steps"] for rank in ranks), strict=True)]
    want, losses, cv = written_out(model_of("gpt_oss"), steps, head_balance=OPTIONS)
    assert len(want) == 2
    for rank in ranks:
        found = [
            {name.removeprefix("module."): x for name, x in step.items()}
            for step in rank["gradients"]
        ]
        assert_same(found, want, cv)
    logged = [row["head_balance_loss"] for row in ranks[0]["logs"]]
    assert logged == pytest.approx(losses, rel=1e-4)


def test_the_balance_is_what_makes_the_difference(tmp_path: Path) -> None:
    """Without it the comparison above must fail."""
    run = Run(tmp_path, model_of("gpt_oss"), count=4, micro_batches=2, head_balance={"weight": 0.0})
    want, _, _ = written_out(model_of("gpt_oss"), run.steps, head_balance=OPTIONS)
    sinks = "model.layers.0.self_attn.sinks"
    assert (run.gradients[0][sinks] - want[0][sinks]).norm() > 0.1 * want[0][sinks].norm()


def test_evaluation_and_checkpointing_between_steps_change_nothing(tmp_path: Path) -> None:
    plain = Run(tmp_path, model_of("gpt_oss"), count=8, micro_batches=2, head_balance=OPTIONS)
    other = Run(
        tmp_path,
        model_of("gpt_oss"),
        count=8,
        micro_batches=2,
        head_balance=OPTIONS,
        eval_strategy="steps",
        eval_steps=1,
        activation_checkpointing=True,
    )
    for got, want in zip(other.gradients, plain.gradients, strict=True):
        for weight, x in want.items():
            torch.testing.assert_close(got[weight], x, msg=weight)
    evaluated = [row for row in other.trainer.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 2
    assert not any("head_cv" in row for row in evaluated)


def test_logs_cv_and_mean_gate_and_leaves_the_model_unwatched(tmp_path: Path) -> None:
    run = Run(tmp_path, model_of("gpt_oss"), count=8, micro_batches=2, head_balance=OPTIONS)
    assert len(run.logs) == 2
    for row in run.logs:
        assert 0.0 < row["mean_gate"] < 1.0
        assert row["head_cv"] > 0.0
        assert row["loss"] > row["head_balance_loss"] > 0.0
    model = run.trainer.model
    assert not model._forward_hooks
    run.trainer.evaluate()
    with HeadBalancer(model):
        pass


def test_says_what_it_cannot_train(tmp_path: Path) -> None:
    model = model_of("gpt_oss")
    with pytest.raises(ValueError, match="shared: got -1"):
        Run(tmp_path, model, count=2, micro_batches=1, head_balance={"shared": -1})
    model.set_attn_implementation("eager")
    for micro_batches in (1, 2):
        with pytest.raises(ValueError, match="nothing recorded"):
            Run(tmp_path, model, count=4, micro_batches=micro_batches, head_balance=OPTIONS)
        assert not model._forward_hooks
    model.set_attn_implementation("quernstone")
    with pytest.raises(ValueError, match=r"args.torch_compile: got True"):
        Run(
            *(tmp_path, model),
            count=2,
            micro_batches=1,
            head_balance=OPTIONS,
            torch_compile=True,
            torch_compile_backend="eager",
        )
