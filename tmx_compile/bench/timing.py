"""Interleaved timing: wall time on a CPU, the GPU's own time on CUDA."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

# More than the second-level cache of any GPU: what one variant leaves there must not feed the next.
FLUSH_BYTES = 256 * 2**20


K = TypeVar("K")


@dataclass(frozen=True)
class Timing:
    """Time of one variant over all rounds, in milliseconds.

    ``how`` is "wall" (a call on a CPU), "graph" (the replay of a CUDA graph, between events of the GPU) or "call" (a
    plain call between events, where the call could not be captured, for the reason ``why``).
    """

    median: float
    min: float
    max: float
    rounds: int
    how: str = "wall"
    why: str = ""

    @classmethod
    def of(cls, seconds: Sequence[float], how: str = "wall", why: str = "") -> Timing:
        """From the seconds of each round."""
        middle, least, most = (1e3 * f(seconds) for f in (statistics.median, min, max))
        return cls(middle, least, most, len(seconds), how, why)

    def fields(self, prefix: str = "") -> dict[str, float]:
        """As record fields: ``ms``, ``ms_min``, ``ms_max``, ``rounds``."""
        values = {"ms": self.median, "ms_min": self.min, "ms_max": self.max, "rounds": self.rounds}
        return {prefix + name: value for name, value in values.items()}


@dataclass(frozen=True)
class Rounds:
    """How often to time: until ``budget_s`` is spent, at least ``least`` and at most ``most`` rounds."""

    budget_s: float
    least: int
    most: int


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call; on CUDA until the GPU has finished."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    variants: Mapping[K, Callable[[], Any]], *, budget_s: float, least: int, most: int, warmup: int = 1
) -> dict[K, Timing]:
    """Wall times of the variants in turn, A B C A B C, so that a disturbance or a change of clock rate meets them all.

    Rounds go on until ``budget_s`` is spent, at least ``least`` and at most ``most`` of them, after ``warmup`` untimed
    ones.
    """
    for _ in range(warmup):
        for run in variants.values():
            run()
    samples = _in_turn(variants, Rounds(budget_s, least, most), seconds)
    return {name: Timing.of(taken) for name, taken in samples.items()}


def interleaved_on(device: torch.device, variants: Mapping[K, Callable[[], Any]], rounds: Rounds) -> dict[K, Timing]:
    """Times of the variants in turn: wall time on a CPU; on CUDA the GPU's time of captured calls, its cache cold.

    A captured call reads and writes the same memory in every replay, so the tensors that the variants close over must
    stay as they are.
    """
    if device.type != "cuda":
        return interleaved(variants, budget_s=rounds.budget_s, least=rounds.least, most=rounds.most)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    start, stop = timing_events()
    captured = _capture_all(variants)

    def gpu_seconds(run: Callable[[], Any]) -> float:
        # The GPU is busy with this for longer than the host takes to launch a replay: no gap is timed.
        flush.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    for run, _, _ in captured.values():
        gpu_seconds(run)
    samples = _in_turn({name: run for name, (run, _, _) in captured.items()}, rounds, gpu_seconds)
    return {name: Timing.of(samples[name], how, why) for name, (_, how, why) in captured.items()}


def _in_turn(
    variants: Mapping[K, Callable[[], Any]], rounds: Rounds, measure: Callable[[Callable[[], Any]], float]
) -> dict[K, list[float]]:
    samples: dict[K, list[float]] = {name: [] for name in variants}
    gc.collect()
    start = time.perf_counter()
    for done in range(rounds.most):
        if done >= rounds.least and time.perf_counter() - start > rounds.budget_s:
            break
        for name, run in variants.items():
            samples[name].append(measure(run))
    return samples


def _capture_all(variants: Mapping[K, Callable[[], Any]]) -> dict[K, tuple[Callable[[], Any], str, str]]:
    """Each variant as (what to run, "graph" or "call", why not a graph).

    The graphs share one memory pool: no result of a replay is looked at, and replays follow one another.
    """
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    pool = torch.cuda.graph_pool_handle()
    return {name: _capture(run, side, pool) for name, run in variants.items()}


def _capture(run: Callable[[], Any], side: Any, pool: Any) -> tuple[Callable[[], Any], str, str]:
    current = torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    current.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            run()
        graph.replay()
        torch.cuda.synchronize()
    # Whatever stops a capture (a copy to the host, an allocation outside of the pool): the call can still be timed.
    except Exception as error:
        # A capture that fails at its end leaves its stream as the current one.
        torch.cuda.set_stream(current)
        torch.cuda.synchronize()
        return run, "call", describe(error)
    return graph.replay, "graph", ""


def timing_events() -> tuple[Any, Any]:
    """Two events of the current CUDA device, between which time can be told."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return start, stop


def describe(error: BaseException) -> str:
    """An error as one line: its kind and the first line of its message; that of its cause where a compiler wraps it."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, BaseException):
        return describe(inner)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


def extra_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Peak CUDA memory of one call beyond what was allocated before it and beyond the numbers of its result."""
    own = run().nbytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - own)
