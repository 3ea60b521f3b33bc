"""One attention layer: dense by its best backend against each lowering, and both against the floor, in one run."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmx_compile.backend import TmxBackend, explain, tmx_backend
from tmx_compile.bench import floor, reference
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.floor import Ceilings, Shape, causal_pairs
from tmx_compile.bench.record import Measured
from tmx_compile.bench.timing import Rounds, Timing, describe, extra_bytes, interleaved_on, seconds
from tmx_compile.config import TriangleMixConfig
from tmx_compile.lowering.table import NAMED
from tmx_compile.mask import Geometry, Grid, block_plan, pair_counts, triangle

DTYPES = ("float32", "bfloat16", "float16")
LOWERINGS = {"cpu": ("flex", "blocked", "operator"), "cuda": ("flex", "triton", "blocked")}
MIN_SEQ_LEN = 256
# Edge of the blocks whose pairs a tiled kernel has to compute.
BLOCK = 64
_SAMPLED_ROWS = 512

Peer = Callable[[Tensor, Tensor, Tensor, Geometry], "Callable[[], Tensor] | None"]
"""Another implementation: from query, key, value and a geometry to a call, or None where it cannot take them."""

COLUMNS = (
    "dtype",
    "n",
    "geometry",
    "lowering",
    "ms",
    "floor_ms",
    "over_floor",
    "dense_ms",
    "dense_backend",
    "speedup",
    "extra_bytes",
    "error",
    "compile_s",
    "timed",
)


@dataclass(frozen=True)
class Plan:
    """What to measure. Lengths are tokens, over ``MIN_SEQ_LEN``.

    Attributes:
        device: "cpu" or "cuda".
        lowerings: names of lowerings; by default those that are worth timing on the device.
        dynamic: one compile for all lengths, as a model has it, rather than one for each.
        dense_up_to: dense attention is timed up to this length.
        all_rows_up_to: up to this length every row is compared with the reference, above it a sample.
        rounds: how often to time.
    """

    device: str
    lengths: tuple[int, ...]
    geometries: tuple[Geometry, ...]
    dtypes: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    lowerings: tuple[str, ...] = ()
    dynamic: bool = False
    dense_up_to: int = 1 << 62
    all_rows_up_to: int = 4096
    rounds: Rounds = field(default_factory=lambda: Rounds(8.0, 5, 11))

    def __post_init__(self) -> None:
        if self.device not in LOWERINGS:
            raise ValueError(f"device must be one of {', '.join(LOWERINGS)}, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be usable here, and 'cuda' is not: torch finds no CUDA device")
        for name in ("lengths", "geometries", "dtypes"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for name in ("heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")
        for n in self.lengths:
            if n <= MIN_SEQ_LEN:
                raise ValueError(f"lengths must be over {MIN_SEQ_LEN} tokens, got {n}")
        for geometry in self.geometries:
            if not isinstance(geometry, Geometry) or min(geometry.counts) < 0:
                raise ValueError(f"geometries must be of Geometry, with counts of at least 0, got {geometry!r}")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"dtypes must be among {', '.join(DTYPES)}, got {dtype!r}")
        if not self.lowerings:
            object.__setattr__(self, "lowerings", tuple(name for name in LOWERINGS[self.device] if name in NAMED))
        for lowering in self.lowerings:
            if lowering not in NAMED:
                raise ValueError(f"lowerings must be among {', '.join(NAMED)}, got {lowering!r}")
        # Ascending: what a dynamic compile meets first must not need more memory than what follows.
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))

    def shape(self, n: int, dtype: str) -> Shape:
        """The problem at one length."""
        return Shape(n, 1, self.heads, self.kv_heads, self.head_dim, getattr(torch, dtype).itemsize)


class _Attention(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class Model(nn.Module):
    """One attention call whose recorded path has a layer index."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Attention()])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention of (B, H, N, D) query and (B, Hkv, N, D) key and value, in the shape of the query."""
        # What tracing knows of a model: there are as many keys as rows.
        for x in (key, value):
            torch._check(query.shape[2] == x.shape[2])  # type: ignore[no-untyped-call]
        out: Tensor = self.layers[0](query, key, value)
        return out


