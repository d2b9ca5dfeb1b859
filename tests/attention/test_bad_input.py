"""Every refusal names the argument, says what came and what was expected, and never crashes.

The good call has b 2, h 4, g 2, t 5, s 7, d 16.
"""

import math
import re
from typing import Any

import pytest
import torch

from quernstone.attention import sink_attention

T5 = torch.zeros(2, 4, 5)
META = torch.device("meta")


def good(kind: str = "sink") -> dict[str, Any]:
    call: dict[str, Any] = {
        "q": torch.randn(2, 4, 5, 16),
        "k": torch.randn(2, 2, 7, 16),
        "v": torch.randn(2, 2, 7, 16),
        "kind": kind,
    }
    if kind == "sink":
        call["sinks"] = torch.zeros(4)
    if kind == "gated":
        call["gate"] = T5
    return call


def assert_refused(
    call: dict[str, Any], error: type[Exception], name: str, got: str, want: str
) -> None:
    tensors = [call.pop(x) for x in ("q", "k", "v")]
    with pytest.raises(error) as caught:
        sink_attention(*tensors, **call)
    assert type(caught.value) is error
    message = str(caught.value)
    pattern = rf"{re.escape(name)}(?!\w).*: got {re.escape(got)}.*, expected .*{re.escape(want)}"
    assert re.match(pattern, message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("q", None, "NoneType"),
        ("q", [[1.0]], "list"),
        ("q", T5.numpy(), "ndarray"),
        ("k", "keys", "str"),
        ("v", 3, "int"),
        ("sinks", 0.0, "float"),
        ("sinks", [0.0] * 4, "list"),
        ("gate", T5.numpy(), "ndarray"),
        ("kind", None, "NoneType"),
        ("kind", b"sink", "bytes"),
        ("window", True, "bool"),
        ("window", torch.tensor(3.9), "Tensor"),
        ("kind", 1, "int"),
        ("causal", None, "NoneType"),
        ("causal", "yes", "str"),
        ("window", 2.5, "float"),
        ("window", "2", "str"),
        ("scale", "big", "str"),
        ("scale", 1j, "complex"),
        ("scale", torch.tensor(0.25, requires_grad=True), "Tensor"),
        ("key_start", 0, "int"),
        ("key_start", [0, 0], "list"),
        ("key_lengths", 7, "int"),
        ("key_lengths", [7, 7], "list"),
        ("token_mask", [True], "list"),
    ],
)
def test_a_wrong_python_type_is_a_type_error(name: str, value: object, got: str) -> None:
    call = good("gated" if name == "gate" else "sink") | {name: value}
    if name == "token_mask":
        call["return_aux"] = True
    assert_refused(call, TypeError, name, got, "")


@pytest.mark.parametrize("change", [{"dropout": 0.1}, {"attn_mask": None}])
def test_an_argument_that_does_not_exist_is_a_type_error(change: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(change))):
        sink_attention(**good(), **change)


@pytest.mark.parametrize(
    ("name", "value", "got", "want"),
    [
        ("q", torch.zeros(4, 5, 16), "3", "4"),
        ("k", torch.zeros(1, 2, 2, 7, 16), "5", "4"),
        ("v", torch.tensor(1.0), "0", "4"),
        ("sinks", torch.zeros(1, 4), "2", "1"),
        ("sinks", torch.tensor(0.0), "0", "1"),
        ("gate", torch.zeros(2, 4), "2", "3 or 4"),
        ("gate", torch.zeros(2, 4, 5, 16, 1), "5", "3 or 4"),
        ("key_start", torch.zeros(2, 1, dtype=torch.int64), "2", "1"),
        ("key_lengths", torch.tensor(7), "0", "1"),
        ("token_mask", torch.ones(5, dtype=torch.bool), "1", "2"),
    ],
)
def test_names_the_tensor_of_wrong_rank(
    name: str, value: torch.Tensor, got: str, want: str
) -> None:
    call = good("gated" if name == "gate" else "sink") | {name: value}
    if name == "token_mask":
        call["return_aux"] = True
    assert_refused(call, ValueError, f"{name}.ndim", got, want)


