"""Whole models through `accelerate`: the first token of a prompt, and every token after it."""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quernstone.bench import limits, machine
from quernstone.bench.bench_moe_routing import gated_by
from quernstone.bench.cases import moe_model as cases
from quernstone.bench.harness import Absent, Check, Measure, Rival, rows
from quernstone.bench.rivals import ik_llama, ik_model
from quernstone.bench.tinylm import experts as tiny
from quernstone.bench.tinylm.corpus import HELD_OUT
from quernstone.moe import AdaptiveGating
from quernstone.moe.experts import Compute
from quernstone.moe.routing import moe_blocks

Name = Literal["mixtral4", "top2of16"]
What = Literal["decode", "ttft128", "ttft1024"]

PREFIX = 128
LONGEST = 512
PROBE = [7, 123]
# Of logits, relative: activations of 8 bits in front of some thirty products in a row, on both
# sides; bf16 between the layers of transformers. Measured at 0.02.
TOLERANCE = 0.08


@functools.lru_cache(maxsize=2)
def original(name: Name) -> Any:
    """The model of transformers, bf16."""
    if name == "mixtral4":
        return cases.large()
    return cases.of_tinylm(tiny.load(name)).bfloat16()


@functools.lru_cache(maxsize=2)
def accelerated(name: Name, compute: Compute) -> Any:
    return cases.packed_copy(original(name), compute=compute)


def text(name: Name, count: int) -> Tensor:
    """[1, count] tokens: held-out text for the trained model, random ones for the other."""
    if name == "mixtral4":
        generator = torch.Generator().manual_seed(3)
        return torch.randint(cases.VOCABULARY, (1, count), generator=generator)
    windows = torch.cat([part.flatten() for part in itertools.islice(tiny.batches(HELD_OUT), 16)])
    return windows[None, :count].long()


class Decoding:
    """One token after the other behind a prompt, which begins anew before it grows too long.

    Args:
        experts: transformers' implementation of the steps, of which one gathers the weights of
            every token: it is not for the prompt.
    """

    def __init__(self, model: Any, ids: Tensor, experts: str | None = None) -> None:
        self._model, self._ids, self._at = model, ids, PREFIX
        self._experts = experts
        self._cache: Any = None

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            if self._cache is None or self._at >= LONGEST:
                self._at = PREFIX
                if self._experts:
                    self._model.set_experts_implementation("eager")
                first = self._model(self._ids[:, :PREFIX], logits_to_keep=1, use_cache=True)
                self._cache = first.past_key_values
                if self._experts:
                    self._model.set_experts_implementation(self._experts)
            token = self._ids[:, self._at : self._at + 1]
            self._at += 1
            found: Tensor = self._model(token, past_key_values=self._cache).logits
        return found


