"""Routing traces: which experts a model chose, token by token, and a file that holds them.

Axes: l layers, t tokens, k experts of a token, e experts of a layer.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernstone._files import write_whole

FORMAT = "quernstone routing trace"
VERSION = 1
_MOST_EXPERTS = 32767
_SCORE_TYPES = ("float16", "float32")


@dataclass(frozen=True, eq=False)
class Trace:
    """The routing of a run of a model.

    Raises:
        ValueError: an expert that does not exist, or twice in one token; a token without one; a
            score that is NaN, infinite or below 0; steps that leave a gap; shapes that disagree.
    """

    experts: int
    """Experts of a layer, all layers alike."""
    ids: NDArray[np.int16]
    """[l, t, k] of the experts that were chosen, the most important first; -1 after the last one
    of a token that has fewer than k."""
    steps: NDArray[np.int32]
    """[t] number of the step that a token belongs to, from 0 and never falling: tokens of one step
    are computed at once, as in a batch or in a prompt."""
    scores: NDArray[np.float16] | NDArray[np.float32] | None = None
    """[l, t, e] softmax of the router, as it was before the choice."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What made the trace: model, text, seed, command. Whatever JSON can hold."""

    def __post_init__(self) -> None:
        for name in ("ids", "steps", "scores"):
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) and (name != "scores" or value is not None):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a NumPy array")
        if not 1 <= self.experts <= _MOST_EXPERTS:
            raise ValueError(f"experts: got {self.experts}, expected 1 to {_MOST_EXPERTS}")
        if self.ids.ndim != 3 or self.ids.dtype != np.int16 or not self.ids.size:
            raise ValueError(
                f"ids: got {self.ids.dtype} {self.ids.shape}, expected int16 (layers, tokens, k), "
                "none of them 0"
            )
        if self.ids.shape[2] > self.experts:
            raise ValueError(
                f"ids.shape[2]: got {self.ids.shape[2]} experts of a token, expected at most "
                f"{self.experts}"
            )
        self._check_ids()
        self._check_steps()
        if self.scores is not None:
            self._check_scores(self.scores)

    @classmethod
    def of(
        cls,
        scores: ArrayLike,
        top_k: int,
        *,
        ids: ArrayLike | None = None,
        steps: ArrayLike | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Trace:
        """A trace from the router's softmax.

        Args:
            scores: [l, t, e]; kept as fp16 or fp32, as it comes, and any other type as fp32.
            top_k: experts of a token.
            ids: [l, t, top_k] what the model chose; None: the largest scores, the first of equals.
            steps: [t]; None: every token is a step.
            meta: what made the trace.
        """
        rows = np.asarray(scores)
        if rows.dtype not in _SCORE_TYPES:
            rows = rows.astype(np.float32)
        if rows.ndim != 3:
            raise ValueError(f"scores.ndim: got {rows.ndim}, expected 3 (layers, tokens, experts)")
        if not 1 <= top_k <= rows.shape[2]:
            raise ValueError(f"top_k: got {top_k}, expected 1 to {rows.shape[2]}")
        if ids is None:
            ids = np.argsort(-rows, axis=2, kind="stable")[:, :, :top_k]
        chosen = np.asarray(ids)
        if chosen.dtype.kind not in "iu":
            raise ValueError(f"ids.dtype: got {chosen.dtype}, expected an integer type")
        if chosen.size and not -_MOST_EXPERTS <= chosen.min() <= chosen.max() <= _MOST_EXPERTS:
            raise ValueError(f"ids: got {chosen.max()}, expected -1 to {rows.shape[2] - 1}")
        order = np.arange(rows.shape[1]) if steps is None else np.asarray(steps)
        if order.dtype.kind not in "iu":
            raise ValueError(f"steps.dtype: got {order.dtype}, expected an integer type")
        if order.size and not 0 <= order.min() <= order.max() < 2**31:
            raise ValueError(f"steps: got {order.min()} to {order.max()}, expected 0 to 2^31 - 1")
        return cls(
            rows.shape[2], chosen.astype(np.int16), order.astype(np.int32), rows, dict(meta or {})
        )

    @property
    def layers(self) -> int:
        return int(self.ids.shape[0])

    @property
    def tokens(self) -> int:
        return int(self.ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[2])

    @property
    def number_of_steps(self) -> int:
        return int(self.steps[-1]) + 1

    def active_share(self, layer: int) -> dict[int, float]:
        """The share of tokens that chose k experts, for each k that occurs in a layer."""
        counts = np.bincount((self.ids[layer] >= 0).sum(axis=1))
        return {k: n / self.tokens for k, n in enumerate(counts.tolist()) if n}

    def save(self, path: str | Path) -> None:
        """Writes an .npz file; the same trace gives the same bytes, and `load` gives it back."""
        arrays: dict[str, Any] = {
            "ids": self.ids.astype(_id_type(self.experts)),  # -1 becomes the largest number
            "starts": np.packbits(np.diff(self.steps, prepend=np.int32(0)).astype(bool)),
        }
        if self.scores is not None:
            # Exponents apart from fractions: half the file on real scores.
            arrays["scores"] = _planes(self.scores)
        head = {
            "format": FORMAT,
            "version": VERSION,
            "experts": self.experts,
            "tokens": self.tokens,
            "scores": None if self.scores is None else self.scores.dtype.name,
            "crc32": {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()},
            "meta": dict(self.meta),
        }
        words = json.dumps(head, sort_keys=True, allow_nan=False).encode()
        arrays["head"] = np.frombuffer(words, np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is cut off or damaged, of another format or version, or what it
                holds is no trace; the message begins with the path.
            OSError: it cannot be opened.
        """
        data = Path(path).read_bytes()
        try:
            return cls._parse(data)
        except Exception as error:
            # Damaged bytes make zipfile, zlib, json and NumPy raise a dozen kinds of errors.
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path}: expected a whole routing trace; {why}") from None

    @classmethod
    def _parse(cls, data: bytes) -> Trace:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        head = json.loads(arrays.pop("head").tobytes())
        if head["format"] != FORMAT:
            raise ValueError(f"format: got {head['format']!r}, expected {FORMAT!r}")
        if head["version"] != VERSION:
            raise ValueError(f"version: got {head['version']}, expected {VERSION}")
        sums = {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()}
        if sums != head["crc32"]:
            raise ValueError(f"crc32: got {sums}, expected {head['crc32']}")
        stored = arrays["ids"]
        ids = stored.astype(np.int16)
        ids[stored == np.iinfo(stored.dtype).max] = -1
        starts = np.unpackbits(arrays["starts"], count=head["tokens"])
        scores = None
        if head["scores"] is not None:
            shape = (*ids.shape[:2], head["experts"])
            scores = _from_planes(arrays["scores"], np.dtype(head["scores"]), shape)
        return cls(head["experts"], ids, starts.cumsum(dtype=np.int32), scores, dict(head["meta"]))

    def _check_ids(self) -> None:
        wrong = (self.ids < -1) | (self.ids >= self.experts)
        if wrong.any():
            where, got = _first(wrong, self.ids)
            raise ValueError(f"ids{where}: got {got}, expected -1 to {self.experts - 1}")
        if (self.ids[:, :, 0] < 0).any():
            where, _ = _first(self.ids[:, :, 0] < 0, self.ids[:, :, 0])
            raise ValueError(f"ids{where}: got no expert, expected one at least")
        late = (self.ids[:, :, 1:] >= 0) & (self.ids[:, :, :-1] < 0)
        if late.any():
            where, got = _first(late, self.ids[:, :, 1:])
            raise ValueError(f"ids{where[:2]}: got {got} after -1, expected -1 to the end")
        ordered = np.sort(self.ids, axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
        if twice.any():
            where, got = _first(twice, ordered[:, :, 1:])
            raise ValueError(f"ids{where[:2]}: got {got} twice, expected each expert once")

    def _check_steps(self) -> None:
        if self.steps.shape != (self.tokens,) or self.steps.dtype != np.int32:
            raise ValueError(
                f"steps: got {self.steps.dtype} {self.steps.shape}, expected int32 ({self.tokens},)"
            )
        if self.steps[0] != 0:
            raise ValueError(f"steps[0]: got {self.steps[0]}, expected 0")
        rise = np.diff(self.steps.astype(np.int64))
        wrong = (rise != 0) & (rise != 1)
        if wrong.any():
            at = int(wrong.argmax()) + 1
            raise ValueError(
                f"steps[{at}]: got {self.steps[at]} after {self.steps[at - 1]}, expected the same "
                "or one more"
            )

    def _check_scores(self, scores: NDArray[Any]) -> None:
        want = (self.layers, self.tokens, self.experts)
        if scores.shape != want:
            raise ValueError(f"scores.shape: got {scores.shape}, expected {want}")
        if scores.dtype not in _SCORE_TYPES:
            raise ValueError(f"scores.dtype: got {scores.dtype}, expected float16 or float32")
        wrong = ~((scores >= 0) & np.isfinite(scores))
        if wrong.any():
            where, got = _first(wrong, scores)
            raise ValueError(f"scores{where}: got {got}, expected a finite number, 0 or more")


def _first(wrong: NDArray[np.bool_], values: NDArray[Any]) -> tuple[list[int], Any]:
    """Where the first true is, and the value that stands there."""
    at = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return [int(i) for i in at], values[at]


def _id_type(experts: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16


def _planes(scores: NDArray[Any]) -> NDArray[np.uint8]:
    little = scores.astype(scores.dtype.newbyteorder("<"))
    flat = np.frombuffer(little.tobytes(), np.uint8).reshape(-1, scores.dtype.itemsize)
    return np.ascontiguousarray(flat.T)


def _from_planes(
    planes: NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    data = np.ascontiguousarray(planes.T).tobytes()
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(shape)
