"""The compiled halves of a decoder layer: what they refuse, and that threads change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quernstone import _core
from quernstone.moe import accelerate
from quernstone.moe.decoder import Decoder, unsupported
from tests.moe.hf_tiny import tiny

TOKENS = 3


def settings(layer: Any) -> dict[str, Any]:
    """Arguments of `inputs` for a layer, outputs preset to NaN."""
    random = np.random.default_rng(0)
    heads, kv, width, hidden = layer.heads, layer.kv_heads, layer.width, layer.hidden

    def room(*shape: int) -> Any:
        return np.full(shape, np.nan, np.float32)

    return {
        "hidden": random.standard_normal((TOKENS, hidden)).astype(np.float32),
        "add": random.standard_normal((TOKENS, hidden)).astype(np.float32),
        "cos": np.ones((TOKENS, width), np.float32),
        "sin": np.zeros((TOKENS, width), np.float32),
        "normed": room(TOKENS, hidden),
        "projected": room(TOKENS, (heads + 2 * kv) * width),
        "q": room(heads, TOKENS, width),
        "k": room(kv, TOKENS, width),
        "v": room(kv, TOKENS, width),
    }


def outputs(layer: Any) -> dict[str, Any]:
    random = np.random.default_rng(1)
    heads, width, hidden = layer.heads, layer.width, layer.hidden
    return {
        "attended": random.standard_normal((heads, TOKENS, width)).astype(np.float32),
        "joined": np.full((TOKENS, heads * width), np.nan, np.float32),
        "hidden": random.standard_normal((TOKENS, hidden)).astype(np.float32),
        "x": np.full((TOKENS, hidden), np.nan, np.float32),
        "ids": np.full((TOKENS, layer.choices), -7),
        "weights": np.full((TOKENS, layer.choices), np.nan, np.float32),
    }


@pytest.fixture(scope="module")
def layer() -> Any:
    model = accelerate(tiny("qwen3_moe"), linear="int8", attention="quernstone")
    assert unsupported(model) is None
    return Decoder(model).layers[0]


def test_every_output_is_written_and_finite(layer: Any) -> None:
    first, second = settings(layer), outputs(layer)
    layer._core.inputs(**first)
    assert layer._core.outputs(**second) == (TOKENS, 0, TOKENS * layer.choices)
    for values in (first, second):
        assert all(np.isfinite(value).all() for value in values.values())
    assert np.allclose(second["weights"].sum(1), 1, atol=1e-6)
    assert (np.diff(second["weights"], axis=1) <= 0).all()


def test_threads_change_nothing(layer: Any) -> None:
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first, second = settings(layer), outputs(layer)
        layer._core.inputs(**first)
        layer._core.outputs(**second)
        found.append([*first.values(), *second.values()])
    torch.set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", [*"qkv", "hidden", "add", "cos", "sin", "normed", "projected"])
def test_inputs_names_the_array_of_another_shape(layer: Any, name: str) -> None:
    given = settings(layer)
    given[name] = given[name][..., :-1]
    with pytest.raises(ValueError, match=rf"^(hidden|add|cos|sin|normed|projected|{name}):"):
        layer._core.inputs(**given)


@pytest.mark.parametrize("name", ["attended", "joined", "hidden", "x", "ids", "weights"])
def test_outputs_names_the_array_of_another_shape(layer: Any, name: str) -> None:
    given = outputs(layer)
    given[name] = np.ascontiguousarray(given[name][..., :-1])
    with pytest.raises(ValueError, match=f"^{name}: got .* expected in one of its axes"):
        layer._core.outputs(**given)


def test_keys_are_of_the_dtype_of_queries(layer: Any) -> None:
    given = settings(layer)
    given["k"] = given["k"].astype(np.int16)
    with pytest.raises(ValueError, match=r"^k: got another dtype than q"):
        layer._core.inputs(**given)
    given = settings(layer)
    given["v"].flags.writeable = False
    with pytest.raises(ValueError, match=r"^v: got a read-only array"):
        layer._core.inputs(**given)


def test_bf16_is_fp32_rounded_to_the_nearest_even(layer: Any) -> None:
    wide, half = settings(layer), settings(layer)
    for name in "qkv":
        half[name] = np.full(half[name].shape, -1, np.int16)
    layer._core.inputs(**wide)
    layer._core.inputs(**half)
    for name in "qkv":
        got = torch.from_numpy(half[name]).view(torch.bfloat16)
        assert torch.equal(got, torch.from_numpy(wide[name]).bfloat16())


def test_the_last_norm_names_what_disagrees() -> None:
    x = np.ones((2, 8), np.float32)
    out = np.full((2, 8), np.nan, np.float32)
    weight = np.full(8, 3.0, np.float32)
    _core.moe.final_norm(weight, 0.0, x, None, out)
    assert np.array_equal(out, np.full((2, 8), 3.0, np.float32))
    with pytest.raises(ValueError, match=r"norm\.weight: got 7, expected 8"):
        _core.moe.final_norm(weight[:7], 0.0, x, None, out)
    with pytest.raises(ValueError, match=r"^add: got 1"):
        _core.moe.final_norm(weight, 0.0, x, x[:1], out)
