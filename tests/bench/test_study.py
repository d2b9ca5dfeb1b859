"""The study: parts that are not run twice, what is made of their rows, and what is shown."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quernstone.attention import head_report, reference
from quernstone.attention.hf import probed
from quernstone.bench.study import (
    analysis,
    command,
    export,
    figures,
    panels,
    parts,
    quick,
    show,
    summary,
    tiny,
    words,
)
from quernstone.bench.study import run as runner
from quernstone.bench.study.ledger import BadLedger, Ledger
from quernstone.bench.tinylm import checkpoint, corpus
from quernstone.bench.tinylm.loop import Loop
from quernstone.bench.tinylm.model import TinyLm
from tests.bench.tiny import TEXT, config, sink_parts, wide

KINDS = ("vanilla", "sink", "gated")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> corpus.Corpus:
    """A text of a few kilobytes in the place of the documentation."""
    found = corpus.Corpus({"a": TEXT.decode()}, {"b": TEXT.decode()[::-1][:2000]})
    for module in (tiny, runner, export, quick):
        monkeypatch.setattr(module, "documentation", lambda: found)
    return found


def _run(ledger: Ledger, folder: Path, chosen: list[parts.Part]) -> list[str]:
    said: list[str] = []
    assert runner.run(chosen, ledger, folder, say=said.append) == []
    return said


# Parts and their rows


def test_names_of_parts_and_their_files_are_unique() -> None:
    plan = parts.plan()
    assert len({part.name for part in plan}) == len({part.file for part in plan}) == len(plan)
    seeds = {(p.name.split("/")[1], p.setting["recipe"]["seed"]) for p in plan[:30]}
    assert seeds == {(kind, seed) for kind in KINDS for seed in range(5)}
    assert {part.after for part in plan} - {None} <= {part.name for part in plan}


def test_parts_are_chosen_by_the_beginning_of_their_names() -> None:
    assert len(parts.chosen(["tinylm/sink/plain"])) == 5
    assert [part.name for part in parts.chosen(["smollm2/before"])] == ["smollm2/before"]
    assert parts.chosen([]) == parts.plan()
    with pytest.raises(ValueError, match="no part of the study begins with tinylm/sin;"):
        parts.chosen(["tinylm/sin"])


def test_what_is_on_record_is_not_run_again(
    tmp_path: Path, text: corpus.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, chosen = Ledger(tmp_path / "rows.jsonl"), sink_parts()
    said = _run(ledger, tmp_path, chosen)
    assert said[0] == "0 of 3 parts on record, 3 to run"
    rows = ledger.rows()
    assert sorted(row["part"] for row in rows) == sorted(part.name for part in chosen)
    assert all(row["corpus"]["sha256"] == text.sha256 for row in rows)
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "run", None)
        assert _run(ledger, tmp_path, chosen) == ["3 of 3 parts on record, 0 to run"]
    changed = dataclasses.replace(chosen[1], setting={**chosen[1].setting, "revision": 99})
    assert ledger.finished(changed.name, changed.setting, text.sha256) is None
    assert ledger.finished(chosen[1].name, chosen[1].setting, "another text") is None


def test_an_interrupted_part_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, text: corpus.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = sink_parts()[1:2]
    whole = Ledger(tmp_path / "whole.jsonl")
    _run(whole, tmp_path / "whole", chosen)

    class Killed(BaseException):
        pass

    steps: list[int] = []
    objective = Loop.objective

    def counted(self: Loop, step: int) -> Any:
        steps.append(step)
        if len(steps) == 4:
            raise Killed
        return objective(self, step)

    monkeypatch.setattr(Loop, "objective", counted)
    monkeypatch.setattr(tiny, "SAVE_EVERY", 2)
    ledger = Ledger(tmp_path / "rows.jsonl")
    with pytest.raises(Killed):
        _run(ledger, tmp_path / "states", chosen)
    assert ledger.rows() == []
    _run(ledger, tmp_path / "states", chosen)
    assert steps == [0, 1, 2, 3, 2, 3]
    assert ledger.rows()[0]["result"] == whole.rows()[0]["result"]


def test_a_finetuning_trains_its_base_where_the_weights_are_gone(
    tmp_path: Path, text: corpus.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, finetuning = sink_parts()
    together, alone = Ledger(tmp_path / "1.jsonl"), Ledger(tmp_path / "2.jsonl")
    _run(together, tmp_path / "1", [base, finetuning])
    # The plan's own base would be a real training.
    monkeypatch.setattr(runner, "plan", lambda: [base])
    _run(alone, tmp_path / "2", [finetuning])
    (row,) = alone.rows()
    assert row["result"] == together.by_part()[finetuning.name]["result"]


def test_parts_at_a_time_do_not_change_the_rows(tmp_path: Path) -> None:
    chosen = [wide(part) for part in sink_parts()[:2]]
    found = []
    for jobs in (1, 2):
        ledger = Ledger(tmp_path / f"{jobs}.jsonl")
        assert runner.run(chosen, ledger, tmp_path / str(jobs), jobs=jobs) == []
        found.append({name: row["result"] for name, row in ledger.by_part().items()})
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_one_part_in_trouble_leaves_the_others(tmp_path: Path, text: corpus.Corpus) -> None:
    first, second, _ = sink_parts()
    (tmp_path / f"{first.file}.pt").write_bytes(b"cut off")
    ledger = Ledger(tmp_path / "rows.jsonl")
    troubles = runner.run([first, second], ledger, tmp_path)
    assert [trouble.split(":")[0] for trouble in troubles] == [first.name]
    assert "damaged file" in troubles[0]
    assert [row["part"] for row in ledger.rows()] == [second.name]


@pytest.mark.parametrize("tail", ['{"part": "tinylm/', "[1, 2]", '{"part": "a"}', "\udcff"])
def test_a_damaged_line_of_the_results_is_named(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "rows.jsonl"
    ledger = Ledger(path)
    ledger.append({"part": "a", "setting": {}, "corpus": {"sha256": ""}, "result": {}})
    with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(tail)
    with pytest.raises(BadLedger, match=r"rows\.jsonl, line 2: .* remove the line"):
        ledger.rows()


def test_rows_of_another_text_are_warned_of(tmp_path: Path, text: corpus.Corpus) -> None:
    ledger = Ledger(tmp_path / "rows.jsonl")
    other = {"python": "2.7.0", "sha256": "f" * 64}
    ledger.append({"part": "a", "setting": {}, "corpus": other, "result": {}})
    said: list[str] = []
    runner.warn_of_other_text(ledger, text, said.append)
    assert len(said) == 1
    assert "documentation of Python 2.7.0 (ffffffffffff)" in said[0]


# Analysis


@pytest.mark.parametrize("kind", KINDS)
def test_the_gates_are_those_whose_mean_is_the_importance(kind: str) -> None:
    model, batch = _model_and_batch(kind)
    seen: list[torch.Tensor] = []

    def probe(_module: object, qkv: Any, options: dict[str, Any], _mask: object) -> torch.Tensor:
        out, aux = reference.sink_attention(*qkv, **options, return_aux=True)
        seen.append(analysis._gates(qkv[0], qkv[1], aux.lse.float(), options).mean((0, 2)))
        return out.float()

    with torch.no_grad(), probed(model, probe):
        model(**batch)
    importance = head_report(model, batch, ablation=False).importance
    assert torch.stack(seen).numpy() == pytest.approx(importance, rel=1e-5)
    shares = analysis.gate_histogram(model, batch)
    assert len(shares) == 50
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)
    middle = sum(share * (place + 0.5) / 50 for place, share in enumerate(shares))
    assert middle == pytest.approx(importance.mean(), abs=0.011)


def test_zeroing_the_dead_heads_is_what_is_reported() -> None:
    model, batch = _model_and_batch("sink")
    with torch.no_grad():
        model.blocks[0].mixer.sinks[1] = 20.0
        model.blocks[1].mixer.sinks[3] = 9.0
        found = analysis.heads(model, batch)
        assert found["dead_heads"] == [[0, 1], [1, 3]]
        for layer, head in found["dead_heads"]:
            columns = slice(16 * head, 16 * head + 16)
            model.blocks[layer].mixer.out.weight[:, columns] = 0.0
        silent = float(model(**batch).loss)
    assert found["without_dead_heads"] == pytest.approx(silent - found["loss"], abs=1e-6)
    assert len(found["least_important"]) == len(found["random"]) == len(found["shares"]) == 3
    assert analysis.heads(model, batch, shares=())["least_important"] == []


def test_value_drain_is_the_norm_of_the_first_value_and_the_loss_without_it() -> None:
    model, batch = _model_and_batch("vanilla")
    weight = model.blocks[0].mixer.qkv.weight
    with torch.no_grad():
        hidden = model.blocks[0].norm_mixer(model.embedding(batch["input_ids"]))
        size = (hidden @ weight[128:192].T).unflatten(-1, (4, 16)).norm(dim=-1)
        found = analysis.value_drain(model, batch)
        want = (size[:, 0] / size[:, 1:].mean(1)).mean(0)
        assert found["norm"][0] == pytest.approx(want.tolist(), rel=1e-5)
        # A START that is embedded as 0 has no value in the first layer, and so in none.
        model.embedding.weight[corpus.START] = 0.0
        drained = analysis.value_drain(model, batch)
    assert drained["norm"][0] == pytest.approx([0.0] * 4, abs=1e-6)
    assert abs(drained["without_first"]) < abs(found["without_first"])
    assert found["without_other"] != 0.0


def _model_and_batch(kind: str) -> tuple[TinyLm, dict[str, torch.Tensor]]:
    model = TinyLm(config(kind), seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.dim() > 1 else 1.0)
    ids = torch.randint(1, 256, (3, 40))
    ids[:, 0] = corpus.START
    return model.eval(), {"input_ids": ids, "labels": ids.roll(-1, 1)}


# The summary


def _result(bits: float, low: float, seed: int) -> dict[str, Any]:
    heads = {
        "dead_heads": [[0, 0]] if low < 0.1 else [],
        "without_dead_heads": 0.01,
        "sink_rate": 0.25,
        "shares": [0.5],
        "least_important": [0.1 + seed],
        "random": [0.2],
        "loss": 1.0,
    }
    return {
        "bits_per_byte": bits,
        "cv": abs(0.5 - low),
        "gate": 0.5,
        "importance": [[low, 0.5], [0.5, 1.0 - low]],
        "gates": [0.5, 0.5],
        "heads": heads,
        "drain": {"norm": [[0.2, 1.1]], "loss": 1.0, "without_first": 0.0, "without_other": 0.1},
        "curve": [[20, 3.0, 0.1, 0.5], [40, 2.0, abs(0.5 - low), 0.5]],
    }


BITS = {"plain": (2.1, 2.2, 2.4), "balance": (2.2, 2.25, 2.3)}


def _ledger(path: Path, leave_out: str = "nothing") -> Ledger:
    ledger = Ledger(path)
    for part in parts.plan():
        last = part.name.split("/")[-1]
        seed = int(last.removeprefix("seed")) if last.startswith("seed") else 0
        if seed > 2 or leave_out in part.name:
            continue
        loss = "balance" if "balance" in part.name else "plain"
        low = (0.2 if loss == "plain" else 0.4) - 0.02 * seed
        row = {"part": part.name, "setting": part.setting, "corpus": {"sha256": "s", "python": "3"}}
        ledger.append({**row, "result": _result(BITS[loss][seed], low, seed)})
    return ledger


def test_the_summary_has_means_and_deviations_over_seeds_and_paired_differences(
    tmp_path: Path,
) -> None:
    found = summary.summarise(_ledger(tmp_path / "rows.jsonl"), "s")
    sink = found["kinds"]["sink"]
    for loss, bits in BITS.items():
        assert sink[loss]["bits"]["n"] == 3
        assert sink[loss]["bits"]["mean"] == pytest.approx(statistics.mean(bits))
        assert sink[loss]["bits"]["sd"] == pytest.approx(statistics.stdev(bits))
    differences = [b - a for a, b in zip(*BITS.values(), strict=True)]
    assert sink["paired"]["bits"]["mean"] == pytest.approx(statistics.mean(differences))
    assert sink["paired"]["bits"]["sd"] == pytest.approx(statistics.stdev(differences))
    assert sink["paired"]["cv_ratio"]["mean"] == pytest.approx(
        statistics.mean([0.1 / 0.3, 0.12 / 0.32, 0.14 / 0.34])
    )
    worse = statistics.mean(BITS["balance"]) - statistics.mean(BITS["plain"])
    assert sink["verdict"]["loss_in_sd"] == pytest.approx(worse / statistics.stdev(BITS["plain"]))
    assert sink["verdict"]["loss_met"]
    assert sink["verdict"]["cv_ratio"] == pytest.approx(0.12 / 0.32)
    assert sink["verdict"]["cv_met"]
    assert found["kinds"]["vanilla"]["verdict"]["cv_met"] is None
    curve = sink["plain"]["curve"]
    assert curve["step"] == [20, 40]
    assert curve["cv"]["mean"] == pytest.approx([0.1, 0.32])
    assert curve["cv"]["sd"] == pytest.approx([0.0, 0.02])
    assert set(found["options"]["runs"]) == {"default", *parts.OPTIONS}
    assert set(found["finetune"]["runs"]) == {"before", *parts.FINE}
    assert set(found["smollm2"]) == {"before", *parts.FINE}


def test_a_target_that_is_missed_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.loads(line) for line in _ledger(path).path.read_text().splitlines()]
    for row in lines:
        if row["part"].startswith("tinylm/gated/balance"):
            row["result"]["bits_per_byte"] += 0.5
            row["result"]["cv"] = 0.3
    path.write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    found = summary.summarise(Ledger(path), "s")["kinds"]["gated"]
    assert not found["verdict"]["loss_met"]
    assert not found["verdict"]["cv_met"]
    line = words.kind_line("gated", found)
    assert "worse by more than one sd" in line
    assert "not halved" in line


def test_rows_of_another_setting_or_text_do_not_count(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path / "rows.jsonl")
    assert summary.summarise(ledger, "another")["parts"][0] == 0
    (first, *_) = parts.plan()
    row = ledger.by_part()[first.name]
    ledger.append({**row, "setting": {**row["setting"], "revision": 0}})
    assert summary.summarise(ledger, "s")["kinds"]["vanilla"]["plain"]["bits"]["n"] == 2


@pytest.mark.parametrize("leave_out", ["nothing", "balance", "smollm2", "finetune", "tinylm", ""])
def test_lines_and_figures_take_any_part_of_the_record(tmp_path: Path, leave_out: str) -> None:
    path = tmp_path / "recorded.json"
    summary.write(summary.summarise(_ledger(tmp_path / "rows.jsonl", leave_out), "s"), path)
    found = summary.read(path)
    lines = words.summary_lines(found)
    assert all(line.startswith("recorded") for line in lines)
    assert not any("nan" in line or "None" in line for line in lines)
    drawn = list(panels.panels(found))
    assert len(drawn) == {"nothing": 6, "tinylm": 3, "": 0, "smollm2": 4}.get(leave_out, len(drawn))
    for _, svg, caption in drawn:
        assert svg.startswith("<svg")
        assert "nan" not in caption


def test_the_curves_of_the_figure_are_means_over_seeds(tmp_path: Path) -> None:
    path = tmp_path / "recorded.json"
    summary.write(summary.summarise(_ledger(tmp_path / "rows.jsonl"), "s"), path)
    figure = figures.cv_curves(summary.read(path))
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[1].get_lines()}
    assert lines["without the loss"].get_ydata() == pytest.approx([0.1, 0.32])
    assert lines["balance loss"].get_ydata() == pytest.approx([0.1, 0.12])


@pytest.mark.parametrize("data", ["", "{", "[]", '{"kinds": {}}', "null"])
def test_a_damaged_summary_is_refused(tmp_path: Path, data: str) -> None:
    path = tmp_path / "recorded.json"
    path.write_text(data)
    with pytest.raises(summary.BadSummary, match=r"recorded\.json: .* --export"):
        summary.read(path)
    with pytest.raises(summary.BadSummary, match=r"none\.json: not here"):
        summary.read(tmp_path / "none.json")


# What comes along


def test_the_package_comes_with_a_record_and_models_within_their_size() -> None:
    assert summary.read()["parts"][1] == len(parts.plan())
    # Those with experts are another study's.
    models = {*checkpoint.FOLDER.glob("*.npz")} - {*checkpoint.FOLDER.glob("moe-*")}
    sizes = [path.stat().st_size for path in models]
    assert len(sizes) == 6
    assert max(sizes) < 2e6
    assert sum(sizes) < 6e6


@pytest.fixture(scope="module")
def committed() -> dict[tuple[str, str], quick.Quick]:
    """Every model that comes along, measured once on a third of what --quick takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick, "EVERY", 24)
        return {(kind, loss): quick.measure(kind, loss) for kind in KINDS for loss in export.LOSSES}


