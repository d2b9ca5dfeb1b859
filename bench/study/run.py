"""Runs the parts that are not on record yet, writes each one down as it ends."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from quernstone.bench import machine
from quernstone.bench.study.ledger import Ledger
from quernstone.bench.study.parts import Part, plan
from quernstone.bench.tinylm.corpus import Corpus, documentation

Say = Callable[[str], None]


def run(
    parts: Sequence[Part],
    ledger: Ledger,
    folder: Path,
    *,
    jobs: int = 1,
    commit: str = "",
    say: Say = lambda _line: None,
) -> list[str]:
    """Runs what is pending of `parts`; gives what went wrong, part by part.

    Parts of tinylm use one thread each and run `jobs` at a time; results do not depend on that.
    SmolLM2 follows, one part at a time on two threads. States of trainings lie in `folder`: a part
    that was interrupted goes on from the last of them.

    Raises:
        ValueError: `jobs` below 1; a results file that cannot be read.
    """
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected at least 1")
    corpus = documentation()
    warn_of_other_text(ledger, corpus, say)
    pending = pending_of(parts, ledger, corpus)
    say(f"{len(parts) - len(pending)} of {len(parts)} parts on record, {len(pending)} to run")
    known = {part.name: part for part in (*plan(), *parts)}
    tinies = [part for part in pending if part.model == "tinylm"]
    # Bases first: parts that share one would otherwise train it at the same time.
    waves = [
        [(part, True) for part in tinies if part.after is None],
        [(base, False) for base in _bases(tinies, known)],
        [(part, True) for part in tinies if part.after is not None],
    ]
    troubles = []
    about = {"versions": machine.versions(("quernstone", "torch", "numpy", "transformers"))}
    about |= {"commit": commit, "cpu": machine.cpu_name(), "isa": machine.build().get("isa")}
    smols = [[(part, True)] for part in pending if part.model == "smollm2"]
    for wave in [*waves, *smols]:
        for part, wanted, outcome in _results(wave, known, folder, jobs):
            if isinstance(outcome, Exception):
                troubles.append(f"{part.name}: {type(outcome).__name__}: {outcome}")
                say(troubles[-1])
            elif wanted:
                row = {"part": part.name, "setting": part.setting, "corpus": corpus.describe()}
                ledger.append({**row, "result": outcome, **about})
                say(
                    f"{part.name}: {outcome['bits_per_byte']:.4f} bits per byte, "
                    f"CV {outcome['cv']:.4f}, mean gate {outcome['gate']:.3f}"
                )
    return troubles


def pending_of(parts: Sequence[Part], ledger: Ledger, corpus: Corpus) -> list[Part]:
    """The parts without a row of their setting and this text."""
    return [p for p in parts if ledger.finished(p.name, p.setting, corpus.sha256) is None]


def warn_of_other_text(ledger: Ledger, corpus: Corpus, say: Say) -> None:
    """Rows over another text do not compare with new ones."""
    others = {row["corpus"]["sha256"]: row["corpus"] for row in ledger.rows()}
    others.pop(corpus.sha256, None)
    for other in others.values():
        say(
            f"warning: rows on record are of the documentation of Python {other['python']} "
            f"({other['sha256'][:12]}), this is {corpus.describe()['python']} "
            f"({corpus.sha256[:12]}): they are left out, their parts run again"
        )


def _bases(parts: Sequence[Part], known: dict[str, Part]) -> list[Part]:
    return [known[name] for name in dict.fromkeys(part.after for part in parts) if name]


Outcome = dict[str, Any] | Exception


def _results(
    wave: Sequence[tuple[Part, bool]], known: dict[str, Part], folder: Path, jobs: int
) -> Iterator[tuple[Part, bool, Outcome]]:
    if jobs == 1 or len(wave) < 2:
        for part, wanted in wave:
            yield part, wanted, _work(part, known, folder, wanted)
        return
    # Spawned and not forked: a fork after torch has used its pool has no pool.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(wave)), mp_context=spawn) as pool:
        running: dict[Future[Outcome], tuple[Part, bool]] = {
            pool.submit(_work, part, known, folder, wanted): (part, wanted) for part, wanted in wave
        }
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    part, wanted = running.pop(future)
                    yield part, wanted, future.exception() or future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _work(part: Part, known: dict[str, Part], folder: Path, wanted: bool) -> Outcome:
    """The result of a part; its training alone where it is only the base of others."""
    from quernstone.bench.study import smollm2, tiny

    try:
        if part.model == "smollm2":
            return smollm2.run(part, folder)
        if not wanted:
            tiny.train(part, known, folder)
            return {}
        return tiny.run(part, known, folder)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        # One part in trouble leaves the others.
        return error
