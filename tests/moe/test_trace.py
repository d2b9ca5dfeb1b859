"""Routing traces: what is refused, and a file that loses nothing or is not read."""

import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernstone.moe.trace import Trace

from .routing import ar1_scores, ar1_trace

STEPS = np.arange(3, dtype=np.int32)


def small(**changes: Any) -> Trace:
    """Two layers, three tokens, up to two of four experts."""
    ids = np.array([[[0, 1], [2, -1], [3, 0]], [[1, 0], [2, 3], [3, -1]]], dtype=np.int16)
    scores = np.full((2, 3, 4), 0.25, dtype=np.float16)
    fields = {"experts": 4, "ids": ids, "steps": STEPS, "scores": scores, "meta": {"seed": 1}}
    return Trace(**(fields | changes))


def with_id(at: tuple[int, int, int], value: int) -> np.ndarray:
    ids = small().ids.copy()
    ids[at] = value
    return ids


def with_score(value: float) -> np.ndarray:
    scores = np.full((2, 3, 4), 0.25, dtype=np.float32)
    scores[1, 2, 3] = value
    return scores


def assert_same(got: Trace, want: Trace) -> None:
    assert got.experts == want.experts
    assert got.meta == want.meta
    for name in ("ids", "steps"):
        x, y = getattr(got, name), getattr(want, name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    if want.scores is None:
        assert got.scores is None
    else:
        assert got.scores is not None
        assert got.scores.dtype == want.scores.dtype
        assert got.scores.tobytes() == want.scores.tobytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": with_id((1, 2, 0), 4)}, "ids[1, 2, 0]: got 4, expected -1 to 3"),
        ({"ids": with_id((0, 1, 1), -2)}, "ids[0, 1, 1]: got -2, expected -1 to 3"),
        ({"ids": with_id((1, 0, 1), 1)}, "ids[1, 0]: got 1 twice, expected each expert once"),
        ({"ids": with_id((0, 1, 0), -1)}, "ids[0, 1]: got no expert, expected one at least"),
        (
            {"ids": np.array([[[0, -1, 2]]], np.int16)},
            "ids[0, 0]: got 2 after -1, expected -1 to the end",
        ),
        ({"ids": np.zeros((2, 3), np.int16)}, "ids: got int16 (2, 3), expected int16 (layers,"),
        ({"ids": np.zeros((2, 3, 1), np.int64)}, "ids: got int64 (2, 3, 1), expected int16"),
        ({"ids": np.zeros((2, 0, 1), np.int16)}, "ids: got int16 (2, 0, 1), expected"),
        ({"experts": 1}, "ids.shape[2]: got 2 experts of a token, expected at most 1"),
        ({"experts": 0}, "experts: got 0, expected 1 to 32767"),
        ({"experts": 40000}, "experts: got 40000, expected 1 to 32767"),
        ({"steps": STEPS + np.int32(1)}, "steps[0]: got 1, expected 0"),
        (
            {"steps": np.array([0, 2, 2], np.int32)},
            "steps[1]: got 2 after 0, expected the same or one more",
        ),
        ({"steps": np.array([0, 1, 0], np.int32)}, "steps[2]: got 0 after 1, expected"),
        ({"steps": np.arange(3)}, "steps: got int64 (3,), expected int32 (3,)"),
        ({"steps": STEPS[:2]}, "steps: got int32 (2,), expected int32 (3,)"),
        ({"scores": with_score(float("nan"))}, "scores[1, 2, 3]: got nan, expected a finite"),
        ({"scores": with_score(float("inf"))}, "scores[1, 2, 3]: got inf, expected a finite"),
        ({"scores": with_score(-0.5)}, "scores[1, 2, 3]: got -0.5, expected a finite number, 0"),
        ({"scores": np.ones((2, 3, 5), np.float32)}, "scores.shape: got (2, 3, 5), expected (2"),
        ({"scores": np.ones((2, 3, 4))}, "scores.dtype: got float64, expected float16 or"),
    ],
    ids=str,
)
def test_a_trace_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        small(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["ids", "steps", "scores"])
def test_a_list_is_no_array(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: got list, expected a NumPy array"):
        small(**{name: [0, 1, 2]})


def test_scores_choose_the_largest_and_of_equals_the_first() -> None:
    trace = Trace.of([[[0.1, 0.3, 0.3, 0.3], [0.4, 0.1, 0.2, 0.3]]], 2)
    assert trace.ids.tolist() == [[[1, 2], [0, 3]]]
    assert trace.steps.tolist() == [0, 1]
    assert (trace.layers, trace.tokens, trace.top_k, trace.number_of_steps) == (1, 2, 2, 2)


def test_a_choice_that_is_not_by_score_may_be_given() -> None:
    scores = np.full((1, 2, 4), 0.25, np.float16)
    trace = Trace.of(scores, 2, ids=[[[3, 2], [1, 0]]], steps=[0, 0])
    assert trace.ids.tolist() == [[[3, 2], [1, 0]]]
    assert trace.number_of_steps == 1
    assert trace.scores is scores


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"scores": np.ones((2, 3)), "top_k": 1}, "scores.ndim: got 2, expected 3"),
        ({"scores": np.ones((1, 2, 3)), "top_k": 4}, "top_k: got 4, expected 1 to 3"),
        ({"scores": np.ones((1, 2, 3)), "top_k": 0}, "top_k: got 0, expected 1 to 3"),
        (
            {"scores": np.ones((1, 1, 3)), "top_k": 1, "ids": [[[0.5]]]},
            "ids.dtype: got float64, expected an integer type",
        ),
        (
            {"scores": np.ones((1, 1, 3)), "top_k": 1, "ids": [[[65536]]]},
            "ids: got 65536, expected -1 to 2",
        ),
        (
            {"scores": np.ones((1, 2, 3)), "top_k": 1, "steps": [0.0, 0.9]},
            "steps.dtype: got float64, expected an integer type",
        ),
        (
            {"scores": np.ones((1, 2, 3)), "top_k": 1, "steps": [0, 2**32 + 1]},
            "steps: got 0 to 4294967297, expected 0 to 2^31 - 1",
        ),
    ],
    ids=str,
)
def test_what_makes_no_trace_is_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        Trace.of(**call)
    assert str(caught.value).startswith(message)