@pytest.mark.parametrize(
    ("name", "axis", "size", "want"),
    [
        ("k", 0, 1, "2"),
        ("v", 0, 3, "2"),
        ("v", 1, 1, "2"),
        ("v", 1, 4, "2"),
        ("v", 2, 6, "7"),
        ("k", 3, 17, "16"),
        ("v", 3, 32, "16"),
        ("q", 1, 3, "2"),
        ("q", 1, 0, "2"),
        ("sinks", 0, 2, "4"),
        ("gate", 0, 1, "2"),
        ("gate", 1, 2, "4"),
        ("gate", 2, 7, "5"),
        ("gate by element", 3, 1, "16"),
        ("gate by element", 3, 17, "16"),
        ("key_start", 0, 1, "2"),
        ("key_lengths", 0, 3, "2"),
        ("token_mask", 0, 1, "2"),
        ("token_mask", 1, 7, "5"),
    ],
)
def test_names_the_axis_that_disagrees(name: str, axis: int, size: int, want: str) -> None:
    call = good("gated" if name.startswith("gate") else "sink")
    call["key_start"] = torch.zeros(2, dtype=torch.int64)
    call["key_lengths"] = torch.full((2,), 7)
    call["token_mask"] = torch.ones(2, 5, dtype=torch.bool)
    call["return_aux"] = True
    if name == "gate by element":
        name, call["gate"] = "gate", torch.zeros(2, 4, 5, 16)
    shape = list(call[name].shape)
    shape[axis] = size
    call[name] = call[name].new_zeros(shape)
    assert_refused(call, ValueError, f"{name}.shape[{axis}]", str(size), want)


@pytest.mark.parametrize("key_heads", [0, 3, 8])
def test_query_heads_must_be_a_multiple_of_key_heads(key_heads: int) -> None:
    x = torch.zeros(2, key_heads, 7, 16)
    assert_refused(good() | {"k": x, "v": x}, ValueError, "q.shape[1]", "4", str(key_heads))


@pytest.mark.parametrize("width", [0, 1, 15, 257, 1024])
def test_widths_outside_16_to_256_are_refused(width: int) -> None:
    call = good() | {name: torch.zeros(2, 2, 3, width) for name in "qkv"}
    assert_refused(call | {"sinks": torch.zeros(2)}, ValueError, "q.shape[3]", str(width), "16")


@pytest.mark.parametrize(
    ("name", "dtype", "want"),
    [
        ("k", torch.bfloat16, "torch.float32"),
        ("v", torch.float64, "torch.float32"),
        ("sinks", torch.float64, "torch.float32"),
        ("sinks", torch.bfloat16, "torch.float32"),
        ("gate", torch.bfloat16, "torch.float32"),
        ("key_start", torch.float32, "int"),
        ("key_lengths", torch.bool, "int"),
        ("token_mask", torch.float32, "torch.bool"),
    ],
)
def test_names_the_tensor_of_another_dtype(name: str, dtype: torch.dtype, want: str) -> None:
    call = good("gated" if name == "gate" else "sink")
    call["key_start"] = torch.zeros(2, dtype=torch.int64)
    call["key_lengths"] = torch.full((2,), 7)
    call["token_mask"] = torch.ones(2, 5, dtype=torch.bool)
    call["return_aux"] = True
    call[name] = call[name].to(dtype)
    assert_refused(call, ValueError, f"{name}.dtype", str(dtype), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64])
def test_types_other_than_fp32_and_bf16_are_refused(dtype: torch.dtype) -> None:
    call = good()
    call |= {name: call[name].to(dtype) for name in "qkv"}
    assert_refused(call, ValueError, "q.dtype", str(dtype), "torch.float32 or torch.bfloat16")


@pytest.mark.parametrize(
    "name", ["k", "v", "sinks", "gate", "key_start", "key_lengths", "token_mask"]
)
def test_names_the_tensor_on_another_device(name: str) -> None:
    call = good("gated" if name == "gate" else "sink")
    call["key_start"] = torch.zeros(2, dtype=torch.int64)
    call["key_lengths"] = torch.full((2,), 7)
    call["token_mask"] = torch.ones(2, 5, dtype=torch.bool)
    call["return_aux"] = True
    call[name] = call[name].to(META)
    assert_refused(call, ValueError, f"{name}.device", "meta", "cpu")


def test_queries_on_another_device_than_the_keys_are_refused() -> None:
    call = good()
    call["q"] = call["q"].to(META)
    tensors = [call.pop(x) for x in ("q", "k", "v")]
    with pytest.raises(ValueError, match=r"\.device: got .*meta|\.device: got .*expected meta"):
        sink_attention(*tensors, **call)