@dataclass(frozen=True)
class _Seen:
    """What was measured of one variant at one length."""

    timing: Timing
    first_s: float
    error: float
    extra_bytes: int | None


@dataclass(frozen=True)
class _AtLength:
    """What was measured at one length and dtype; ``triangle`` by geometry and name of lowering or peer."""

    n: int
    dtype: str
    dense: dict[str, _Seen]
    triangle: dict[tuple[Geometry, str], _Seen]

    @property
    def best(self) -> str | None:
        """The fastest dense backend."""
        return min(self.dense, key=lambda name: self.dense[name].timing.median, default=None)


def measure(plan: Plan, peers: Mapping[str, Peer] | None = None, note: Callable[[str], object] = str) -> Measured:
    """Measure everything that a plan asks for.

    Each variant is timed in turn with the others at its length. One that fails is left out, and the settings say why.

    Args:
        plan: what to measure.
        peers: other implementations by name, timed and checked like lowerings.
        note: told where a long measurement stands.
    """
    device = torch.device(plan.device)
    left_out: dict[str, str] = {}
    found: list[_AtLength] = []
    # Compile times are of compiles, and each of many variants is one.
    limits = {"recompile_limit": 2**31, "accumulated_recompile_limit": 2**31}
    uncached = torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]
    with torch.no_grad(), uncached, torch._dynamo.config.patch(limits):
        copied = floor.copy_rate(device)
        for dtype in plan.dtypes:
            torch._dynamo.reset()
            layers = _Layers(plan)
            for n in plan.lengths:
                note(f"{plan.device}, {dtype}, {n:,} tokens")
                found.append(_at(plan, n, dtype, layers, peers or {}, left_out))
    ceilings = _ceilings(plan, copied, found)
    settings = {
        "device": plan.device,
        "lengths": list(plan.lengths),
        "geometries": [list(geometry.counts) for geometry in plan.geometries],
        "dtypes": list(plan.dtypes),
        "batch": 1,
        "heads": plan.heads,
        "kv_heads": plan.kv_heads,
        "head_dim": plan.head_dim,
        "lowerings": list(plan.lowerings),
        "dense_lengths": [n for n in plan.lengths if n <= plan.dense_up_to],
        "peers": sorted(peers or {}),
        "block": BLOCK,
        "budget_s": plan.rounds.budget_s,
        "least_rounds": plan.rounds.least,
        "most_rounds": plan.rounds.most,
        "copy_bytes_per_s": copied,
        "dense_flops_per_s": {dtype: known.flops_per_s for dtype, known in ceilings.items()},
        "floor": "the larger of (bytes of q, k, v and out) / copy_bytes_per_s and attended pairs x 4 x heads x "
        "head_dim / dense_flops_per_s, which is the best dense backend's at the largest length where dense was timed",
        "dense": "F.scaled_dot_product_attention(is_causal=True) called directly, by each backend in turn; keys are "
        "expanded beforehand, untimed, for a backend that takes no grouped queries",
        "shapes": "dynamic: one compile for all lengths, compile_s at the first" if plan.dynamic else "static",
        "timing": _TIMING[plan.device],
        "error": "largest absolute difference from attention with its mask written out in "
        + ("float32 (float64 for float32 inputs)" if plan.device == "cuda" else "float64")
        + f", of every row up to n = {plan.all_rows_up_to}, above that of a sample with every border of the mask",
        "compile_caches": "off",
        "left_out": left_out,
    }
    records = [
        _record(plan, at, geometry, name, ceilings.get(at.dtype))
        for at in found
        for geometry in plan.geometries
        for name in (*plan.lowerings, *sorted(peers or {}))
        if (geometry, name) in at.triangle
    ]
    return Measured(settings, records)


