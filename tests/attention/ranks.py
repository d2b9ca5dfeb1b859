"""What each process of the distributed tests runs. Importable without pytest: it is spawned."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from quernstone.attention import HeadBalancer, SinkAttention

RANKS, SEQUENCES, LENGTH, WIDTH = 2, 6, 17, 32

SHARES: dict[str, list[list[list[int]]]] = {
    "one pass": [[[0]], [[1, 2, 3, 4, 5]]],
    "two micro-batches": [[[0], [4, 1]], [[2, 3], [5]]],
    "one and three micro-batches": [[[0, 5]], [[2], [1, 3], [4]]],
}
"""The sequences of each micro-batch of each rank."""

OPTIONS: dict[str, Any] = {"weight": 0.3, "shared": 1}


class Model(nn.Module):
    """Layers of all three kinds, unlike in their number of heads."""

    def __init__(self, last_heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                SinkAttention(WIDTH, 2, kind="vanilla", window=6),
                SinkAttention(WIDTH, 4, num_kv_heads=2, head_dim=16, kind="gated"),
                SinkAttention(WIDTH, last_heads, num_kv_heads=2, head_dim=16),
            ]
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, key_lengths=lengths)
        return x


def model(**changes: Any) -> Model:
    torch.manual_seed(5)
    made = Model(**changes)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return made


def batch(sequences: list[int] | None = None) -> dict[str, Tensor]:
    """Sequences of lengths from 3 to 17."""
    rng = torch.Generator().manual_seed(7)
    x = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=rng)
    lengths = torch.tensor([3, 17, 9, 14, 5, 11])
    which = list(range(SEQUENCES)) if sequences is None else sequences
    return {"x": x[which], "lengths": lengths[which]}


def base_loss(net: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """A share of a mean over all tokens of all ranks."""
    out = net(**inputs)
    counts = torch.arange(LENGTH) < inputs["lengths"][:, None]
    return out[counts].square().sum() / batch()["lengths"].sum()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


def main(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    try:
        found = {name: _step(rank, shares) for name, shares in SHARES.items()}
        torch.save({"steps": found, "errors": _errors(rank)}, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def _step(rank: int, shares: list[list[list[int]]]) -> dict[str, Any]:
    mine = [batch(share) for share in shares[rank]]
    net = model()
    parallel = DistributedDataParallel(net)
    total = 0.0
    with HeadBalancer(parallel, **OPTIONS) as balancer:
        if max(len(share) for share in shares) > 1:
            balancer.measure(mine)
        for i, inputs in enumerate(mine):
            last = i == len(mine) - 1
            parallel.require_backward_grad_sync = last
            base = RANKS * base_loss(parallel, inputs)
            loss = balancer.loss(micro_batches=len(mine))
            total += loss.item()
            (base + loss).backward()
    found = {"loss": total, "importance": balancer.importance, "cv": balancer.mean_cv}
    return {**found, "gradients": gradients(net)}


def _errors(rank: int) -> dict[str, str]:
    """What this rank is told when the ranks differ."""
    found = {}
    whole = batch()
    odd = model(last_heads=6 if rank else 4)
    still = model()
    renamed = model()
    if rank:
        renamed.layers = nn.ModuleDict(
            {str(9 - i): layer for i, layer in enumerate(renamed.layers)}
        )
        renamed.forward = lambda x, lengths: [  # type: ignore[method-assign, assignment]
            layer(x, key_lengths=lengths) for layer in renamed.layers.values()
        ]
    for name, net in (("heads", odd), ("silent", still), ("names", renamed)):
        with HeadBalancer(net) as balancer:
            if name != "silent" or rank == 0:
                net(**whole)
            try:
                balancer.loss()
            except ValueError as error:
                found[name] = str(error)
    with HeadBalancer(odd) as balancer:
        try:
            balancer.measure([whole])
        except ValueError as error:
            found["measure"] = str(error)
    # After all that the ranks still understand each other.
    with HeadBalancer(still) as balancer:
        still(**whole)
        found["after"] = str(balancer.loss().item() > 0.0)
    return found
