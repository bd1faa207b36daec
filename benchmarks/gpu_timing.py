"""How the GPU benchmarks measure: CUDA graphs, contenders in turn, medians; and the ceilings of this machine.

On a CPU (dry runs) the same functions run what they are given with a plain clock, so that nothing but the graphs
differs from a real run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lynx_trt.plugins.tune import time_calls

# Long enough that the resolution of an event, half a microsecond, is below a thousandth.
_MICROSECONDS_A_ROUND = 2000.0
_MOST_ROUNDS = 25


class AbsentError(Exception):
    """A contender that can't take part; the message says why."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call: the median over rounds and two percentiles."""

    median: float
    p10: float
    p90: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """Rounded, for the record."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at most: a large copy (bytes a second, read and written) and a bf16 matmul (FLOP/s).

    `copies` has the bandwidth of each way to copy, in bytes a second; `bandwidth` is the best of them.
    """

    bandwidth: float
    matmul: float
    copies: Mapping[str, float]

    def floor(self, bytes_read: float, flops: float) -> float:
        """The least microseconds for so many bytes and operations."""
        return 1e6 * max(bytes_read / self.bandwidth, flops / self.matmul)


def ceilings(device: torch.device) -> Ceilings:
    """Measure them: `copies`, and the product of two 8192 x 8192 matrices of random numbers."""
    width = 8192 if device.type == "cuda" else 64
    ways = copies(device)
    # Zeros would be faster than what models hold: 13% in a matmul on an H200.
    left, right = (torch.randn((width, width), dtype=torch.bfloat16, device=device) for _ in range(2))
    product = torch.empty_like(left)
    matmul = _only(lambda: torch.matmul(left, right, out=product), device)
    return Ceilings(max(ways.values()), 2e6 * width**3 / matmul, ways)


def copies(device: torch.device) -> dict[str, float]:
    """The bandwidth of each way to copy 4 GB, bytes a second, read and written.

    In each way that there is, for no one of them is the fastest everywhere: captured in a graph, `copy_` moved 2.8 TB/s
    on an H200 whose kernels read 4.4.
    """
    size = 1 << 32 if device.type == "cuda" else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    words = source.view(torch.int64), target.view(torch.int64)
    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "kernel": lambda: torch.bitwise_not(words[0], out=words[1]),
    }
    called = time_calls if device.type == "cuda" else lambda way: _only(way, device)
    found = {f"{name}, captured": 2e6 * size / _only(way, device) for name, way in ways.items()}
    return found | {f"{name}, called": 2e6 * size / called(way) for name, way in ways.items()}


def _only(function: Callable[[], object], device: torch.device) -> float:
    """The median of one function, which has to run."""
    timing = measure({"it": function}, device)["it"]
    if isinstance(timing, str):
        raise RuntimeError(timing)
    return timing.median


def measure(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, *, calls: int = 1, seconds: float = 0.5
) -> dict[str, Timing | str]:
    """Time functions of `calls` calls each, in turn, round after round, for about `seconds` in all.

    Each is warmed up and captured first; one that can't be run or captured has the reason in place of a time.
    """
    runs: dict[str, Callable[[int], float]] = {}
    result: dict[str, Timing | str] = {}
    for name, function in contenders.items():
        try:
            runs[name] = _captured(function) if device.type == "cuda" else _plain(function)
        except Exception as error:  # whatever a peer raises is its result
            result[name] = reason(error)
            if sticky(error):
                raise
    repeats = dict.fromkeys(runs, 1)
    if device.type == "cuda":
        repeats = {name: max(1, round(_MICROSECONDS_A_ROUND / max(run(1), 0.1))) for name, run in runs.items()}
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + seconds
    while runs and len(next(iter(rounds.values()))) < _MOST_ROUNDS:
        for name, run in runs.items():
            rounds[name].append(run(repeats[name]) / repeats[name] / calls)
        # A median of fewer than 5 rounds says little; of slow things there are no more.
        if device.type != "cuda" or (time.monotonic() > end and len(rounds[name]) >= 5):
            break
    return result | {name: summary(values) for name, values in rounds.items()}


def summary(values: list[float]) -> Timing:
    """Median and percentiles."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


def reason(error: BaseException) -> str:
    """One line of why something does not run."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def sticky(error: BaseException) -> bool:
    """Whether CUDA is broken for the rest of the process."""
    words = ("illegal memory access", "misaligned address", "unspecified launch failure", "illegal instruction")
    text = str(error).lower().replace("_", " ")
    return any(word in text for word in (*words, "device-side assert", "illegal address", "launch failed"))


def _captured(function: Callable[[], object]) -> Callable[[int], float]:
    """The function in a CUDA graph; call it with a number of replays for their microseconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(replays: int) -> float:
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000

    run(1)
    return run


def _plain(function: Callable[[], object]) -> Callable[[int], float]:
    """The same without a GPU: one call in all, since the interpreter is slow and its times say nothing."""
    start = time.perf_counter()
    function()
    took = (time.perf_counter() - start) * 1e6
    return lambda replays: took * replays
