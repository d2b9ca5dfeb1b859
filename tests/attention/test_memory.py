"""Memory that does not grow with the square of the sequence, and no value left unwritten."""

import subprocess
import sys

import pytest
import torch

from quernstone.attention import sink_attention

from .cases import DTYPES, KINDS, Case, split

MEGABYTE = 2**20

# VmHWM, the peak of this address space; ru_maxrss would still hold that of the forking parent.
PEAK = """
import torch
from quernstone.attention import sink_attention

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

q = torch.randn(1, 2, 16384, 64).to(torch.{dtype})
k, v = (torch.randn(1, 1, 16384, 64).to(torch.{dtype}) for _ in range(2))
options = {options}
before = status("VmRSS")
out, aux = sink_attention(q, k, v, return_aux=True, **options)
assert out.isfinite().all() and aux.lse.isfinite().all()
print(status("VmHWM") - before - out.nbytes - aux.lse.nbytes)
"""

OPTIONS = {
    "sink": "dict(sinks=torch.zeros(2))",
    "vanilla": "dict(kind='vanilla')",
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("kind", "dtype"), [("sink", "float32"), ("sink", "bfloat16"), ("vanilla", "float32")]
)
def test_16384_tokens_take_less_than_50_megabytes_beyond_inputs_and_output(
    kind: str, dtype: str
) -> None:
    code = PEAK.format(dtype=dtype, options=OPTIONS[kind])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50 * MEGABYTE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_element_of_every_result_is_written(isa: str, kind: str, dtype: torch.dtype) -> None:
    # torch fills what it hands out as uninitialised with NaN in this mode.
    case = Case(kind=kind, dtype=dtype, batch=3, ratio=3, queries=37, keys=37, padding="both")
    (q, k, v), options = case.make()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8).isnan().all()
        out, aux = split(sink_attention(q, k, v, **options))
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.isfinite().all()
    assert aux is not None
    assert not aux.lse.isnan().any()
    assert aux.importance.isfinite().all()