def prompt(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(ids, logits_to_keep=1, use_cache=True).logits
        return found

    return run


def prompt_of(what: What, ids: Tensor) -> Tensor:
    return ids[:, : int(what.removeprefix("ttft"))]


def runner(model: Any, what: What, ids: Tensor, experts: str | None = None) -> Callable[[], Tensor]:
    if what == "decode":
        return Decoding(model, ids, experts)
    return prompt(model, prompt_of(what, ids))


def error_of(model: Any, want: Tensor, probe: list[int] = PROBE) -> float:
    with torch.inference_mode():
        got = model(torch.tensor([probe]), logits_to_keep=1).logits[0, -1].float()
    return float((got - want).norm() / want.norm())


def check_of(
    name: Name,
    model: Any,
    weight: Callable[[str, int | None], Tensor],
    probe: list[int] = PROBE,
) -> Check:
    want = wanted(name, weight, probe)
    return Check(lambda _: error_of(model, want, probe), TOLERANCE)


def wanted(
    name: Name,
    weight: Callable[[str, int | None], Tensor],
    probe: list[int] = PROBE,
    *,
    onto_normed: bool = False,
) -> Tensor:
    of = ik_model.model_of(original(name).config)
    with torch.inference_mode():
        return ik_model.logits(of, weight, probe, onto_normed=onto_normed)


def transformers_rival(name: Name, what: What, ids: Tensor) -> Rival:
    """In bf16, with the fastest of its implementations of experts here."""
    model = original(name)
    seconds: dict[str, float] = {}
    for kind in ("eager", "batched_mm", "grouped_mm"):
        if kind == "batched_mm" and what != "decode" and name == "mixtral4":
            continue  # gathers the weights of every token
        model.set_experts_implementation(kind)
        run = runner(model, what, ids, kind)
        run()
        start = time.perf_counter()
        run()
        seconds[kind] = time.perf_counter() - start
    best = min(seconds, key=lambda kind: seconds[kind])
    model.set_experts_implementation(best)
    version = f"{machine.version('transformers')} bf16, {best}"
    check = check_of(name, model, cases.weight_of(model))
    return Rival("transformers", runner(model, what, ids, best), check, {"transformers": version})


@functools.lru_cache(maxsize=1)
def gguf_of(name: Name) -> Path:
    """A file that lasts as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="quernstone-gguf-")
    _folders.append(folder)
    path = Path(folder.name) / f"{name}.gguf"
    model = original(name)
    ik_model.write_mixtral(
        path, model.config, lambda key: model.get_parameter(key).detach(), "Q4_0"
    )
    return path


_folders: list[tempfile.TemporaryDirectory[str]] = []


@functools.lru_cache(maxsize=1)
def ik_session(name: Name, threads: int) -> ik_llama.Session:
    return ik_llama.Session(gguf_of(name), threads=threads)


@functools.lru_cache(maxsize=2)
def ik_wanted(name: Name) -> Tensor:
    """With the weights as Q4_0 holds them, and added up as version 0.1.5 does."""
    plain = cases.weight_of(original(name))

    def weight(key: str, expert: int | None) -> Tensor:
        found = plain(key, expert)
        exact = found.ndim == 1 or "embed" in key or ".gate.weight" in key
        return found if exact else ik_model.rounded(found, "Q4_0")

    return wanted(name, weight, onto_normed=True)


def ik_rival(name: Name, what: What, threads: int, ids: Tensor) -> Rival | Absent:
    if machine.version(ik_llama.IK) is None:
        return Absent(ik_llama.IK, ik_llama.GET_IK)
    session = ik_session(name, threads)
    numbers: list[int] = ids[0].tolist()
    want = ik_wanted(name)

    def decode() -> object:
        if not PREFIX <= session.position < LONGEST:
            session.clear()
            session.step(numbers[:PREFIX])
        return session.step([numbers[session.position]])

    def first() -> object:
        session.clear()
        return session.step(numbers[: int(what.removeprefix("ttft"))])

    def error(_: object) -> float:
        session.clear()
        got = torch.from_numpy(session.step(PROBE))
        return float((got - want).norm() / want.norm())

    run = decode if what == "decode" else first
    words = f"{machine.version(ik_llama.IK)} Q4_0, repacked, {threads} threads"
    return Rival(ik_llama.IK, run, Check(error, TOLERANCE), {ik_llama.IK: words})


@dataclass(frozen=True)
class ModelCase:
    model: Name
    what: What
    threads: int
    quick: bool = False

    @property
    def id(self) -> str:
        return f"moe.model.{self.model}.{self.what}.t{self.threads}"


def _whole(model: Name) -> list[ModelCase]:
    return [
        ModelCase(model, what, threads, quick=(model, what) == ("top2of16", "decode"))
        for what in ("decode", "ttft128", "ttft1024")
        for threads in (1, 2)
    ]


@rows(*_whole("mixtral4"), *_whole("top2of16"))
def bench_model(case: ModelCase, measure: Measure) -> None:
    """int4 in groups of 32 everywhere but in routers, norms and the embedding, as Q4_0 there."""
    compute: Compute = "int8" if case.what == "decode" else "mixed"
    model, ids = accelerated(case.model, compute), text(case.model, 1024)
    rivals = [
        ik_rival(case.model, case.what, case.threads, ids),
        transformers_rival(case.model, case.what, ids),
    ]
    # The row's own prompt: how many tokens an expert has decides what it computes with.
    probe = PROBE if case.what == "decode" else prompt_of(case.what, ids)[0].tolist()
    check = check_of(case.model, model, cases.packed_weight_of(model), probe)
    handle = model.quernstone
    size = handle.step_bytes()
    if case.what != "decode" or case.model != "mixtral4":
        what = "a token" if case.what == "decode" else f"first token of {case.what[4:]}"
        measure.speed(
            what=f"{case.model}: {what}",
            ours=runner(model, case.what, ids),
            check=check,
            rivals=rivals,
            notes=[f"ours with compute={compute!r}"],
        )
        return
    with limits.reading() as limit:
        row = measure.speed(
            what=f"{case.model}: a token, behind {PREFIX} to {LONGEST} others",
            ours=runner(model, case.what, ids),
            check=check,
            rivals=rivals,
            limit=limit,
            work=size,
            notes=[f"{size / 1e6:.1f} MB of packed weights a token, the limit of a step"],
        )
    row.notes.append(f"{1e3 / row.ours:.1f} tokens a second")


@dataclass(frozen=True)
class GateCase:
    model: Name
    threads: int = 1
    quick: bool = False

    @property
    def id(self) -> str:
        return f"moe.model.{self.model}.gating.t{self.threads}"


@rows(*(GateCase(model, threads) for model in ("top2of16", "mixtral4") for threads in (1, 2)))
def bench_gating_speed(case: GateCase, measure: Measure) -> None:
    """Decoding with gating beside decoding without: AdapMoE has 1.35x where experts are moved."""
    model, ids = accelerated(case.model, "int8"), text(case.model, 1024)
    gating, words = gating_of(case.model)
    steps = Decoding(model, ids)
    blocks = model.quernstone.blocks.values()

    def switched(to: AdaptiveGating | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for block in blocks:
                block.gating = to
            try:
                return steps()
            finally:
                for block in blocks:
                    block.gating = None

        return run

    check = check_of(case.model, model, cases.packed_weight_of(model))
    row = measure.speed(
        what=f"{case.model}: a token with gating, beside without",
        ours=switched(gating),
        check=check,
        rivals=[Rival("without gating", switched(None), check)],
        calls=8,
    )
    use = gating.use()
    row.notes += [
        f"activated experts {use.active:.2f} of {cases.TOP_K}, single {100 * use.single:.1f} %",
        words,
    ]


@functools.lru_cache(maxsize=2)
def gating_of(name: Name) -> tuple[AdaptiveGating, str]:
    """As searched on the trained model; on the other, a threshold that keeps as many single."""
    model = original(name)
    names = [block.name for block in moe_blocks(model)]
    found = gated_by(tiny.load("top2of16"), seed=0)
    if name == "top2of16":
        of = dict(zip(names, found.gating.sensitivity.values(), strict=True))
        words = f"searched on the trained model: loss {100 * found.rise:+.2f} %"
        return AdaptiveGating(of, found.gating.threshold), words
    shares = [output[1][:, 1].float() for output in _routed(model, text(name, 256))]
    tail = torch.cat(shares).square().sort().values
    threshold = float(tail[int(found.single * len(tail))])
    words = "random routers: a threshold by which as many tokens keep one as in the trained model"
    return AdaptiveGating(dict.fromkeys(names, 1.0), threshold), words


def _routed(model: Any, ids: Tensor) -> list[Any]:
    outputs: list[Any] = []
    hooks = [
        block.router.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        for block in moe_blocks(model)
    ]
    with torch.inference_mode():
        model(ids, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return outputs
