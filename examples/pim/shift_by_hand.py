"""The weight shift by hand: fewer ones stored, the same integers out."""

import numpy as np

from quernstone.pim import hamming_rate, mvm
from quernstone.pim.macro import Macro

random = np.random.default_rng(0)
weights = np.round(10 * random.normal(size=(64, 512))).astype(np.int64)
inputs = random.integers(-128, 128, (4, 512))

shift = 16
stored = np.clip(weights + shift, -128, 127)
plain, moved = hamming_rate(weights, 8), hamming_rate(stored, 8)
print(f"Hamming rate {plain:.3f}, stored with a shift {moved:.3f}")

macro = Macro(rows=512, banks=64)
compensated = mvm(stored, inputs, macro) - shift * inputs.sum(1, keepdims=True)
print("same products:", np.array_equal(compensated, inputs @ weights.T))
