"""Which machine, which build, which versions: what a figure needs to be read again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PEERS = ("quernstone", "torch", "numpy", "triton", "transformers", "onnxruntime")


def version(package: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(packages: tuple[str, ...] = PEERS) -> dict[str, str]:
    return {name: found for name in packages if (found := version(name)) is not None}


def describe() -> dict[str, Any]:
    """CPU, cores, memory, system, ISA level, compiler and versions."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **build(),
        "versions": versions(),
    }


def build() -> dict[str, Any]:
    """What the extension module says of itself; empty where it cannot be loaded."""
    try:
        from quernstone import _core
    except ImportError:
        return {}
    info = {str(key): str(value) for key, value in _core.build_info().items()}
    return {"isa": _core.isa(), "isas": list(_core.isas()), "build": info}


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return memory_bytes() // 2
