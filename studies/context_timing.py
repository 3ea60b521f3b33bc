"""Times of several processes that work on one prompt: of all of them, and what their collectives take of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_Span = tuple[float, float]


def finish(kind: str) -> None:
    """Wait for a card."""
    if kind == "cuda":
        torch.cuda.synchronize()


def of_all(value: float, kind: str) -> list[float]:
    """A number of every process, on all of them."""
    told = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=kind)
    told[dist.get_rank()] = value
    dist.all_reduce(told)
    return [float(x) for x in told.tolist()]


def timed(call: Callable[[], Any], kind: str) -> list[float]:
    """Milliseconds of every process, from a barrier on."""
    finish(kind)
    dist.barrier()
    begin = time.perf_counter()
    call()
    finish(kind)
    return of_all(1e3 * (time.perf_counter() - begin), kind)


def collectives(call: Callable[[], Any], kind: str) -> dict[str, Any]:
    """One call under the profiler, in milliseconds; lists are by process.

    ``nccl_ms`` of kernels of collectives, ``exposed_ms`` of these while nothing else ran, ``work_ms`` while something
    else did, ``profiled_ms`` from the first kernel to the end of the last. A collective's kernel on the process that
    comes last waits for nobody: ``sent_ms`` adds up the shorter of each two, and is left out where their numbers
    differ.
    """
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        finish(kind)
    spans = [(e.time_range.start, e.time_range.end, e.name) for e in found.events() if e.device_type == DeviceType.CUDA]
    ours = sorted((a, b) for a, b, name in spans if "nccl" in name.lower())
    busy = _joined(sorted((a, b) for a, b, name in spans if "nccl" not in name.lower()))
    told = told_by(ours, busy)
    result: dict[str, Any] = {name: of_all(value, kind) for name, value in told.items()}
    if len(set(of_all(len(ours), kind))) == 1:
        shortest = torch.tensor([b - a for a, b in ours], dtype=torch.float64, device=kind)
        dist.all_reduce(shortest, dist.ReduceOp.MIN)
        result["sent_ms"] = float(shortest.sum()) / 1e3
    return result


def told_by(ours: Sequence[_Span], busy: Sequence[_Span]) -> dict[str, float]:
    """What :func:`collectives` tells of spans in microseconds: of collectives, and of everything else, apart."""
    covered = sum(max(0.0, min(b, d) - max(a, c)) for a, b in ours for c, d in busy)
    total, every = sum(b - a for a, b in ours), [*ours, *busy]
    return {
        "nccl_ms": total / 1e3,
        "exposed_ms": (total - covered) / 1e3,
        "work_ms": sum(b - a for a, b in busy) / 1e3,
        "profiled_ms": (max(b for _, b in every) - min(a for a, _ in every)) / 1e3,
    }


def _joined(spans: Sequence[_Span]) -> list[_Span]:
    joined: list[_Span] = []
    for a, b in spans:
        if joined and a <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(b, joined[-1][1]))
        else:
            joined.append((a, b))
    return joined