def test_quick_shows_the_models_that_come_along_and_the_record(
    committed: dict[tuple[str, str], quick.Quick], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "measure", lambda *key: committed[key])
    said: list[str] = []
    show.quick(said.append)
    measured = [line for line in said if line.startswith("measured")]
    assert len(measured) == 6
    for (kind, loss), found in committed.items():
        start = f"measured  {kind}, {loss}: {found.bits_per_byte:.4f} bits per byte"
        assert any(line.startswith(start) for line in measured)
    assert any(line.startswith("recorded  sink: ") for line in said)


@pytest.mark.parametrize("kind", KINDS)
def test_a_committed_model_is_as_good_as_its_record(
    kind: str, committed: dict[tuple[str, str], quick.Quick]
) -> None:
    for loss in export.LOSSES:
        found = committed[kind, loss]
        assert {"seed", "command", "recipe", "corpus"} <= found.meta.keys()
        # A little of the text, and weights rounded to bf16: another sample, not another model.
        assert found.bits_per_byte == pytest.approx(found.meta["bits_per_byte"], rel=0.1)
        if found.other_text is None:
            assert found.cv == pytest.approx(found.meta["cv"], rel=0.25)


def test_another_text_than_the_models_own_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, text: corpus.Corpus
) -> None:
    path = checkpoint.FOLDER / export.name_of("sink", "plain")
    assert path.exists()
    monkeypatch.setattr(quick, "EVERY", 1)
    found = quick.measure("sink", "plain")
    assert found.other_text is not None
    assert "trained on the documentation of Python" in found.other_text