_TIMING = {
    "cpu": "wall time of a call",
    "cuda": "time on the GPU of a CUDA graph of the call, second-level cache flushed before (timed: graph); of a plain "
    "call between events where it cannot be captured (timed: call)",
}


class _Layers:
    """The compiled layers of a plan: one for each geometry and lowering, and with static shapes for each length."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._made: dict[tuple[Geometry, str, int], tuple[Callable[..., Tensor], TmxBackend]] = {}

    def call(
        self, query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, lowering: str
    ) -> tuple[Callable[[], Tensor], TmxBackend]:
        """A call of the layer, compiled when it is first made, and the backend that tells how it was lowered."""
        n = query.shape[2]
        kind = (geometry, lowering, 0 if self._plan.dynamic else n)
        if kind not in self._made:
            backend = tmx_backend(_config(geometry), lowering=lowering)
            compiled = torch.compile(Model(), backend=backend, dynamic=None if self._plan.dynamic else False)
            self._made[kind] = compiled, backend
        compiled, backend = self._made[kind]
        return lambda: compiled(query, key, value), backend


def auto_lowering(plan: Plan, n: int, dtype: str, geometry: Geometry) -> str:
    """The lowering that "auto" takes for a plan's layer at one length; "dense" where it keeps the layer dense."""
    shapes = [(heads, n, plan.head_dim) for heads in (plan.heads, plan.kv_heads, plan.kv_heads)]
    tensors = [torch.empty(1, *shape, device=plan.device, dtype=getattr(torch, dtype)) for shape in shapes]
    with torch.no_grad():
        (site,) = explain(Model(), *tensors, config=_config(geometry))
    return site.lowering if site.decision == "triangle" else "dense"


def _config(geometry: Geometry) -> TriangleMixConfig:
    return TriangleMixConfig(*geometry.counts, triangle_layer_indices=[0], min_seq_len=MIN_SEQ_LEN)


def _at(
    plan: Plan, n: int, dtype: str, layers: _Layers, peers: Mapping[str, Peer], left_out: dict[str, str]
) -> _AtLength:
    """All variants at one length and dtype, timed against each other."""
    gc.collect()
    device = torch.device(plan.device)
    generator = torch.Generator(device).manual_seed(n)
    # In memory as models leave them, (B, N, H, D): a result in another order would be a copy.
    query, key, value = (
        torch.randn(
            1, n, heads, plan.head_dim, generator=generator, device=device, dtype=getattr(torch, dtype)
        ).transpose(1, 2)
        for heads in (plan.heads, plan.kv_heads, plan.kv_heads)
    )
    if plan.dynamic:
        for x in (query, key, value):
            torch._dynamo.maybe_mark_dynamic(x, 2)
    sample = reference.sampled_rows(n, list(plan.geometries), _SAMPLED_ROWS, device)
    rows = torch.arange(n, device=device) if n <= plan.all_rows_up_to else sample
    dense: dict[str, Callable[[], Tensor]] = {}
    if n <= plan.dense_up_to:
        dense, refused = dense_variants(query, key, value)
        left_out |= {f"{name}, {dtype}, n = {n}": reason for name, reason in refused.items()}
    runs: dict[Any, Callable[[], Tensor]] = dict(dense)
    checks: dict[Any, tuple[float, float, int | None]] = {}
    expected = reference.attention_rows(query, key, value, sample, Geometry(0, 0, n)) if dense else None
    for name, run in dense.items():
        assert expected is not None
        _check(name, run, sample, expected, checks)
    del expected
    for geometry in plan.geometries:
        expected = reference.attention_rows(query, key, value, rows, geometry)
        for name in (*plan.lowerings, *sorted(peers)):
            try:
                attempt, backend = peers[name](query, key, value, geometry) if name in peers else None, None
                if name not in peers:
                    attempt, backend = layers.call(query, key, value, geometry, name)
                if attempt is None:
                    continue
                _check((geometry, name), attempt, rows, expected, checks)
                taken = {(site.decision, site.lowering) for site in backend.report} if backend else None
                if taken not in (None, {("triangle", name)}):
                    raise RuntimeError(f"asked for {name}, got {sorted(taken)}")
                runs[geometry, name] = attempt
            # One variant must not cost a run all the others; what failed and why is kept with the results.
            except Exception as error:
                left_out[f"{name}, {geometry}, {dtype}, n = {n}"] = describe(error)
        del expected
    timings = interleaved_on(device, runs, plan.rounds)
    for key_of, timing in timings.items():
        if timing.why:
            of = key_of if isinstance(key_of, str) else f"{key_of[1]}, {key_of[0]}"
            left_out[f"CUDA graph of {of}, {dtype}, n = {n}"] = timing.why
    seen = {name: _Seen(timings[name], *checks[name]) for name in runs}
    return _AtLength(
        n,
        dtype,
        {name: seen[name] for name in dense},
        {name: item for name, item in seen.items() if name not in dense},
    )