@pytest.mark.parametrize(
    ("name", "value", "got", "want"),
    [
        ("kind", "softmax", "softmax", "'sink', 'vanilla' or 'gated'"),
        ("kind", "", "", "'sink', 'vanilla' or 'gated'"),
        ("window", 0, "0", "at least 1"),
        ("window", -3, "-3", "at least 1"),
        ("window", 2**70, "", ""),
        ("scale", math.nan, "nan", "finite"),
        ("scale", math.inf, "inf", "finite"),
        ("scale", -math.inf, "-inf", "finite"),
        ("scale", 1e39, "", "finite"),
        ("scale", 10**400, "", ""),
        ("key_start", torch.tensor([0, -1]), "-1", "7"),
        ("key_start", torch.tensor([8, 0], dtype=torch.int32), "8", "7"),
        ("key_lengths", torch.tensor([-(2**40), 0]), str(-(2**40)), "7"),
        ("key_lengths", torch.tensor([0, 2**40]), str(2**40), "7"),
    ],
)
def test_names_the_value_out_of_range(name: str, value: object, got: str, want: str) -> None:
    assert_refused(good() | {name: value}, ValueError, name, got, want)


@pytest.mark.parametrize(
    ("kind", "change", "name", "got"),
    [
        ("sink", {"sinks": None}, "sinks", "None"),
        ("gated", {"gate": None}, "gate", "None"),
        ("vanilla", {"sinks": torch.zeros(4)}, "sinks", "a tensor"),
        ("gated", {"sinks": torch.zeros(4)}, "sinks", "a tensor"),
        ("sink", {"gate": T5}, "gate", "a tensor"),
        ("vanilla", {"gate": T5}, "gate", "a tensor"),
        ("sink", {"token_mask": torch.ones(2, 5, dtype=torch.bool)}, "token_mask", "a tensor"),
    ],
)
def test_names_what_is_missing_or_superfluous(
    kind: str, change: dict[str, Any], name: str, got: str
) -> None:
    assert_refused(good(kind) | change, ValueError, name, got, "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_tensors_with_a_tangent_are_refused() -> None:
    call = good()
    others = {name: x for name, x in call.items() if name != "q"}
    with pytest.raises(ValueError, match="q: got a tensor with a tangent"):
        torch.func.jvp(lambda q: sink_attention(q, **others), (call["q"],), (call["q"],))


@pytest.mark.filterwarnings("ignore")
def test_quantised_and_nested_tensors_are_refused() -> None:
    call = good()
    call["q"] = torch.quantize_per_tensor(call["q"], 0.1, 0, torch.qint8)
    assert_refused(call, ValueError, "q.dtype", "torch.qint8", "not quantised")
    call = good()
    call["k"] = torch.nested.nested_tensor(list(call["k"]))
    assert_refused(call, ValueError, "k.layout", "a nested tensor", "torch.strided")


@pytest.mark.parametrize(
    ("name", "expected"), [("sinks", "q.shape"), ("key_start", "batch"), ("key_lengths", "batch")]
)
def test_enormous_vectors_are_refused_before_they_are_copied(name: str, expected: str) -> None:
    dtype = torch.float32 if name == "sinks" else torch.int64
    call = good() | {name: torch.zeros(1, dtype=dtype).expand(2**42)}
    assert_refused(call, ValueError, f"{name}.shape[0]", str(2**42), expected)


def test_an_output_that_does_not_fit_says_so() -> None:
    call = good() | {"q": torch.zeros(1).expand(2, 4, 2**30, 16), "k": torch.randn(2, 4, 7, 16)}
    call["v"] = call["k"]
    tensors = [call.pop(x) for x in ("q", "k", "v")]
    with pytest.raises(RuntimeError, match=r"out of memory.*137438953472 elements"):
        sink_attention(*tensors, **call)


def test_sparse_tensors_are_refused() -> None:
    call = good()
    call["k"] = call["k"].to_sparse()
    assert_refused(call, ValueError, "k.layout", "torch.sparse_coo", "torch.strided")


def test_a_refused_call_leaves_the_next_one_right() -> None:
    call = good()
    tensors = [call.pop(x) for x in ("q", "k", "v")]
    before = sink_attention(*tensors, **call)
    for bad in ({"window": 0}, {"sinks": torch.zeros(3)}, {"key_start": torch.tensor([9, 9])}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sink_attention(*tensors, **(call | bad))
    assert torch.equal(sink_attention(*tensors, **call), before)
