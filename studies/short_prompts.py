"""Where the triangle pays: short prompts, few and many heads, plain calls and CUDA graphs, inference and training.

One attention layer by the operator that ``auto`` writes, against dense attention by its best SDPA backend. A plain call
is timed as a model makes it: one after another, so that the host's share counts wherever the GPU waits for it.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Case, Parts, Records, device, note
from tmx_compile.bench.timing import describe, timing_events
from tmx_compile.lowering.triton.op import TRAINING_OPERATOR, TRITON_OPERATOR

GEOMETRIES = ((4, 32, 64), (8, 512, 128), (64, 1024, 128))
FULL: dict[str, Any] = {
    "lengths": (2112, 3072, 4096, 6144, 8192, 16384),
    "batches": (1, 4),
    "heads": ((32, 8), (8, 8), (16, 2), (9, 3)),
    "head_dims": (64, 128),
    "geometries": GEOMETRIES,
    "dtype": "bfloat16",
    "rounds": 3,
    "round_s": 0.006,
}
TRAINING: dict[str, Any] = {
    **FULL,
    "lengths": (2112, 4096, 8192, 16384),
    "batches": (1,),
    "heads": ((32, 8), (9, 3)),
}
QUICK: dict[str, Any] = {
    **FULL,
    "lengths": (2112,),
    "batches": (1,),
    "heads": ((9, 3),),
    "head_dims": (64,),
    "rounds": 1,
}
_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# A few calls would time what the first of them waits for.
_LEAST_CALLS, _MOST_CALLS = 10, 100
COLUMNS = (
    *("pass", "n", "batch", "heads", "kv_heads", "head_dim", "geometry"),
    *("ms", "dense_ms", "dense_backend", "speedup", "graph_ms", "dense_graph_ms", "graph_speedup"),
)
TOLD = {
    "ms": "wall time of a plain call, called one after another; forward, or forward and backward",
    "dense_ms": "the same of F.scaled_dot_product_attention(is_causal=True), its backend chosen beforehand",
    "graph_ms": "time on the GPU of a call in a CUDA graph of several",
    "host_us": "what a plain call takes the host: of a problem that the GPU gets through sooner",
}

Runs = dict[str, Callable[[], Any]]


def names(quick: bool) -> list[str]:
    """The host's share, then for each pass the heads and the head dim."""
    found = ["host"]
    for name in ("forward", "both"):
        plan = _plan(name, quick)
        found += [f"{name}/{h}-{kv}-{dim}" for (h, kv), dim in itertools.product(plan["heads"], plan["head_dims"])]
    return found


def settings(quick: bool) -> dict[str, Any]:
    """The same for every part."""
    return {**_plan("forward", quick), "training": _plan("both", quick), "device": "cuda", "fields": TOLD}


def measure(part: str, quick: bool) -> Records:
    """One part of :func:`names`."""
    if part == "host":
        return [{"pass": part, **_host()}]
    name, shape = part.split("/")
    heads, kv_heads, dim = map(int, shape.split("-"))
    plan = _plan(name, quick)
    records: Records = []
    for batch, n in itertools.product(plan["batches"], plan["lengths"]):
        try:
            records += _at(name, n, batch, (heads, kv_heads), dim, plan)
        # A shape that fits no memory: the others still count.
        except RuntimeError as error:
            note(f"left out: {part}, {batch} x {n}: {describe(error)}")
    return records


def _plan(name: str, quick: bool) -> dict[str, Any]:
    if quick:
        return QUICK
    return TRAINING if name == "both" else FULL


def _operands(n: int, batch: int, heads: tuple[int, int], dim: int, dtype: str, grad: bool) -> list[Tensor]:
    counts = heads[0], heads[1], heads[1]
    made = (torch.randn(batch, n, x, dim, device=device(), dtype=getattr(torch, dtype)) for x in counts)
    return [x.transpose(1, 2).requires_grad_(grad) for x in made]


def _at(name: str, n: int, batch: int, heads: tuple[int, int], dim: int, plan: dict[str, Any]) -> Records:
    """The records of one shape, one for each geometry."""
    training = name == "both"
    qkv = _operands(n, batch, heads, dim, plan["dtype"], training)
    grad_out = torch.randn_like(qkv[0]) if training else None

    def whole(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return forward if grad_out is None else lambda: torch.autograd.grad(forward(), qkv, grad_out)

    dense = whole(lambda: F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True))
    runs: Runs = {}
    with torch.set_grad_enabled(training):
        for backend, kind in _BACKENDS.items():
            run = _under(kind, dense)
            try:
                run()
            # A backend without a kernel for this shape: the other is the baseline.
            except RuntimeError as error:
                note(f"no dense {backend}, {name}, {heads}, {dim}: {describe(error)}")
                continue
            runs[backend] = run
        first = {backend: _calls(run, 0.001) for backend, run in runs.items()}
        runs = {backend: run for backend, run in runs.items() if first[backend] < 1.5 * min(first.values())}
        for geometry in plan["geometries"]:
            runs[str(geometry)] = whole(functools.partial(_sparse, qkv, geometry, training))
            # Once through Triton, once as it is repeated.
            for _ in range(2):
                runs[str(geometry)]()
        calls = _in_turn({key: functools.partial(_calls, run, plan["round_s"]) for key, run in runs.items()}, plan)
        graphs = _in_turn({key: graph for key, run in runs.items() if (graph := _graph(run, key))}, plan)
    records = []
    for geometry in plan["geometries"]:
        record = {
            "pass": name,
            "n": n,
            "batch": batch,
            "heads": heads[0],
            "kv_heads": heads[1],
            "head_dim": dim,
            "geometry": list(geometry),
        }
        for prefix, times in (("", calls), ("graph_", graphs)):
            own = times.get(str(geometry))
            best = min((x for x in _BACKENDS if x in times), key=lambda x: times[x], default=None)
            suffix = "graph_ms" if prefix else "ms"
            record |= {suffix: own, f"dense_{suffix}": times.get(best or ""), f"dense_{prefix}backend": best}
            if own and best:
                record[f"{prefix}speedup"] = times[best] / own
        records.append(record)
    return records


