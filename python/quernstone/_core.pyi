import numpy as np
from numpy.typing import NDArray

def load_torch(libtorch_cpu: str) -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def build_info() -> dict[str, str]: ...
def bench_read(address: int, bytes: int, prefetch_bytes: int, streams: int) -> float: ...
def bench_copy_nt(to: int, source: int, bytes: int, prefetch_bytes: int) -> float: ...

class attention:
    @staticmethod
    def last_forward_seconds() -> float: ...

def pack_bits(codes: NDArray[np.uint8], bits: int, packed: NDArray[np.uint8]) -> None: ...
def unpack_bits(packed: NDArray[np.uint8], bits: int, codes: NDArray[np.uint8]) -> None: ...

class Layout:
    def __init__(
        self, format: str, rows: int, inputs: int, group: int = 0, zero_points: bool = False
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

def pack_codes(
    layout: Layout,
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None,
    out: NDArray[np.uint8],
) -> None: ...
def pack_bf16(layout: Layout, weights: NDArray[np.uint16], out: NDArray[np.uint8]) -> None: ...
def unpack(layout: Layout, packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None: ...
def multiply(
    layout: Layout,
    packed: NDArray[np.uint8],
    x: NDArray[np.float32],
    compute: str,
    out: NDArray[np.float32],
) -> None: ...

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Starts = tuple[float, float, float, float]

class moe:
    class ExpertsLayout:
        def __init__(
            self,
            format: str,
            count: int,
            hidden: int,
            intermediate: int,
            group: int = 0,
            zero_points: bool = False,
        ) -> None: ...
        @property
        def bytes(self) -> int: ...
        @property
        def expert_bytes(self) -> int: ...

    @staticmethod
    def place_expert(
        layout: moe.ExpertsLayout,
        index: int,
        gate: NDArray[np.uint8],
        up: NDArray[np.uint8],
        down: NDArray[np.uint8],
        out: NDArray[np.uint8],
    ) -> None: ...
    @staticmethod
    def experts_forward(
        layout: moe.ExpertsLayout,
        packed: NDArray[np.uint8],
        x: NDArray[np.float32],
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        compute: str,
        out: NDArray[np.float32],
    ) -> None: ...
    @staticmethod
    def replay_cache(
        policy: str,
        slots: int,
        keys: int,
        needed: NDArray[np.int64],
        offsets: NDArray[np.int64],
        first: NDArray[np.int64],
        scores: NDArray[np.float64] | None = None,
        next: NDArray[np.int64] | None = None,
        remember: bool = True,
        halve_every: int = 0,
        alpha: float = 0.5,
    ) -> NDArray[np.uint8]: ...
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

class pim:
    @staticmethod
    def lhr_mean(
        weight: NDArray[np.float32], scales: NDArray[np.float32], group: int, bits: int, shift: int
    ) -> float: ...
    @staticmethod
    def lhr_gradient(
        weight: NDArray[np.float32],
        scales: NDArray[np.float32],
        group: int,
        bits: int,
        shift: int,
        factor: float,
        accumulate: bool,
        grad: NDArray[np.float32],
    ) -> None: ...
    @staticmethod
    def lhr_squared(
        weight: NDArray[np.float32],
        scales: NDArray[np.float32],
        group: int,
        bits: int,
        shift: int,
        factor: float,
        accumulate: bool,
        grad: NDArray[np.float32],
    ) -> float: ...
