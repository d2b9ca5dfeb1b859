"""The balancer over two processes: the gradient of the joined batch, and errors on both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from quernstone.attention import HeadBalancer

from . import ranks

# Of every parameter's gradient and of all together.
SAME = 1e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(
        ranks.main, (str(folder),), nprocs=ranks.RANKS, start_method="spawn"
    )
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks.RANKS)]


@pytest.fixture(scope="module")
def joined() -> dict[str, Any]:
    net, whole = ranks.model(), ranks.batch()
    with HeadBalancer(net, **ranks.OPTIONS) as balancer:
        base = ranks.base_loss(net, whole)
        loss = balancer.loss()
        (base + loss).backward()
    return {
        "loss": loss.item(),
        "importance": balancer.importance,
        "gradients": ranks.gradients(net),
    }


@pytest.mark.parametrize("name", list(ranks.SHARES))
def test_gradients_are_those_of_one_process_with_the_whole_batch(
    found: list[dict[str, Any]], joined: dict[str, Any], name: str
) -> None:
    whole = torch.cat([x.flatten() for x in joined["gradients"].values()]).norm()
    for rank in found:
        step = rank["steps"][name]
        assert step["gradients"].keys() == joined["gradients"].keys()
        for weight, want in joined["gradients"].items():
            off = (step["gradients"][weight] - want).norm()
            assert off <= SAME * (want.norm() + whole), weight
        for layer, x in joined["importance"].items():
            torch.testing.assert_close(step["importance"][layer], x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list(ranks.SHARES))
def test_values_add_up_to_the_loss_on_every_rank(
    found: list[dict[str, Any]], joined: dict[str, Any], name: str
) -> None:
    for rank in found:
        assert rank["steps"][name]["loss"] == pytest.approx(joined["loss"], rel=1e-5)


def test_ranks_with_other_layers_are_refused_on_all_of_them(found: list[dict[str, Any]]) -> None:
    for rank in found:
        errors = rank["errors"]
        assert (
            "rank 0 recorded 3 layers with 10 heads, rank 1 recorded 3 layers with 12 heads"
            in errors["heads"]
        )
        assert errors["measure"] == errors["heads"]
        assert "rank 1 recorded 0 layers with 0 heads" in errors["silent"]
        assert "layers: got other ones on other ranks" in errors["names"]
        assert errors["after"] == "True"
