"""Every refusal names the argument, says what came and what was expected, and never crashes.

The good layer has three experts.
"""

import math
import re
from typing import Any

import numpy as np
import pytest

from quernstone import _core
from quernstone.moe import Layer, cancel, prefetch, schedule_layer

BIG = 10**400


def good(**changes: Any) -> dict[str, Any]:
    layer: dict[str, Any] = {
        "loads": [1, 2, 3],
        "ready": [True, False, False],
        "cpu": [1.0, 2.0, 3.0],
        "gpu": 0.5,
        "transfer": [0.4, 0.4, 0.4],
    }
    return layer | changes


LAYER = Layer(**good())


def assert_says(error: type[Exception], message: str, call: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loads": [[1, 2, 3]]}, r"loads.ndim: got 2, expected 1"),
        ({"loads": 3}, r"loads.ndim: got 0, expected 1"),
        ({"loads": [1, 0, 3]}, r"loads\[1\]: got 0, expected 1 or more"),
        ({"loads": [1, 2, -7]}, r"loads\[2\]: got -7, expected 1 or more"),
        ({"loads": np.array([1, 2, 2**63], np.uint64)}, r"loads\[2\]: got 9223372036854775808"),
        ({"loads": [1] * 1025}, r"loads.shape\[0\] \(experts\): got 1025, expected at most 1024"),
        ({"loads": [1] * 10**6}, r"loads.shape\[0\] \(experts\): got 1000000, expected at most"),
        ({"loads": [1, 2]}, r"ready.shape\[0\]: got 3, expected 2"),
        ({"ready": [True]}, r"ready.shape\[0\]: got 1, expected 3"),
        ({"ready": True}, r"ready.ndim: got 0, expected 1"),
        ({"ready": [0.0, math.nan, 0.0]}, r"ready\[1\]: got nan, expected 0 to 1e\+100, or inf"),
        ({"ready": [0.0, -math.inf, 0.0]}, r"ready\[1\]: got -inf, expected 0 to"),
        ({"ready": [-0.5, 0.0, 0.0]}, r"ready\[0\]: got -0.5, expected 0 to"),
        ({"cpu": [1.0, 2.0]}, r"cpu.shape\[0\]: got 2, expected 3"),
        ({"cpu": 1.0}, r"cpu.ndim: got 0, expected 1"),
        ({"cpu": [1.0, 2.0, math.nan]}, r"cpu\[2\]: got nan, expected 0 to 1e\+100"),
        ({"cpu": [1.0, math.inf, 1.0]}, r"cpu\[1\]: got inf, expected 0 to"),
        ({"gpu": -1.0}, r"gpu\[0\]: got -1.0, expected 0 to"),
        ({"gpu": [[1.0] * 3]}, r"gpu.ndim: got 2, expected 0 or 1"),
        ({"gpu": []}, r"gpu.shape\[0\]: got 0, expected 3"),
        ({"transfer": [0.1, 1e101, 0.1]}, r"transfer\[1\]: got 1e\+101, expected 0 to 1e\+100"),
        ({"cpu_first": -0.1}, r"cpu_first: got -0.1, expected 0 to"),
        ({"cpu_free": math.nan}, r"cpu_free: got nan, expected 0 to"),
        ({"gpu_free": math.inf}, r"gpu_free: got inf, expected 0 to"),
        ({"gpu_free": np.float32(math.inf)}, r"gpu_free: got inf, expected 0 to"),
        ({"pcie_free": BIG}, r"pcie_free: got 10+, expected 0 to"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_says_which_part_of_a_layer_is_wrong(change: dict[str, Any], says: str) -> None:
    assert_says(ValueError, says, Layer, **good(**change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loads": [1.0, 2.0, 3.0]}, "loads: got dtype float64, expected an integer"),
        ({"loads": [True, True, True]}, "loads: got dtype bool, expected an integer"),
        ({"ready": ["yes", "no", "no"]}, "ready: got dtype <U3, expected a real"),
        ({"cpu": [1.0, None, 2.0]}, "cpu: got dtype object, expected a real"),
        ({"cpu": [True, False, True]}, "cpu: got dtype bool, expected a real"),
        ({"gpu": 1j}, "gpu: got dtype complex128, expected a real"),
        ({"transfer": None}, "transfer: got dtype object, expected a real"),
        ({"cpu_first": None}, "cpu_first: got NoneType None, expected float"),
        ({"cpu_free": True}, "cpu_free: got bool True, expected float"),
        ({"pcie_free": "now"}, "pcie_free: got str 'now', expected float"),
    ],
    ids=str,
)
def test_a_wrong_type_in_a_layer_is_a_type_error(change: dict[str, Any], says: str) -> None:
    assert_says(TypeError, says, Layer, **good(**change))


def test_times_may_be_of_a_narrower_type() -> None:
    assert Layer(**good(cpu_free=np.float32(0.5), gpu_free=np.float16(2.0))).starts[1:3] == (0.5, 2)


def test_policies_are_named() -> None:
    wanted = "fixed, gpu_only, cpu_only, fiddler, list, event, hybrid, exact"
    says = f"policy: got 'best', expected one of {wanted}"
    assert_says(ValueError, says, schedule_layer, LAYER, "best")
    assert_says(TypeError, "policy: got int 3, expected str", schedule_layer, LAYER, 3)
    assert_says(TypeError, "layer: got dict, expected a Layer", schedule_layer, good())
    assert_says(ValueError, "policy: got 'best'", prefetch, [LAYER], [1.0], 1.0, policy="best")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"layers": [LAYER] * 4, "probabilities": [1.0] * 4}, ValueError, "layers: got 4, exp.*3"),
        ({"probabilities": []}, ValueError, "probabilities: got 0, expected one for each of 1"),
        ({"probabilities": [[0.5, 0.5]]}, ValueError, r"probabilities\[0\].shape\[0\]: got 2"),
        (
            {"probabilities": [1.1]},
            ValueError,
            r"probabilities\[0\]\[0\]: got 1.1, expected 0 to 1",
        ),
        ({"probabilities": [[0, 1, math.nan]]}, ValueError, r"probabilities\[0\]\[2\]: got nan"),
        ({"probabilities": ["sure"]}, TypeError, r"probabilities\[0\]: got dtype <U4"),
        ({"budget": -1.0}, ValueError, "budget: got -1.0, expected 0 to"),
        ({"budget": math.nan}, ValueError, "budget: got nan, expected 0 to"),
        ({"budget": None}, TypeError, "budget: got NoneType None, expected float"),
        ({"limit": -1}, ValueError, "limit: got -1, expected 0 or more"),
        ({"limit": 1.5}, TypeError, "limit: got float 1.5, expected int or None"),
        ({"limit": True}, TypeError, "limit: got bool True, expected int or None"),
        ({"layers": [good()]}, TypeError, r"layers\[0\]: got dict, expected a Layer"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_says_which_argument_of_a_prefetch_is_wrong(
    change: dict[str, Any], error: type[Exception], says: str
) -> None:
    call = {"layers": [LAYER], "probabilities": [1.0], "budget": 1.0} | change
    assert_says(error, says, prefetch, **call)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"transfer": 1.0}, ValueError, "transfer.ndim: got 0, expected 1"),
        ({"transfer": [1.0, -1.0]}, ValueError, r"transfer\[1\]: got -1.0, expected 0 to"),
        ({"needed": [True]}, ValueError, r"needed.shape\[0\]: got 1, expected 2"),
        ({"needed": [[True, False]]}, ValueError, "needed.ndim: got 2, expected 1"),
        ({"needed": [1, 0]}, TypeError, "needed: got dtype int64, expected bool"),
        ({"elapsed": 1.5}, ValueError, "elapsed: got 1.5, expected at most the first transfer, 1"),
        ({"elapsed": -0.5}, ValueError, "elapsed: got -0.5, expected 0 to"),
        ({"tiles": 0}, ValueError, "tiles: got 0, expected 1 or more"),
        ({"tiles": 2**31}, ValueError, "tiles: got 2147483648, expected 1 or more and below"),
        ({"tiles": 2.0}, TypeError, "tiles: got float 2.0, expected int"),
        ({"now": math.inf}, ValueError, "now: got inf, expected 0 to"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_says_which_argument_of_a_cancellation_is_wrong(
    change: dict[str, Any], error: type[Exception], says: str
) -> None:
    call = {"transfer": [1.0, 2.0], "needed": [True, False]} | change
    assert_says(error, says, cancel, **call)


def columns(**changes: Any) -> list[Any]:
    layer = {
        "loads": np.array([1, 2]),
        "ready": np.zeros(2),
        "cpu": np.ones(2),
        "gpu": np.ones(2),
        "transfer": np.ones(2),
        "starts": (0.0, 0.0, 0.0, 0.0),
        "policy": "hybrid",
    }
    return list((layer | changes).values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loads": np.array([[1, 2]])}, "loads.ndim: got 2, expected 1"),
        ({"loads": np.array([1, 0])}, "loads: got 0, expected at least 1"),
        ({"loads": np.ones(1025, np.int64)}, "loads.shape.*got 1025, expected at most 1024"),
        ({"ready": np.zeros(3)}, r"ready.shape\[0\] \(experts\): got 3, expected as many as load"),
        ({"ready": np.array([0.0, math.nan])}, "ready: got a number that is no time, expected 0"),
        ({"cpu": np.ones(1)}, r"cpu: got 1, expected as many as loads, 2"),
        ({"cpu": np.array([1.0, -1.0])}, "cpu: got a number that is no time, expected 0 to 1e100"),
        ({"gpu": np.array([1.0, math.inf])}, "gpu: got a number that is no time"),
        ({"transfer": np.array([math.nan, 1.0])}, "transfer: got a number that is no time"),
        ({"starts": (-1.0, 0.0, 0.0, 0.0)}, "cpu_first: got a number that is no time"),
        ({"starts": (0.0, math.nan, 0.0, 0.0)}, "cpu_free: got a number that is no time"),
        ({"starts": (0.0, 0.0, 1e200, 0.0)}, "gpu_free: got a number that is no time"),
        ({"starts": (0.0, 0.0, 0.0, math.inf)}, "pcie_free: got a number that is no time"),
        ({"policy": "best"}, "policy: got best, expected 'fixed'"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_the_core_checks_by_itself(change: dict[str, Any], says: str) -> None:
    assert_says(ValueError, says, _core.moe.schedule, *columns(**change))


@pytest.mark.parametrize(
    "change",
    [{"cpu": np.ones(2, np.float32)}, {"loads": np.ones(2)}, {"cpu": np.ones(4)[::2]}],
    ids=["fp32", "fp64 loads", "strided"],
)
def test_the_core_converts_nothing(change: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _core.moe.schedule(*columns(**change))


def test_the_core_checks_prefetches_and_cancellations() -> None:
    layer = [*columns()[:-1], np.ones(2)]
    for change, says in [
        ({"budget": math.nan}, "budget: got a number that is no time"),
        ({"limit": -1}, "limit: got -1, expected at least 0"),
        ({"layers": [tuple(layer)] * 4}, "layers: got 4, expected at most 3"),
        (
            {"layers": [(*layer[:-1], np.ones(3))]},
            r"probability.shape\[0\].*got 3, expected as many",
        ),
        ({"layers": [(*layer[:-1], np.array([1.0, 2.0]))]}, "probability: got a number that is no"),
    ]:
        call = {"layers": [tuple(layer)], "budget": 1.0, "limit": 9, "policy": "event"} | change
        assert_says(ValueError, says, _core.moe.prefetch, **call)
    for change, says in [
        ({"needed": np.ones(1, bool)}, r"needed.shape\[0\] \(transfers\): got 1, expected as many"),
        ({"transfer": np.array([1.0, math.nan])}, "transfer: got a number that is no time"),
        ({"elapsed": 2.0}, "elapsed: got another time, expected 0 to the first transfer's own"),
        ({"tiles": 0}, "tiles: got 0, expected at least 1"),
        ({"now": -1.0}, "now: got a number that is no time"),
    ]:
        queue: dict[str, Any] = {
            "transfer": np.ones(2),
            "needed": np.ones(2, bool),
            "elapsed": 0.0,
            "tiles": 1,
            "now": 0.0,
        }
        assert_says(ValueError, re.compile(says).pattern, _core.moe.cancel, **(queue | change))
    with pytest.raises(ValueError, match="calls: got 0, expected at least 1"):
        _core.moe.seconds_to_schedule(*columns(), 0)
