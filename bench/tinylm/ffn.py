"""What works on each token by itself in a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from quernstone.bench.tinylm.model import Config


class Dense(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.channels, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        down: Tensor = self.down(functional.silu(gate) * up)
        return down


FFNS: dict[str, Callable[[Config], nn.Module]] = {"dense": Dense}
"""By the name that stands in `Config.ffn`; a module maps [b, t, c] to [b, t, c]."""
