"""Peak memory of one call, in a fresh process so that no earlier row's pages are counted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
# Writing 5 resets the peak that the kernel keeps (proc(5), clear_refs).
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_beyond(factory: str, **arguments: Any) -> int:
    """Bytes that a call needed at its peak beyond what stood before it and what it returned.

    Args:
        factory: "module:function"; the function gets the arguments and gives a callable that
            returns a tensor or several. Its inputs are made before the measurement.
    """
    command = [sys.executable, "-m", "quernstone.bench.memory", factory, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise RuntimeError(f"{factory}: {reason[-1] if reason else done.returncode}")
    return int(done.stdout.split()[-1])


def _measure(factory: str, arguments: dict[str, Any]) -> int:
    module, function = factory.split(":")
    call = getattr(importlib.import_module(module), function)(**arguments)
    CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    result = call()
    results = [result] if hasattr(result, "nbytes") else list(result)
    # The counters lag by a few pages, which shows where the call needs none.
    return max(0, _status("VmHWM") - before - sum(int(x.nbytes) for x in results))


def _status(field: str) -> int:
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


if __name__ == "__main__":
    print(_measure(sys.argv[1], json.loads(sys.argv[2])))
