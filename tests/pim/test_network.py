"""A network and inputs to one of few ones: the report is what one counts oneself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from quernstone.bench.fidelity import layer_snr
from quernstone.importers import Graph, Node, Value, evaluate
from quernstone.pim.layers import channel_scale, nearest_codes, rows_of, weights_of
from quernstone.pim.network import Candidates, calibrate, compress
from tests.pim import networks


def _inputs(graph: Graph, count: int = 256, seed: int = 7) -> dict[str, torch.Tensor]:
    (value,) = graph.inputs
    if value.dtype == "int64":
        return {value.name: torch.arange(count) % 30}
    assert value.shape is not None
    if value.shape == (None, 24):
        return {"x": networks.rows(count, 24, seed)}
    shape = [{1: 6}.get(at, 9) if n is None else n for at, n in enumerate(value.shape)]
    return {"x": torch.from_numpy(networks.normal(*shape, seed=seed))}


EVERY = {
    **{kind: networks.conv(kind) for kind in networks.CONVS},
    "1d": networks.conv1d(),
    "transposed": networks.transposed(),
    "transposed, groups": networks.transposed(2),
    "perceptron": networks.perceptron(),
    "recurrent": networks.recurrent(),
    "tied": networks.tied(),
}


@pytest.mark.parametrize("name", EVERY)
def test_matrices_and_columns_give_what_the_node_gives(name: str) -> None:
    graph = EVERY[name]
    for weight in weights_of(graph):
        array = graph.constants[weight.constant]
        matrices = weight.matrices(array)
        np.testing.assert_array_equal(weight.array(matrices).numpy(), array)
        seen: list[Any] = []

        def watch(node: Any, given: Any, name: str = weight.node.name, seen: Any = seen) -> Any:
            made = evaluate(node, given)
            if node.name == name:
                seen[:] = [given, made]
            return made

        graph.run(_inputs(graph), hook=watch)
        given, made = seen
        columns = rows_of(weight, given, made)
        product = matrices @ columns
        op = weight.node.op
        if op == "lstm":
            continue
        bias = weight.node.input("bias")
        want = made[0]
        if op == "linear":
            got = product[0].T.reshape(want.shape)
        elif op == "conv":
            got = product.reshape(weight.shape[0], want.shape[0], -1).transpose(0, 1)
            got = got.reshape(want.shape)
        else:
            # Stride and kernel are 2: each input makes a square of its own.
            b, _, high, wide = given[0].shape
            got = product.reshape(-1, 2, 2, b, high, wide).permute(3, 0, 4, 1, 5, 2)
            got = got.reshape(want.shape)
        if bias is not None:
            shape = (-1,) if op == "linear" else (-1, *(1 for _ in want.shape[2:]))
            got = got + torch.from_numpy(graph.constants[bias]).reshape(shape)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_lstm_is_calibrated_on_the_states_that_it_goes_through() -> None:
    graph = networks.recurrent()
    x = networks.normal(5, 2, 6)
    found = calibrate(graph, [{"x": torch.from_numpy(x)}])
    cell = torch.nn.LSTM(6, 5)
    with torch.no_grad():
        cell.weight_ih_l0.copy_(torch.from_numpy(graph.constants["w"]))
        cell.weight_hh_l0.copy_(torch.from_numpy(graph.constants["r"]))
        cell.bias_ih_l0.copy_(torch.from_numpy(graph.constants["b"]))
        cell.bias_hh_l0.zero_()
        out, _ = cell(torch.from_numpy(x))
    before = torch.cat([torch.zeros(1, 2, 5), out[:-1]]).reshape(-1, 5)
    want = before.T @ before / len(before)
    torch.testing.assert_close(found.hessians["lstm.recurrent"][0], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["depthwise", "grouped", "dilated"])
def test_calibration_is_what_unfold_gives(name: str) -> None:
    graph = EVERY[name]
    x = _inputs(graph)["x"]
    attributes: Any = graph.nodes[0].attributes
    sides = [side for pair in reversed(attributes["padding"]) for side in pair]
    columns = functional.unfold(
        functional.pad(x, sides), (3, 3), dilation=attributes["dilation"],
        stride=attributes["stride"],
    )  # fmt: skip
    groups = attributes["groups"]
    by_group = columns.reshape(len(x), groups, -1, columns.shape[-1]).double()
    want = torch.einsum("bgip,bgjp->gij", by_group, by_group) / (len(x) * columns.shape[-1])
    got = calibrate(graph, [{"x": x}]).hessians["conv"]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_layer_loses_ones_and_keeps_its_output(name: str) -> None:
    graph = EVERY[name]
    batch = _inputs(graph)
    found = compress(graph, [batch], snr=25.0)
    assert found.hamming_rate < 0.85 * found.hamming_rate_before
    assert found.snr >= 23.0
    for layer in found.layers:
        assert layer.hamming_rate_before == pytest.approx(
            nearest_codes(
                next(w for w in weights_of(graph) if w.name == layer.name),
                graph.constants[
                    next(w for w in weights_of(graph) if w.name == layer.name).constant
                ],
            ).hamming_rate
        )
    ones = sum(
        int(v & 255).bit_count() for c in found.codes.values() for v in c.stored.ravel().tolist()
    )
    cells = 8 * sum(c.stored.size for c in found.codes.values())
    assert found.hamming_rate == pytest.approx(ones / cells)


@pytest.mark.parametrize("name", ["perceptron", "padded", "transposed"])
def test_the_ratios_are_those_of_the_layers_outputs(name: str) -> None:
    graph = EVERY[name]
    batch = _inputs(graph, 512)
    found = compress(graph, [batch], snr=30.0)
    # The same inputs, of the network as it came: what calibration saw.
    measured = _snr_on_the_original(found, batch)
    for layer in found.layers:
        assert layer.snr == pytest.approx(measured[layer.name], abs=0.1)


def _snr_on_the_original(found: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    ratios = {}

    def watch(node: Any, given: Any) -> Any:
        made = evaluate(node, given)
        if node.input("weight") in found.codes:
            both = []
            for codes in (found.nearest, found.codes):
                values = torch.from_numpy(codes[node.input("weight")].values())
                both.append(evaluate(node, (given[0], values, *given[2:]))[0].double())
            noise = (both[1] - both[0]).square().sum()
            ratios[node.name] = float(10 * torch.log10(made[0].double().square().sum() / noise))
        return made

    found.graph.run(batch, hook=watch)
    return ratios


def test_more_fidelity_costs_ones() -> None:
    graph = networks.perceptron()
    candidates = Candidates(graph, calibrate(graph, [_inputs(graph, 512)]))
    found = [candidates.choose(snr) for snr in (20.0, 30.0, 40.0)]
    rates = [one.hamming_rate for one in found]
    assert rates == sorted(rates)
    assert [one.snr for one in found] == sorted(one.snr for one in found)
    held = [_inputs(graph, 512, seed=8)]
    kept = [min(layer_snr(one.int8, one.network, held).values()) for one in found]
    assert kept == sorted(kept)


def test_a_budget_for_each_layer_is_kept_by_each() -> None:
    graph = networks.perceptron()
    candidates = Candidates(graph, calibrate(graph, [_inputs(graph, 512)]), rows=1000)
    found = candidates.choose(28.0, fidelity="each")
    assert all(layer.snr >= 28.0 for layer in found.layers)
    loud = candidates.choose(28.0, fidelity="noise", sensitivity={"first": 100.0, "second": 0.01})
    calm = candidates.choose(28.0, fidelity="noise", sensitivity={"first": 0.01, "second": 100.0})
    assert loud.layers[0].snr > calm.layers[0].snr
    assert loud.layers[1].snr < calm.layers[1].snr


def test_a_row_of_wide_steps_is_not_forgotten_by_the_estimate() -> None:
    graph = networks.perceptron()
    weights = graph.constants["w1"].copy()
    # A row that is not among those that are tried, every fifth, has steps 8 times as wide. Were it
    # forgotten, 32 dB would become 31. A price counts for less beside wide steps, so its errors are
    # smaller than its steps foretell, and the ratio is kept without an allowance.
    weights[3] *= 8.0
    graph = replace(graph, constants={**graph.constants, "w1": weights})
    candidates = Candidates(graph, calibrate(graph, [_inputs(graph, 512)]), rows=8)
    for snr in (26.0, 32.0):
        assert candidates.choose(snr, fidelity="each").layers[0].snr >= snr


@pytest.mark.parametrize(
    ("name", "groups", "pruned"),
    [
        ("perceptron", 1, [0, 2]),
        ("perceptron", 1, [0, 1, 2]),
        ("grouped", 1, [0, 2]),
        ("grouped", 2, [0, 2]),
    ],
)
def test_a_layer_is_not_judged_by_rows_that_are_pruned(
    name: str, groups: int, pruned: list[int]
) -> None:
    graph = networks.conv("grouped", outputs=240) if name == "grouped" else networks.perceptron(120)
    constant = weights_of(graph)[0].constant
    weights = graph.constants[constant].copy()
    # Every fourth row from 0 and 2 on: with 30 to try of 120, half of them or all are zeros.
    among = weights.reshape(-1, 120, *weights.shape[1:])[:groups]
    for first in pruned:
        among[:, first::4] = 0.0
    graph = replace(graph, constants={**graph.constants, constant: weights})
    tried = 30 * weights_of(graph)[0].groups
    candidates = Candidates(graph, calibrate(graph, [_inputs(graph, 512)]), rows=tried)
    for snr in (28.0, 36.0):
        assert candidates.choose(snr, fidelity="each").layers[0].snr >= snr


def test_without_a_price_the_network_stays_what_it_is() -> None:
    graph = networks.perceptron()
    candidates = Candidates(
        graph, calibrate(graph, [_inputs(graph)]), shifts=(0,), stretches=(1.0,), prices=(0.0,)
    )
    found = candidates.choose(60.0)
    for name, codes in found.codes.items():
        np.testing.assert_array_equal(codes.stored, found.nearest[name].stored)
    assert found.cut == 0


def test_the_scale_uses_all_of_the_range_on_one_side() -> None:
    weight = networks.of(networks.perceptron())
    array = networks.perceptron().constants["w1"].copy()
    array[0] = 0
    scale = channel_scale(weight, array, 8)
    assert scale[0] == 1.0
    steps = array[1:] / scale[1:, None]
    touches = np.isclose(steps.max(1), 127) | np.isclose(steps.min(1), -128)
    assert touches.all()
    assert (steps <= 127 + 1e-4).all()
    assert (steps >= -128 - 1e-4).all()


def test_names_what_is_wrong() -> None:
    graph = networks.perceptron()
    batch = _inputs(graph)
    with pytest.raises(ValueError, match="batches: got none"):
        calibrate(graph, [])
    with pytest.raises(ValueError, match="bits: got 17"):
        compress(graph, [batch], bits=17)
    with pytest.raises(ValueError, match="bits: got 1, expected 2 to 16"):
        compress(graph, [batch], bits=1)
    with pytest.raises(ValueError, match="snr: got nan"):
        compress(graph, [batch], snr=float("nan"))
    with pytest.raises(ValueError, match="fidelity: got 'all'"):
        compress(graph, [batch], fidelity="all")  # type: ignore[arg-type]
    calibration = calibrate(graph, [batch])
    with pytest.raises(ValueError, match=r"shifts: got \[300\]"):
        Candidates(graph, calibration, shifts=(300,))
    with pytest.raises(ValueError, match=r"sensitivity: got 1\.0 for 'third'"):
        Candidates(graph, calibration).choose(20.0, fidelity="noise", sensitivity={"third": 1.0})
    with pytest.raises(ValueError, match="first: got inputs that are not finite"):
        calibrate(graph, [{"x": torch.full((3, 24), torch.nan)}])
    with pytest.raises(ValueError, match="calibration: 'conv' is missing"):
        Candidates(networks.conv(), calibration)
    broken = graph.constants["w2"].copy()
    broken[0, 0] = np.nan
    bad = Graph(graph.nodes, graph.inputs, graph.outputs, {**graph.constants, "w2": broken})
    with pytest.raises(ValueError, match="second: got a weight that is not finite"):
        Candidates(bad, calibration)
    about = {"stride": (1, 1, 1), "padding": ((0, 0),) * 3, "dilation": (1, 1, 1)}
    deep = Graph(
        (Node("deep", "conv", ("x", "w"), ("y",), about),),
        (Value("x", "float32", (1, 2, 4, 4, 4)),),
        ("y",),
        {"w": networks.normal(3, 2, 1, 1, 1)},
    )
    with pytest.raises(ValueError, match=r"conv 'deep': got a weight \(3, 2, 1, 1, 1\)"):
        weights_of(deep)


@pytest.mark.parametrize(
    ("rows", "factor", "message"),
    [(0, 1.0, "first: got no inputs"), (9, 1e25, "first: got inputs whose squares are beyond")],
)
def test_calibration_that_says_nothing_is_blamed_on_its_layer(
    rows: int, factor: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(networks.perceptron(), [{"x": networks.rows(rows, 24) * factor}])


def test_a_network_of_zeros_has_no_ones_to_cut() -> None:
    graph = networks.perceptron()
    zeros = {name: np.zeros_like(x) for name, x in graph.constants.items()}
    found = compress(replace(graph, constants=zeros), [{"x": networks.rows(50, 24)}], snr=25.0)
    assert found.cut == 0.0


def test_shifts_are_integers() -> None:
    with pytest.raises(TypeError, match=r"shifts: got 0\.5"):
        compress(networks.perceptron(), [{"x": networks.rows(50, 24)}], shifts=[0.5])  # type: ignore[list-item]
