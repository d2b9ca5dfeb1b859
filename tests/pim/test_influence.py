"""What the error of a layer does to the outputs is what one finds by changing it alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quernstone.importers import Graph
from quernstone.pim.influence import influence
from quernstone.pim.network import Candidates, calibrate
from quernstone.pim.wds import with_codes
from tests.pim import networks

BATCH = {"x": networks.rows(400, 24)}


def _outputs(graph: Graph) -> torch.Tensor:
    return next(iter(graph.run(BATCH).values())).double()


def test_it_is_the_error_of_the_outputs_over_that_of_the_layer() -> None:
    graph = networks.perceptron()
    found = Candidates(graph, calibrate(graph, [BATCH])).choose(28.0, fidelity="each")
    want = _outputs(found.int8)
    errors = []
    for layer, (name, codes) in zip(found.layers, found.codes.items(), strict=True):
        alone = _outputs(with_codes(graph, {**found.nearest, name: codes}))
        share = (alone - want).square().sum() / want.square().sum()
        errors.append(float(share) / 10 ** (-layer.snr / 10))
    got = influence(found, [BATCH])
    np.testing.assert_allclose(list(got.values()), np.array(errors) / np.mean(errors), rtol=1e-4)
    assert list(got) == ["first", "second"]


def test_a_weight_that_is_looked_up_too_changes_only_where_it_multiplies() -> None:
    graph = networks.tied()
    batch = {"ids": torch.arange(400) % 30}
    found = Candidates(graph, calibrate(graph, [batch])).choose(28.0, fidelity="each")
    assert influence(found, [batch]) == {"head": 1.0}


def test_a_network_that_has_not_changed_has_layers_that_matter_alike() -> None:
    graph = networks.perceptron()
    same = Candidates(
        graph, calibrate(graph, [BATCH]), shifts=(0,), stretches=(1.0,), prices=(0.0,)
    ).choose(60.0)
    assert influence(same, [BATCH]) == {"first": 1.0, "second": 1.0}


def test_inputs_are_needed() -> None:
    graph = networks.perceptron()
    found = Candidates(graph, calibrate(graph, [BATCH])).choose(28.0)
    with pytest.raises(ValueError, match="batches: got none"):
        influence(found, [])