def _check(
    name: Any,
    run: Callable[[], Tensor],
    rows: Tensor,
    expected: Tensor,
    checks: dict[Any, tuple[float, float, int | None]],
) -> None:
    """Run a variant for the first time: its seconds, its error, the memory that a call takes."""
    first_s = seconds(run)
    error = reference.largest_error(run(), rows, expected)
    if not math.isfinite(error):
        raise RuntimeError(f"the result is not finite: {error}")
    checks[name] = first_s, error, extra_bytes(run) if expected.device.type == "cuda" else None


def _ceilings(plan: Plan, copied: float, found: list[_AtLength]) -> dict[str, Ceilings]:
    """The ceilings by dtype, from the largest length at which dense attention was timed."""
    ceilings = {}
    for at in sorted(found, key=lambda at: at.n):
        if at.best is not None:
            seconds_taken = at.dense[at.best].timing.median / 1e3
            rate = plan.shape(at.n, at.dtype).flops(causal_pairs(at.n)) / seconds_taken
            ceilings[at.dtype] = Ceilings(copied, rate)
    return ceilings


def _record(plan: Plan, at: _AtLength, geometry: Geometry, name: str, ceilings: Ceilings | None) -> dict[str, Any]:
    seen = at.triangle[geometry, name]
    best = at.dense[at.best] if at.best is not None else None
    attended, causal = pair_counts(geometry, at.n, at.n)
    floor_ms, floor_by = ceilings.floor(plan.shape(at.n, at.dtype), geometry) if ceilings else (None, None)
    return {
        "n": at.n,
        "geometry": list(geometry.counts),
        "dtype": at.dtype,
        "lowering": name,
        **seen.timing.fields(),
        "timed": seen.timing.how,
        "floor_ms": floor_ms,
        "floor_by": floor_by,
        "over_floor": seen.timing.median / floor_ms if floor_ms else None,
        "dense_backend": at.best,
        **(best.timing.fields("dense_") if best else dict.fromkeys(("dense_ms", "dense_ms_min", "dense_ms_max"))),
        "dense_all_ms": {backend: item.timing.median for backend, item in at.dense.items()},
        "dense_extra_bytes": best.extra_bytes if best else None,
        "dense_error": best.error if best else None,
        "speedup": best.timing.median / seen.timing.median if best else None,
        "extra_bytes": seen.extra_bytes,
        "error": seen.error,
        "attended_pairs": attended,
        "block_pairs": block_plan(triangle(*geometry.counts), Grid(at.n, at.n), BLOCK, BLOCK).touched_pairs(),
        "causal_pairs": causal,
        "ideal_speedup": causal / attended,
        "compile_s": max(0.0, seen.first_s - seen.timing.median / 1e3),
    }
