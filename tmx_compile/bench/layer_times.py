"""How long one attention layer takes, dense and as ``auto`` would make it sparse: what a sparse layer saves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tmx_compile.bench.layer import Plan, auto_lowering, measure
from tmx_compile.bench.record import hardware
from tmx_compile.bench.timing import Rounds
from tmx_compile.mask.geometry import Geometry

MOST_ROUNDS = 11


@dataclass(frozen=True)
class AttentionShape:
    """The heads of one attention call.

    Attributes:
        heads: query heads.
        kv_heads: key heads.
        head_dim: of queries and keys.
        value_dim: head dim of values.
        reach: how far back a layer with a sliding window of its own looks (tokens); None: all the way.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    reach: int | None = None

    @property
    def can_be_timed(self) -> bool:
        """Whether ``tmx bench`` knows such a layer: full attention, one head dim for keys and values."""
        return self.reach is None and self.value_dim == self.head_dim

    def __str__(self) -> str:
        return f"{self.heads} query and {self.kv_heads} key heads of {self.head_dim}"


@dataclass(frozen=True)
class LayerTime:
    """Times of one attention layer, for one sequence.

    Attributes:
        shape: its heads.
        geometry: sinks, window, last rows.
        tokens: length of the prompt.
        dtype: "float32", "bfloat16" or "float16".
        dense_ms: dense attention by its fastest backend, milliseconds.
        triangle_ms: triangle attention by ``lowering``, milliseconds; as ``dense_ms`` where ``auto`` stays dense.
        lowering: the lowering that was timed, or "dense".
        machine: the processor or GPU.
    """

    shape: AttentionShape
    geometry: Geometry
    tokens: int
    dtype: str
    dense_ms: float
    triangle_ms: float
    lowering: str
    machine: str

    def __post_init__(self) -> None:
        for name in ("dense_ms", "triangle_ms"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number of milliseconds, got {value!r}")

    @property
    def saved_ms(self) -> float:
        """What a sparse layer saves, milliseconds; negative where it is slower."""
        return self.dense_ms - self.triangle_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "geometry": list(self.geometry.counts)}


def measure_times(
    shape: AttentionShape,
    geometries: Sequence[Geometry],
    *,
    tokens: int,
    dtype: str,
    device: str,
    seconds: float = 5.0,
    note: Callable[[str], object] = str,
) -> tuple[LayerTime, ...]:
    """Time one layer on this machine, dense and by the lowering that ``auto`` takes for each geometry.

    Dense attention is timed by every backend that SDPA has, in turn with the sparse layers, and the fastest counts.
    Where ``auto`` would keep the layer dense, nothing is saved.

    Args:
        shape: the layer's heads.
        geometries: sinks, window and last rows.
        tokens: length of the prompt, over 256.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        seconds: to spend on the timed rounds of each geometry; two rounds at least.
        note: told where the measurement stands.

    Raises:
        ValueError: a shape, length, dtype or device that cannot be timed here.
        RuntimeError: dense attention or a lowering failed.
    """
    plan = time_plan(shape, geometries, tokens=tokens, dtype=dtype, device=device, seconds=seconds)
    taken = {geometry: auto_lowering(plan, tokens, dtype, geometry) for geometry in plan.geometries}
    lowerings = tuple(sorted(set(taken.values()) - {"dense"}))
    # Where all stay dense, dense attention still has to be timed, and comes with the records of any lowering.
    plan = replace(plan, lowerings=lowerings or ("operator",))
    before = hardware()
    measured = measure(plan, note=note)
    found = []
    for geometry, lowering in taken.items():
        records = [r for r in measured.records if r["geometry"] == list(geometry.counts)]
        if lowering != "dense":
            records = [r for r in records if r["lowering"] == lowering]
        if not records or records[0]["dense_ms"] is None:
            raise RuntimeError(f"{lowering} cannot be timed at {geometry}: {measured.settings['left_out']}")
        dense_ms = float(records[0]["dense_ms"])
        triangle_ms = dense_ms if lowering == "dense" else float(records[0]["ms"])
        machine = before.get("gpu", before["cpu"]) if device == "cuda" else before["cpu"]
        found.append(LayerTime(shape, geometry, tokens, dtype, dense_ms, triangle_ms, lowering, machine))
    return tuple(found)


def time_plan(
    shape: AttentionShape, geometries: Sequence[Geometry], *, tokens: int, dtype: str, device: str, seconds: float
) -> Plan:
    """What :func:`measure_times` measures; ``ValueError`` for what cannot be timed here."""
    if not shape.can_be_timed:
        raise ValueError(f"shape must have full attention and one head dim to be timed, got {shape!r}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be a finite number of at least 0, got {seconds!r}")
    wanted = tuple(dict.fromkeys(geometries))
    rounds = Rounds(seconds * len(wanted), 2, MOST_ROUNDS)
    heads = shape.heads, shape.kv_heads, shape.head_dim
    return Plan(device, (tokens,), wanted, (dtype,), *heads, all_rows_up_to=0, rounds=rounds)


def read_times(path: str | os.PathLike[str]) -> tuple[LayerTime, ...]:
    """The times in a file that ``tmx bench --out`` wrote: of each geometry and length the fastest lowering.

    Records without a dense time are left out.

    Raises:
        ValueError: not such a file.
        OSError: it cannot be read.
    """
    text = Path(path).read_bytes()
    try:
        content = json.loads(text)
        settings, machine = content["settings"], content["hardware"]
        dims = (settings["heads"], settings["kv_heads"], settings["head_dim"], settings["head_dim"])
        name = machine["gpu"] if settings["device"] == "cuda" else machine["cpu"]
        best: dict[tuple[Any, ...], LayerTime] = {}
        for r in content["records"]:
            if r["dense_ms"] is None:
                continue
            sink, window, last = r["geometry"]
            numbers = (r["n"], r["dtype"], r["dense_ms"], r["ms"])
            found = LayerTime(AttentionShape(*dims), Geometry(sink, window, last), *numbers, r["lowering"], name)
            key = found.geometry, found.tokens, found.dtype
            if key not in best or found.triangle_ms < best[key].triangle_ms:
                best[key] = found
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"times must be a file of `tmx bench --out`, {os.fspath(path)} is none ({why})") from error
    return tuple(best.values())
