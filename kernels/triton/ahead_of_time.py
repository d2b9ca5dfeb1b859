"""Compiles the attention kernels for chips that are not here, and reads what they need.

Registers, spills, shared memory and tensor-core instructions are facts about machine code, and
`ptxas` and `cuobjdump` come with Triton. Nothing is run on a GPU, so nothing is known of speed.
"""

import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quernstone.kernels.triton import attention, attention_backward
from quernstone.kernels.triton.attention_configs import (
    CHIPS,
    KERNELS,
    SHARED_BYTES,
    WIDTHS,
    Config,
    candidates,
    rows_block,
)

KINDS = {
    "sink": attention.SINK,
    "vanilla": attention.VANILLA,
    "gated": attention.GATED,
    "gated by element": attention.GATED_BY_ELEMENT,
}
_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


class Build(NamedTuple):
    """One kernel, as one call would compile it."""

    kernel: str  # "forward", "keys", "queries", "rows", "count" or "sum"
    dtype: str  # "bf16", "fp16" or "fp32"
    width: int
    config: Config
    kind: str = "sink"
    causal: bool = True
    windowed: bool = False
    padded: bool = False  # key_start, key_lengths and token_mask are given
    aux: bool = True  # lse and importance are asked for; importance has a gradient
    dlse: bool = False  # lse has one too


class Usage(NamedTuple):
    """What the machine code of one build needs."""

    registers: int
    spilled_bytes: int  # a thread's stack and local memory
    shared_bytes: int
    wgmma: bool


def _kernel(build: Build) -> Any:
    return {
        "forward": attention._sink_attention_fwd_kernel,
        "keys": attention_backward._sink_attention_bwd_keys_kernel,
        "queries": attention_backward._sink_attention_bwd_queries_kernel,
        "rows": attention_backward._sink_attention_bwd_rows_kernel,
        "count": attention_backward._sink_attention_count_kernel,
        "sum": attention._sink_attention_sum_kernel,
    }[build.kernel]


def _absent(build: Build) -> set[str]:
    """Arguments that are None in a call."""
    absent = {"sinks"} if build.kind != "sink" else set()
    absent |= {"gate", "dgate"} if not build.kind.startswith("gated") else set()
    absent |= {"gated_dout"} if build.kind != "gated by element" else set()
    absent |= {"dsink_parts"} if build.kind != "sink" else set()
    absent |= {"gate_logit", "first_shifts"} if build.kind != "vanilla" or not build.aux else set()
    absent |= {"key_start", "key_lengths", "token_mask"} if not build.padded else set()
    if build.kind not in ("sink", "gated") or (build.dtype != "fp32" and not build.dlse):
        absent |= {"weights"}
    if not build.aux:
        absent |= {"lse"} if build.kernel == "forward" else set()
        absent |= {"gate_sums", "counts", "dimportance"}
    if not build.dlse:
        absent |= {"dlse"}
    return absent


_FP32_POINTERS = {
    *("lse", "gate_logit", "gate_sums", "dlse", "dimportance", "bases", "shifts"),
    *("weights", "first_shifts", "dsink_parts", "sinks", "parts"),
}
_POINTERS = {"key_start": "*i64", "key_lengths": "*i64", "token_mask": "*u8", "counts": "*i32"}


def source(build: Build) -> ASTSource:
    """The kernel with the types and constants of a call."""
    kernel = _kernel(build)
    padded_width = triton.next_power_of_2(build.width)
    constants: dict[str, Any] = {
        "KIND": KINDS[build.kind].value,
        "CAUSAL": build.causal,
        "WINDOWED": build.windowed,
        "NEGATIVE": False,
        "WIDTH": build.width,
        "D": padded_width,
        "BLOCK_T": build.config.block_t,
        "BLOCK_S": build.config.block_s,
        "DOT_IN_FP32": False,
        "BLOCK": 1024 if build.kernel == "count" else 256,
    }
    constants |= dict.fromkeys(_absent(build))
    signature = {}
    aligned = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("scale"):
            signature[name] = "fp32"
        elif name.startswith("stride"):
            signature[name] = "i32"
        elif (len(name) == 1 and name.isupper()) or name in ("GROUP", "COUNTS", "window"):
            signature[name] = "i32"
            continue
        elif name in _FP32_POINTERS:
            signature[name] = "*fp32"
        else:
            signature[name] = _POINTERS.get(name, f"*{build.dtype}")
        if signature[name] not in ("constexpr", "fp32"):
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
    return Usage(registers, spilled, compiled.metadata.shared, "wgmma" in compiled.asm["ptx"])