def test_trained_parts_are_exported(
    tmp_path: Path, text: corpus.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, chosen = Ledger(tmp_path / "rows.jsonl"), sink_parts()[:2]
    _run(ledger, tmp_path / "states", chosen)
    others = [part for part in parts.plan() if part.name not in {p.name for p in chosen}]
    plan = [*chosen, *others]
    monkeypatch.setattr(export, "plan", lambda: plan)
    monkeypatch.setattr(summary, "plan", lambda: plan)
    bench = tmp_path / "bench"
    (bench / "study").mkdir(parents=True)
    said: list[str] = []
    export.export(ledger, tmp_path / "states", bench, said.append)
    assert said[0] == f"bench/study/recorded.json: 2 of {len(plan)} parts"
    found = quick.measure("sink", "balance", bench / "tinylm" / "checkpoints")
    assert found.meta["command"] == "python -m quernstone.bench.study tinylm/sink/balance/seed0"
    assert summary.read(bench / "study" / "recorded.json")["kinds"]["sink"]["paired"]


def test_the_command_lists_parts_and_refuses_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = corpus.Corpus({}, {})
    monkeypatch.setattr(corpus.Corpus, "sha256", "s")
    monkeypatch.setattr(runner, "documentation", lambda: text)
    rows = _ledger(tmp_path / "rows.jsonl").path
    command.main(["tinylm/sink/plain"], listed=True, results=rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0] == "on record  tinylm/sink/plain/seed0"
    assert lines[4] == "to run     tinylm/sink/plain/seed4"
    with pytest.raises(command.typer.Exit) as ended:
        command.main(["weather"], results=rows)
    assert ended.value.exit_code == 2
    assert "no part of the study begins with weather" in capsys.readouterr().out
    rows.write_text("garbage\n")
    with pytest.raises(command.typer.Exit) as ended:
        command.main(["smollm2/before"], out=tmp_path, results=rows)
    assert ended.value.exit_code == 2
    assert "rows.jsonl, line 1" in capsys.readouterr().out
