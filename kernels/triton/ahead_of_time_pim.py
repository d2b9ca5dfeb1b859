"""Compiles the kernels of `pim` for chips that are not here: compiled, not run on a GPU."""

import sys
from itertools import product
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quernstone.kernels.triton import pim
from quernstone.kernels.triton.ahead_of_time import resources
from quernstone.kernels.triton.attention_configs import CHIPS

KERNELS = {"forward": pim._lhr_fwd_kernel, "backward": pim._lhr_bwd_kernel}


class Build(NamedTuple):
    kernel: str
    bits: int = 8
    single: bool = True  # one scale for the whole layer
    block: int = 2048
    warps: int = 8


def compile_for(build: Build, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    kernel = KERNELS[build.kernel]
    constants = {"BITS": build.bits, "SINGLE": build.single, "BLOCK": build.block}
    sizes = {"N": "i64", "width": "i64", "group": "i64", "scale_stride": "i64", "shift": "i32"}
    signature = {
        name: "constexpr" if name in constants else sizes.get(name, "*fp32")
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name] == "*fp32"
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": build.warps, "enable_fp_fusion": False},
    )
    return resources(compiled.asm["cubin"])


def main() -> int:
    """Prints a row for each build; 1 where one spills."""
    print("compiled, not run on a GPU\n")
    spills = 0
    for chip, kernel, bits, single in product(CHIPS, KERNELS, (8, 16), (True, False)):
        registers, spilled = compile_for(Build(kernel, bits, single), chip)
        spills += spilled > 0
        scales = "one scale" if single else "scales by channel or group"
        print(
            f"sm_{chip:<3} {kernel:8} int{bits:<2} {registers:3} registers, {spilled} spilled, "
            f"{scales}"
        )
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
