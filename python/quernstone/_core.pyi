from collections.abc import Callable
from typing import Any

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
def round_columns(
    weight: NDArray[np.float64],
    upper: NDArray[np.float64],
    scale: NDArray[np.float64],
    zero: NDArray[np.float64],
    penalty: NDArray[np.float64],
    lowest: int,
    reach: int,
    of_output: bool,
    codes: NDArray[np.int16],
) -> None: ...

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
    @staticmethod
    def seconds_of_round_trips(count: int) -> list[float]: ...

    class DecoderLayer:
        def __init__(self, **parts: Any) -> None: ...
        def inputs(
            self,
            hidden: NDArray[np.float32],
            add: NDArray[np.float32] | None,
            cos: NDArray[np.float32],
            sin: NDArray[np.float32],
            normed: NDArray[np.float32],
            projected: NDArray[np.float32],
            q: NDArray[Any],
            k: NDArray[Any],
            v: NDArray[Any],
        ) -> None: ...
        def outputs(
            self,
            attended: NDArray[Any],
            joined: NDArray[np.float32],
            hidden: NDArray[np.float32],
            x: NDArray[np.float32],
            ids: _Ints,
            weights: NDArray[np.float32],
            sensitivity: float | None = None,
            threshold: float | None = None,
        ) -> tuple[int, int, int]: ...

    @staticmethod
    def final_norm(
        weight: NDArray[np.float32],
        eps: float,
        hidden: NDArray[np.float32],
        add: NDArray[np.float32] | None,
        out: NDArray[np.float32],
    ) -> None: ...

    class Runtime:
        def __init__(
            self,
            layers: list[tuple[int, int]],
            staging: int,
            cpu: tuple[list[float], list[float]],
            gpu: tuple[list[float], list[float]],
            cpu_first: float,
            transfer: float,
            policy: str,
            cache: str,
        ) -> None: ...
        def plan(
            self,
            layer: int,
            ids: _Ints,
            weights: NDArray[np.float32],
            scores: NDArray[np.float32] | None,
            now: float,
        ) -> list[tuple[bool, int, int, _Ints]]: ...
        def look_ahead(
            self, guesses: list[tuple[int, int, _Ints]]
        ) -> list[tuple[int, int, int]]: ...
        def needless(self, layer: int, ids: _Ints, now: float) -> list[tuple[int, int, int]]: ...
        def cancelled(self, layer: int, expert: int, slot: int) -> None: ...
        def compute(
            self,
            layout: moe.ExpertsLayout,
            packed: NDArray[np.uint8],
            x: NDArray[np.float32],
            compute: str,
            paced: bool,
        ) -> None: ...
        def combine(self, rows: NDArray[np.float32] | None, out: NDArray[np.float32]) -> None: ...
        def finish(self) -> None: ...
        def look_so_far(self, distance: int) -> None: ...
        def set_router(self, layer: int, router: NDArray[np.float32] | None) -> None: ...
        guess: Callable[[], list[tuple[int, int, _Ints]]] | None
        def take_error(self) -> BaseException | None: ...
        @property
        def under_way(self) -> bool: ...
        def place(self, layer: int, expert: int) -> int: ...
        def clear(self, layer: int) -> None: ...
        def resident(self, layer: int) -> list[int]: ...
        def predicted(self) -> list[tuple[str, float, float, int, str]]: ...
        def spans(self) -> list[tuple[list[int], float, float]]: ...
        def right_share(self, distance: int) -> float: ...
        @property
        def makespan(self) -> float: ...
        @property
        def hits(self) -> int: ...
        @property
        def active(self) -> int: ...
        @property
        def on_cpu(self) -> bool: ...
        @property
        def on_device(self) -> bool: ...
        @property
        def room_ahead(self) -> bool: ...

    class Step:
        def __init__(
            self,
            runtime: moe.Runtime,
            device: moe.EmulatedDevice,
            layer: int,
            layout: moe.ExpertsLayout,
            packed: NDArray[np.uint8],
            compute: str,
        ) -> None: ...
        @property
        def number(self) -> int: ...

    class EmulatedDevice:
        def __init__(
            self,
            layers: list[tuple[moe.ExpertsLayout, NDArray[np.uint8]]],
            slots: list[int],
            staging: int,
            compute: str,
        ) -> None: ...
        def begin(self) -> None: ...
        def load(self, layer: int, expert: int, slot: int, seconds: float) -> None: ...
        def cancel(self, layer: int, slot: int) -> bool: ...
        def compute(
            self,
            layer: int,
            expert: int,
            slot: int,
            x: NDArray[np.float32],
            tokens: _Ints,
            seconds: float,
        ) -> None: ...
        def collect(self) -> NDArray[np.float32]: ...
        def abort(self) -> None: ...
        def times(self) -> list[tuple[str, float, float, int, int]]: ...
        @property
        def late(self) -> int: ...

