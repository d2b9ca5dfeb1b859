"""Compiles the kernels of experts for chips that are not here, as `ahead_of_time` attention's.

What is read is machine code; nothing is run on a GPU.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quernstone.kernels.triton import moe
from quernstone.kernels.triton.ahead_of_time import resources
from quernstone.kernels.triton.attention_configs import CHIPS, SHARED_BYTES
from quernstone.kernels.triton.moe_configs import Config, candidates

KERNELS = ("gate_up", "down")
# What a chip's tensor cores are called in PTX, the newest first; sm_120 has those of sm_80.
MATRIX = {80: ("mma.sync",), 90: ("wgmma",), 100: ("tcgen05.mma", "mma.sync"), 120: ("mma.sync",)}
# Of DeepSeek-V2-Lite's experts; the extents of a call are arguments, those of a block constants.
HIDDEN, INTERMEDIATE = 2048, 1408


class Build(NamedTuple):
    """One kernel, as one call would compile it."""

    kernel: str  # "gate_up" or "down"
    bits: int  # 4, 8 or 16
    config: Config
    group: int = 0
    zeros: bool = False


class Usage(NamedTuple):
    """What the machine code of one build needs."""

    registers: int
    spilled_bytes: int  # a thread's stack and local memory
    shared_bytes: int
    matrix: str  # the instruction that multiplies; empty: none


def source(build: Build) -> ASTSource:
    """The kernel with the types and constants of a call."""
    across = build.kernel == "gate_up"
    kernel = moe._experts_gate_up_kernel if across else moe._experts_down_kernel
    inputs = HIDDEN if across else INTERMEDIATE
    codes = 2 * inputs * build.bits
    scales = {4: 32 * inputs // (build.group or 1), 8: 64, 16: 0}[build.bits]
    zeros = scales // 2 if build.zeros else 0
    constants: dict[str, Any] = {
        "BITS": build.bits,
        "GROUP": build.group,
        "ZEROS": build.zeros,
        "CODE_BYTES": codes,
        "SCALE_BYTES": scales,
        "BLOCK_BYTES": -(-(codes + scales + zeros) // 64) * 64,
        "PADDED": inputs,
        "BEFORE": 1 << 22,
        "BLOCK_N": build.config.block_n,
        "BLOCK_T": build.config.block_t,
        "BLOCK_K": build.config.block_k,
        "DOT_IN_FP32": False,
    }
    types = {
        **{"data": "*u8", "offsets": "*i64", "tiles": "*i32", "tokens": "*i32"},
        **{"x": "*bf16", "inner": "*bf16", "out": "*fp32"},
        **dict.fromkeys(("TILES", "M", "F"), "i32"),
    }
    signature = {}
    aligned = {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types[name]
        if signature[name].startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    constexprs = {name: constants[name] for name in signature if name in constants}
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)


def compile_for(build: Build, capability: int) -> Usage:
    compiled = triton.compile(
        source(build),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": build.config.warps,
            "num_stages": build.config.stages,
            "enable_fp_fusion": True,
        },
    )
    registers, spilled = resources(compiled.asm["cubin"])
    matrix = next((name for name in MATRIX[capability] if name in compiled.asm["ptx"]), "")
    return Usage(registers, spilled, compiled.metadata.shared, matrix)


def broken_promises(capability: int, usage: Usage) -> list[str]:
    """What is wrong with a build, in words."""
    broken = []
    if usage.spilled_bytes > 0:
        broken.append(f"spills {usage.spilled_bytes} bytes")
    limit = SHARED_BYTES[capability]
    if usage.shared_bytes > limit:
        broken.append(f"takes {usage.shared_bytes} bytes of shared memory of {limit}")
    if not usage.matrix:
        broken.append(f"has no {' or '.join(MATRIX[capability])} instruction")
    return broken


FORMATS = (
    *((4, group, zeros) for group in (32, 64, 128) for zeros in (False, True)),
    (8, 0, False),
    (16, 0, False),
)


def all_builds() -> list[tuple[Build, int]]:
    """Both kernels in every format and configuration, beside the chip."""
    return [
        (Build(kernel, bits, config, group, zeros), chip)
        for chip, kernel, (bits, group, zeros) in product(CHIPS, KERNELS, FORMATS)
        for config in candidates(chip)
    ]


def _attempt(job: tuple[Build, int]) -> Usage:
    return compile_for(*job)


def main() -> int:
    """Prints a row for each build; 1 where a promise is broken."""
    jobs = all_builds()
    context = multiprocessing.get_context("spawn")
    number = 0
    print("compiled, not run on a GPU\n")
    print(
        "chip   kernel  weights    tokens x outputs x inputs warps stages registers spilled shared"
    )
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for (build, chip), usage in zip(jobs, pool.map(_attempt, jobs), strict=True):
            broken = broken_promises(chip, usage)
            number += bool(broken)
            c = build.config
            weights = {4: f"int4 g{build.group}{'z' * build.zeros}", 8: "int8", 16: "bf16"}
            print(
                f"sm_{chip:<3} {build.kernel:7} {weights[build.bits]:10} "
                f"{c.block_t:6} x {c.block_n:3} x {c.block_k:<12} {c.warps:5} {c.stages:6} "
                f"{usage.registers:9} {usage.spilled_bytes:7} {usage.shared_bytes:6} "
                f"{usage.matrix}{': ' * bool(broken)}{', '.join(broken)}",
                flush=True,
            )
    print(f"\n{len(jobs)} builds, {number} with a broken promise")
    return 1 if number else 0


if __name__ == "__main__":
    sys.exit(main())