def _sparse(qkv: list[Tensor], geometry: tuple[int, int, int], training: bool) -> Tensor:
    operator = TRAINING_OPERATOR if training else TRITON_OPERATOR
    made = operator(*qkv, None, None, *geometry, qkv[0].shape[3] ** -0.5)
    return made[0] if training else made  # type: ignore[no-any-return]


def _under(kind: SDPBackend, run: Callable[[], Any]) -> Callable[[], Any]:
    """The same under one backend; :func:`_calls` enters it once for many calls."""

    def call() -> Any:
        with sdpa_kernel(kind):
            return run()

    call.inner, call.kind = run, kind  # type: ignore[attr-defined]
    return call


def _calls(run: Callable[[], Any], round_s: float) -> float:
    """Milliseconds of one of many plain calls, one after another, until the GPU is through."""
    inner = getattr(run, "inner", None)
    if inner is not None:
        with sdpa_kernel(run.kind):  # type: ignore[attr-defined]
            return _calls(inner, round_s)
    count = _LEAST_CALLS
    while True:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
        if taken > round_s / 2 or count >= _MOST_CALLS:
            return 1e3 * taken / count
        count = min(_MOST_CALLS, max(2 * count, int(count * round_s / taken)))


def _graph(run: Callable[[], Any], name: str) -> Callable[[], float] | None:
    """Replays a CUDA graph of several calls; milliseconds of one."""
    calls = 8 if _calls(run, 0.001) < 2 else 2
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            for _ in range(calls):
                run()
    # What stops a capture: the plain call is measured all the same.
    except Exception as error:
        torch.cuda.synchronize()
        note(f"no graph of {name}: {describe(error)}")
        return None
    start, stop = timing_events()

    def replay() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / calls

    replay()
    return replay


def _in_turn(runs: dict[str, Callable[[], float]], plan: dict[str, Any]) -> dict[str, float]:
    """The median of what each run says, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(plan["rounds"]):
        for name, run in runs.items():
            samples[name].append(run())
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _host() -> dict[str, Any]:
    """Microseconds of the host in a plain call, where the GPU is through before the next one comes."""
    qkv = _operands(1024, 1, (2, 1), 64, "bfloat16", False)
    times = {}
    with torch.no_grad():
        runs = _stages(qkv)
        times |= _host_times(runs)
    leaves = [x.detach().requires_grad_() for x in qkv]
    grad = torch.randn_like(qkv[0])

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)

    both: Runs = {
        "training": lambda: torch.autograd.grad(_sparse(leaves, (4, 32, 64), True), leaves, grad),
        **{
            f"dense training {name}": _under(kind, lambda: torch.autograd.grad(dense(), leaves, grad))
            for name, kind in _BACKENDS.items()
        },
    }
    return {"host_us": times | _host_times(both)}


def _host_times(runs: Runs) -> dict[str, float]:
    for name, run in list(runs.items()):
        try:
            run()
        except RuntimeError as error:
            note(f"left out: host, {name}: {describe(error)}")
            del runs[name]
    times = _in_turn({name: functools.partial(_calls, run, 0.02) for name, run in runs.items()}, {"rounds": 5})
    return {name: round(1e3 * value, 1) for name, value in times.items()}


def _stages(qkv: list[Tensor]) -> Runs:
    """The operator, what it calls in turn, and dense attention."""
    from tmx_compile.lowering.triton import hopper_launch, launch
    from tmx_compile.lowering.triton.prepared import allocator
    from tmx_compile.lowering.triton.prepared import kind as kind_of
    from tmx_compile.lowering.triton.splits import split_memory
    from tmx_compile.mask.geometry import Geometry

    geometry, scale, gpu = Geometry(4, 32, 64), 0.125, qkv[0].device
    allocate = allocator(gpu)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)

    kinds = tuple(map(kind_of, qkv))
    general = launch.prepare(*kinds, None, geometry, scale)
    runs: Runs = {
        "operator": functools.partial(_sparse, qkv, geometry.counts, False),
        "launch": lambda: launch.forward(*qkv, None, None, *geometry.counts, scale),
        "prepared launch": lambda: general(*qkv),
        "memory of splits": lambda: split_memory(allocate, gpu.index, 1 << 18),
        "without last rows": functools.partial(_sparse, qkv, (4, 32, 0), False),
        "training operator": functools.partial(_sparse, qkv, geometry.counts, True),
        **{f"dense {name}": _under(kind, dense) for name, kind in _BACKENDS.items()},
        "empty": lambda: torch.empty(16, device="cuda"),
    }
    if hopper_launch.takes(*kinds):
        prepared = hopper_launch.forward(*kinds, None, geometry, scale, None)
        runs["hopper launch"] = lambda: prepared(*qkv)
    return runs


PARTS = Parts(names, settings, measure, lambda records: None)
CASE = Case("short_prompts", "short_prompts.json", None, COLUMNS, PARTS, needs_cuda=True, quick_anywhere=False)