def broken_promises(build: Build, capability: int, usage: Usage) -> list[str]:
    """What is wrong with a build, in words."""
    broken = []
    wide_backward = build.kernel in ("keys", "queries") and build.width > 128
    if usage.spilled_bytes > 0 and not wide_backward:
        broken.append(f"spills {usage.spilled_bytes} bytes")
    limit = SHARED_BYTES[capability]
    if usage.shared_bytes > limit:
        broken.append(f"takes {usage.shared_bytes} bytes of shared memory of {limit}")
    if capability == 90 and build.dtype != "fp32" and build.kernel in KERNELS and not usage.wgmma:
        broken.append("has no wgmma instruction")
    return broken


def all_builds() -> list[tuple[Build, int]]:
    """Every kernel with every configuration that a call may take, beside the chip."""
    heaviest: dict[str, Any] = {"padded": True, "windowed": True}
    variants = (
        {"kind": "sink"},
        {"kind": "sink", "dlse": True, **heaviest},
        {"kind": "vanilla", **heaviest},
    )
    by_element = {"kind": "gated by element", **heaviest}
    found: list[tuple[Build, int]] = []
    for chip, width in product(CHIPS, WIDTHS):
        for dtype, kernel in product(("bf16", "fp16", "fp32"), KERNELS):
            # To the keys and the queries, a gate by element looks like none.
            chosen = (*variants, by_element) if kernel == "forward" else variants
            found += (
                (Build(kernel, dtype, width, config, **variant), chip)
                for variant in chosen
                for config in candidates(
                    kernel, width, _BITS[dtype], chip, weighted=variant.get("dlse", False)
                )
            )
        rows = Config(rows_block(width), 0, 4, 1)
        found += (
            (Build("rows", "bf16", width, rows, **variant), chip)
            for variant in (*variants, by_element)
        )
    for chip, kernel in product(CHIPS, ("sum", "count")):
        found.append((Build(kernel, "fp32", 64, Config(0, 0, 4, 1), padded=True), chip))
    return found


def _attempt(job: tuple[Build, int]) -> Usage:
    return compile_for(*job)


def main() -> int:
    """Prints a row for each build; 1 where a promise is broken."""
    jobs = all_builds()
    context = multiprocessing.get_context("spawn")
    number = 0
    print("compiled, not run on a GPU\n")
    print(f"{'chip':6} {'kernel':8} dtype width t x s    warps stages registers spilled shared")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for (build, chip), usage in zip(jobs, pool.map(_attempt, jobs), strict=True):
            broken = broken_promises(build, chip, usage)
            number += bool(broken)
            config = build.config
            mask = f"{build.kind}{' padded, windowed' * build.padded}{' dlse' * build.dlse}"
            print(
                f"sm_{chip:<3} {build.kernel:8} {build.dtype:5} {build.width:5} "
                f"{config.block_t:3} x {config.block_s:<4} {config.warps:5} {config.stages:6} "
                f"{usage.registers:9} {usage.spilled_bytes:7} {usage.shared_bytes:6} "
                f"{'wgmma ' * usage.wgmma}{mask}{': ' * bool(broken)}{', '.join(broken)}",
                flush=True,
            )
    print(f"\n{len(jobs)} builds, {number} with a broken promise")
    return 1 if number else 0


@functools.cache
def _cuobjdump() -> Path:
    (path,) = Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump*")
    return path


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it keeps in memory for want of them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump()), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump: got {text!r}, expected the resources of one kernel")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


if __name__ == "__main__":
    sys.exit(main())
