"""What `api` computes, as plain as numpy can say it; never on the fast path.

Axes: o outputs, i inputs, v vectors, t cycles, r tiles of rows, b tiles of banks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def hamming_weights(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Ones of each integer in two's complement of that many bits."""
    mask = (1 << bits) - 1
    ones: NDArray[np.uint8] = np.bitwise_count(values.astype(np.int64) & mask)
    return ones