class pim:
    @staticmethod
    def boost(
        dynamic: _Floats,
        leak: _Floats,
        response: _Floats,
        group: _Ints,
        domain: _Ints,
        safe: _Ints,
        first: _Ints,
        volts: _Floats,
        hertz: _Floats,
        need: _Floats,
        adapt: bool,
        control: tuple[int, int, int, int, int],
        nominal: tuple[float, float],
        most_changes: int,
    ) -> tuple[_Floats, _Floats, _Ints, _Ints, _Ints, _Ints, _Floats, list[Any], int]: ...
    @staticmethod
    def map_tasks(
        level: _Ints,
        set: _Ints,
        pinned: _Ints,
        weight: _Floats,
        volts: _Floats,
        hertz: _Floats,
        groups: int,
        places: int,
        objective: str,
        moves: int,
        seed: int,
    ) -> tuple[_Ints, float]: ...
    @staticmethod
    def mapping_cost(
        level: _Ints,
        set: _Ints,
        pinned: _Ints,
        weight: _Floats,
        volts: _Floats,
        hertz: _Floats,
        groups: int,
        places: int,
        objective: str,
        group: _Ints,
    ) -> float: ...
    class Lines:
        def __init__(
            self,
            bits: int,
            idle: int,
            msb_first: bool,
            input_signed: bool,
            cross_vector: bool,
            zero_gating: bool,
        ) -> None: ...

    class Layer:
        def __init__(
            self,
            content: str,
            outputs: int,
            inputs: int,
            rows: int,
            banks: int,
            weight_bits: int,
            weight_signed: bool,
        ) -> None: ...
        @property
        def columns(self) -> int: ...
        @property
        def row_tiles(self) -> int: ...
        @property
        def bytes(self) -> int: ...

    @staticmethod
    def program(
        layer: pim.Layer, weights: NDArray[np.int8] | NDArray[np.int16], out: NDArray[np.uint8]
    ) -> None: ...
    @staticmethod
    def toggles(
        layer: pim.Layer,
        data: NDArray[np.uint8],
        lines: pim.Lines,
        inputs: NDArray[np.int8] | NDArray[np.int16],
        formulation: str,
        out: NDArray[np.int32],
    ) -> None: ...
    @staticmethod
    def mvm(
        layer: pim.Layer,
        data: NDArray[np.uint8],
        lines: pim.Lines,
        inputs: NDArray[np.int8] | NDArray[np.int16],
        formulation: str,
        out: NDArray[np.int64],
    ) -> None: ...
    @staticmethod
    def line_toggles(
        lines: pim.Lines, inputs: NDArray[np.int8] | NDArray[np.int16], out: NDArray[np.uint8]
    ) -> None: ...
    @staticmethod
    def count_ones(
        run: NDArray[np.int8] | NDArray[np.int16], bits: int, is_signed: bool
    ) -> tuple[int, bool]: ...
    @staticmethod
    def bench_loads(address: int, bytes: int, repeats: int) -> None: ...
    @staticmethod
    def formulations() -> list[str]: ...

    class Cholesky:
        def __init__(
            self,
            a: NDArray[np.int32],
            b: NDArray[np.int32],
            conductance: _Floats,
            ground: _Floats,
            x: _Floats | None,
            y: _Floats | None,
        ) -> None: ...
        def solve(self, currents: _Floats, out: _Floats, threads: int) -> None: ...
        @property
        def size(self) -> int: ...
        @property
        def stored(self) -> int: ...
        @property
        def nonzeros(self) -> int: ...
        @property
        def operations(self) -> float: ...

    @staticmethod
    def reach(a: NDArray[np.int32], b: NDArray[np.int32], reached: NDArray[np.uint8]) -> None: ...
    @staticmethod
    def worst_drops(
        currents: NDArray[np.float64],
        response: NDArray[np.float64],
        begin: NDArray[np.int64],
        basis: NDArray[np.float32],
        places: NDArray[np.float32],
        unit: float,
        out: NDArray[np.float64],
    ) -> None: ...
    @staticmethod
    def tree_stages(rows: int) -> int: ...
    @staticmethod
    def tree_toggles(
        weights: NDArray[np.int32],
        inputs: NDArray[np.int32],
        rows: int,
        banks: int,
        weight_bits: int,
        input_bits: int,
        input_signed: bool,
        msb_first: bool,
        out: NDArray[np.int64],
    ) -> None: ...
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
