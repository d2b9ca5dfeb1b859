"""ONNX's own test cases, operator by operator, and networks that are delivered with it.

Their expected outputs were written by the authors of the standard.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from quernstone.importers import read_onnx
from quernstone.importers.onnx_operators import TRANSLATE

Case = tuple[str, Any, list[NDArray[Any]], list[NDArray[Any]]]

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
LIGHT = ("densenet121", "inception_v2", "resnet50", "shufflenet", "squeezenet")
KINDS = {"float32", "float64", "int64", "int32", "bool"}
# Those of Cast are of types that a graph does not have, those of Not and Upsample of old opsets.
NO_CASES = {"Cast", "Not", "Upsample"}
ONE_OUTPUT = {"Dropout", "LayerNormalization", "MaxPool"}
# Uses of operators that are refused, each for what the message says.
REFUSED = (
    "auto_pad",
    "allowzero",
    "antialias or axes",
    "more than one output",
    "an axis that is not the last",
    "training mode",
    "no axes",
    "mode wrap",
    "mode cubic",
    "mode nearest, half_pixel",
    "mode nearest, align_corners",
    "mode nearest, asymmetric, ceil",
    "mode nearest, asymmetric, round",
    "mode nearest, tf_",
    "mode linear, pytorch_half_pixel",
    "mode linear, half_pixel_symmetric",
    "mode linear, tf_",
    "mode linear, asymmetric",
    "scales of the batch",
    "dilations",
    "output_shape",
    "sequence_lens or peepholes",
    "layout",
    "is no constant",
    "it holds no tensor",
    ": axes)",
    "type ",
    "align_corners at scales",
)


@pytest.fixture(scope="module")
def cases() -> dict[str, list[Case]]:
    """The cases of each operator, whose inputs but the first are constants of the file."""
    # Generating some cases divides by zero on purpose.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found: dict[str, list[Case]] = {}
        for case in collect_testcases(None):
            if case.model is None or len(case.model.graph.node) != 1:
                continue
            op = case.model.graph.node[0].op_type
            for inputs, outputs in case.data_sets:
                arrays = [*inputs, *outputs]
                if op in TRANSLATE and all(_usable(a) for a in arrays):
                    found.setdefault(op, []).append((case.name, case.model, inputs, outputs))
    return found


def _usable(array: Any) -> bool:
    numbers = isinstance(array, np.ndarray | np.generic) and str(array.dtype) in KINDS
    # The greatest of no numbers is no number of a graph.
    return numbers and array.size > 0


def _frozen(model: Any, inputs: list[NDArray[Any]]) -> Any:
    """The model with all inputs but the first as constants, and of one output where it can be."""
    copy = type(model)()
    copy.CopyFrom(model)
    values = list(copy.graph.input)
    for value, array in list(zip(values, inputs, strict=True))[1:]:
        copy.graph.initializer.append(numpy_helper.from_array(np.asarray(array), value.name))
        copy.graph.input.remove(value)
    if copy.graph.node[0].op_type in ONE_OUTPUT:
        del copy.graph.output[1:], copy.graph.node[0].output[1:]
    return copy


@pytest.mark.parametrize("op", sorted(set(TRANSLATE) - NO_CASES))
def test_an_operator_gives_what_the_standard_says(
    op: str, cases: dict[str, list[Case]], tmp_path: Path
) -> None:
    path, right = tmp_path / "case.onnx", 0
    for name, model, inputs, outputs in cases[op]:
        path.write_bytes(_frozen(model, inputs).SerializeToString())
        try:
            graph = read_onnx(path)
        except ValueError as error:
            if any(reason in str(error) for reason in REFUSED):
                continue
            raise
        given = {value.name: np.array(a) for value, a in zip(graph.inputs, inputs, strict=False)}
        for got, want in zip(graph.run(given).values(), outputs, strict=op not in ONE_OUTPUT):
            assert got.shape == want.shape, name
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-5, err_msg=name)
        right += 1
    assert right, f"{op}: {len(cases[op])} cases, none of them read"


@pytest.mark.parametrize("name", LIGHT)
def test_a_whole_network_gives_what_is_delivered_with_it(name: str) -> None:
    path = DATA / "light" / f"light_{name}.onnx"
    graph = read_onnx(path)
    (value,) = graph.inputs
    assert value.shape is not None
    # As the file's own test does: every input is this row of numbers.
    shape = [n or 1 for n in value.shape]
    size = int(np.prod(shape))
    x = (np.arange(size).reshape(shape) / size).astype(np.float32)
    tensor = TensorProto()
    tensor.ParseFromString(path.with_name(f"{path.stem}_output_0.pb").read_bytes())
    (got,) = graph.run({value.name: x}).values()
    np.testing.assert_allclose(got.numpy(), numpy_helper.to_array(tensor), rtol=1e-3, atol=1e-7)