def test_the_share_of_tokens_by_experts() -> None:
    assert small().active_share(0) == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    experts=st.sampled_from([1, 2, 7, 254, 255, 256, 300]),
    scores=st.sampled_from([None, np.float16, np.float32]),
    k=st.integers(1, 4),
)
def test_a_file_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, seed: int, experts: int, scores: Any, k: int
) -> None:
    rng = np.random.default_rng(seed)
    layers, tokens, k = rng.integers(1, 4), rng.integers(1, 9), min(k, experts)
    ids = np.argsort(rng.random((layers, tokens, experts)), axis=2)[:, :, :k].astype(np.int16)
    fewer = rng.integers(1, k + 1, (layers, tokens, 1))
    ids[np.broadcast_to(np.arange(k), ids.shape) >= fewer] = -1
    steps = np.concatenate(([0], rng.integers(0, 2, tokens - 1))).cumsum().astype(np.int32)
    rows = None if scores is None else rng.random((layers, tokens, experts)).astype(scores)
    trace = Trace(experts, ids, steps, rows, {"text": "Käfer", "seed": seed, "nested": {"a": [1]}})
    path = tmp_path_factory.mktemp("traces") / "trace.npz"
    trace.save(path)
    assert_same(Trace.load(path), trace)


@pytest.mark.parametrize("experts", [1, 254, 255, 256, 257, 32767])
def test_the_last_expert_is_not_taken_for_none(tmp_path: Path, experts: int) -> None:
    ids = np.array([[[experts - 1, -1]]] if experts > 1 else [[[0]]], dtype=np.int16)
    trace = Trace(experts, ids, np.zeros(1, np.int32))
    trace.save(tmp_path / "trace.npz")
    assert_same(Trace.load(tmp_path / "trace.npz"), trace)


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    ar1_trace(1, layers=2, tokens=50).save(tmp_path / "a.npz")
    ar1_trace(1, layers=2, tokens=50).save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_long_trace_takes_less_than_four_megabytes(tmp_path: Path) -> None:
    """50 000 tokens, 8 layers, 6 of 64 experts."""
    scores = ar1_scores(0, layers=8, tokens=5000)
    once = np.argsort(-scores, axis=2)[:, :, :6].astype(np.int16)
    ids = np.concatenate([np.roll(once, shift, axis=1) for shift in range(10)], axis=1)
    ids = (ids + np.arange(ids.shape[1])[:, None].astype(np.int16)) % np.int16(64)
    trace = Trace(64, ids, np.arange(50_000, dtype=np.int32))
    trace.save(tmp_path / "long.npz")
    assert (tmp_path / "long.npz").stat().st_size < 4_000_000
    assert_same(Trace.load(tmp_path / "long.npz"), trace)


def damaged(path: Path, data: bytes) -> None:
    """The file reads as before, where a byte has no part in it, or is refused by its name."""
    whole = Trace.load(path)
    other = path.with_name("damaged.npz")
    other.write_bytes(data)
    try:
        trace = Trace.load(other)
    except ValueError as error:
        said = str(error)
    else:
        assert_same(trace, whole)
        return
    assert said.startswith(f"{other}: expected a whole routing trace; ")
    assert "\n" not in said


def test_any_damaged_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    small().save(path)
    data = path.read_bytes()
    for at in range(len(data)):
        flipped = data[at] ^ (1 << at % 8)
        damaged(path, data[:at] + bytes([flipped]) + data[at + 1 :])


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    small().save(path)
    data = path.read_bytes()
    cut = tmp_path / "cut.npz"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=re.escape(f"{cut}: expected a whole routing trace")):
            Trace.load(cut)


def rewritten(path: Path, **changes: Any) -> Path:
    """The small trace's file with members of its head changed, and a valid sum."""
    small().save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    head = json.loads(arrays.pop("head").tobytes())
    arrays |= {name: value for name, value in changes.items() if isinstance(value, np.ndarray)}
    changes = {name: value for name, value in changes.items() if name not in ("ids", "starts")}
    head["crc32"] = {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()}
    words = np.frombuffer(json.dumps(head | changes).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, head=words, **arrays)
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: got 2, expected 1"),
        ({"format": "other"}, "format: got 'other', expected 'quernstone routing trace'"),
        ({"crc32": {"ids": 1}}, "crc32: got"),
        ({"experts": 3, "scores": None}, "ids[0, 2, 0]: got 3, expected -1 to 2"),
        ({"experts": 3}, ""),
        ({"ids": np.full((2, 3, 2), 1, np.uint8)}, "ids[0, 0]: got 1 twice"),
        ({"ids": np.full((2, 3, 2), 70, np.uint8)}, "ids[0, 0, 0]: got 70, expected"),
        ({"tokens": 2}, "steps: got int32 (2,), expected int32 (3,)"),
        ({"scores": "float32"}, ""),
        ({"meta": 7}, ""),
    ],
    ids=str,
)
def test_a_file_that_holds_no_trace_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = rewritten(tmp_path / "trace.npz", **changes)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        Trace.load(path)
    assert str(caught.value).startswith(f"{path}: expected a whole routing trace; {message}")


def test_a_file_that_is_not_there_is_no_bad_trace(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "none.npz")
