import numpy as np
from numpy.typing import NDArray

def load_torch(libtorch_cpu: str) -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def build_info() -> dict[str, str]: ...
def bench_read(address: int, bytes: int, prefetch_bytes: int) -> float: ...
def bench_copy_nt(to: int, source: int, bytes: int, prefetch_bytes: int) -> float: ...

class attention:
    @staticmethod
    def last_forward_seconds() -> float: ...

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Starts = tuple[float, float, float, float]

class moe:
    @staticmethod
    def schedule(
        loads: _Ints,
        ready: _Floats,
        cpu: _Floats,
        gpu: _Floats,
        transfer: _Floats,
        starts: _Starts,
        policy: str,
    ) -> tuple[
        NDArray[np.uint8], NDArray[np.int32], _Floats, _Floats, _Floats, _Floats, _Starts
    ]: ...
    @staticmethod
    def seconds_to_schedule(
        loads: _Ints,
        ready: _Floats,
        cpu: _Floats,
        gpu: _Floats,
        transfer: _Floats,
        starts: _Starts,
        policy: str,
        calls: int,
    ) -> float: ...
    @staticmethod
    def prefetch(
        layers: list[tuple[_Ints, _Floats, _Floats, _Floats, _Floats, _Starts, _Floats]],
        budget: float,
        limit: int,
        policy: str,
    ) -> list[tuple[int, int, float, float, float, float]]: ...
    @staticmethod
    def cancel(
        transfer: _Floats, needed: NDArray[np.bool_], elapsed: float, tiles: int, now: float
    ) -> tuple[NDArray[np.bool_], _Floats, float]: ...
