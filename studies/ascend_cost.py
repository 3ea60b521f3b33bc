"""What triangle attention costs on Ascend 910B chips, on paper: a roofline. Arithmetic, not a measurement.

    python -m studies.ascend_cost           # writes benchmarks/results/ascend_cost.json
    python -m tools.pages               # writes the tables of docs/ascend.md from it

A call of the fused operator is walked as CANN's published kernel walks it: blocks of query rows of one head, for each
of them the keys that any of its rows may see, rounded outwards. Four rates bound it, and the slowest of them is its
floor:

    cube     4 x D operations a computed score (two matrix products)
    vector   VECTOR_OPS float32 operations a computed score, and 3 x D a row whenever its partial result is rescaled
    L2       what the cube cores exchange with the vector cores and read again: a score goes out as float32 and comes
             back as a 16-bit weight, a partial result goes out as float32, keys and values are read for every block
    HBM      every operand and result once

Calls run one after another, so their floors add up. Nothing is charged for launches, for waiting of one kind of core
on the other, or for cores that have no work left: a kernel that exists is slower, see CHECK. Nor for copies that make a
model's queries, keys and values contiguous, which dense attention needs as well.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from tmx_compile.bench import record
from tmx_compile.mask.geometry import Geometry

FILE = "ascend_cost.json"

_INI = "CANN runtime, platform_config/Ascend910B2C.ini (gitcode.com/cann/runtime)"
_GUIDE = "CANN cross-platform migration guide and gitcode.com/cann/ops-transformer issue 5487"

ELEMENT = 2  # bytes of float16 and bfloat16
VECTOR_OPS = 7
"""Assumed float32 vector operations a score: scale, mask, maximum, subtract, exponentiate, sum, convert."""
MERGE_OPS = 4
"""Assumed vector operations for each number of a merged result: two products, a sum, a conversion."""


@dataclass(frozen=True)
class Chip:
    """Public figures of a chip.

    Attributes:
        cube_cores: each multiplies 16 x 16 x 16 float16 or bfloat16 numbers a cycle.
        vector_cores: each works on 256 bytes a cycle, 64 float32 numbers.
        mhz: clock of both.
        hbm: bytes a second.
        l2: bytes a cycle between a cube core and the L2 cache.
        source: where the figures come from.
    """

    name: str
    cube_cores: int
    vector_cores: int
    mhz: int
    hbm: float
    l2: int
    source: str

    @property
    def rates(self) -> dict[str, float]:
        """Operations or bytes a second of each of the four."""
        hz = self.mhz * 1e6
        return {
            "cube": self.cube_cores * 2 * 16**3 * hz,
            "vector": self.vector_cores * 64 * hz,
            "l2": self.cube_cores * self.l2 * hz,
            "hbm": self.hbm,
        }


CHIPS = (
    Chip("910B2", 24, 48, 1800, 1.6e12, 110, f"cores, clock, L2 rate: {_INI}; HBM: {_GUIDE}"),
    Chip(
        "910B3",
        20,
        40,
        1800,
        1.6e12,
        110,
        "20 and 40 cores at 1.8 GHz: the chip's platform_config and npu-smi, as public kernel projects report them, "
        "and what the advertised 313 TFLOP/s divide into; HBM and L2 rate as for 910B2",
    ),
)


@dataclass(frozen=True)
class Tiling:
    """How the operator cuts a call.

    Attributes:
        rows: query rows of one block.
        step: keys taken at once.
        trim: what the first and the last step of a block are rounded outwards to, in keys; ``step`` = whole steps.
        shared: query heads that share one read of keys and values.
    """

    name: str
    rows: int
    step: int
    trim: int
    shared: int
    source: str


TILINGS = (
    Tiling(
        "trimmed",
        128,
        1024,
        64,
        1,
        "prompt_flash_attention of CANN's ops-transformer: blocks of 128 x 1024 (PFA design document, "
        "prompt_flash_attention_tiling), first and last step trimmed to 64 keys "
        "(prompt_flash_attention_s1s2_bns1_x910.h)",
    ),
    Tiling(
        "whole steps",
        128,
        1024,
        1024,
        4,
        "the newer tiling of fused_infer_attention_score: 512 rows of a group's heads together, here 4 x 128, and "
        "steps of 1024 keys under a compressed mask; that steps are not trimmed is an assumption, the worst case",
    ),
    Tiling("128 x 128", 128, 128, 64, 1, "an assumption: a kernel tuned for narrow bands"),
)


@dataclass(frozen=True)
class Problem:
    """One attention layer, batch 1."""

    n: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    def bytes(self, rows: int, *, kv: bool = False) -> int:
        """Of ``rows`` queries or results, or of as many keys or values, in 16 bits."""
        return rows * (self.kv_heads if kv else self.heads) * self.dim * ELEMENT


@dataclass(frozen=True)
class Work:
    """What a part asks of each rate: operations and bytes."""

    cube: float = 0.0
    vector: float = 0.0
    l2: float = 0.0
    hbm: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def times(self, chip: Chip) -> dict[str, float]:
        """Milliseconds of each rate."""
        return {name: 1e3 * amount / chip.rates[name] for name, amount in asdict(self).items()}

    def floor(self, chip: Chip) -> float:
        """Milliseconds: the slowest of the four."""
        return max(self.times(chip).values())


def fused(
    problem: Problem, tiling: Tiling, rows: int, keys: int, before: int, after: int, *, lse: bool = False
) -> tuple[Work, int]:
    """One call of the fused operator, and how many scores it computes.

    Row i of ``rows`` may see the keys [i - before, i + after] of ``keys``.
    """
    scores = reads = partial = 0
    for first in range(0, rows, tiling.rows):
        here = min(tiling.rows, rows - first)
        low, high = max(0, first - before), min(keys, first + here + after)
        if high <= low:
            continue
        start = low // tiling.trim * tiling.trim
        # The end of the keys is the end of the last step; the kernel rounds it up to 64.
        end = min(math.ceil(high / tiling.trim) * tiling.trim, math.ceil(keys / 64) * 64)
        steps = math.ceil(high / tiling.step) - low // tiling.step
        scores += here * (end - start)
        reads += end - start
        partial += here * steps
    heads, dim = problem.heads, problem.dim
    used = min(keys, rows + max(0, after))
    hbm = 2 * problem.bytes(rows) + 2 * problem.bytes(used, kv=True) + (4 * rows * heads if lse else 0)
    work = Work(
        cube=4.0 * dim * heads * scores,
        vector=heads * (float(VECTOR_OPS) * scores + 3.0 * dim * partial),
        l2=heads * (6.0 * scores + 4.0 * dim * partial + 2 * ELEMENT * dim * reads / tiling.shared),
        hbm=float(hbm),
    )
    return work, heads * scores


def dense(problem: Problem, tiling: Tiling) -> tuple[dict[str, Work], int]:
    """The fused operator under its causal mode."""
    work, scores = fused(problem, tiling, problem.n, problem.n, problem.n, 0)
    return {"causal": work}, scores


def lowering(problem: Problem, tiling: Tiling, geometry: Geometry) -> tuple[dict[str, Work], int]:
    """What ``tmx_compile/lowering/ascend/attention.py`` makes of a fixed length; dense where it is dense there.

    A band over all rows and all rows against the sinks, merged; the first rows, which are dense, and the last rows in a
    call each; and the result put together from a slice of the merged rows and those two.
    """
    sink, window, last = geometry.counts
    n = problem.n
    if min(window, n) + 1 + sink + last >= n:
        return dense(problem, tiling)
    head = sink + window + 1 if sink else 0
    parts: dict[str, tuple[Work, int]] = {"band": fused(problem, tiling, n, n, window, 0, lse=True)}
    if sink:
        parts["sinks"] = fused(problem, tiling, n, sink, n, sink, lse=True)
        parts["first rows"] = fused(problem, tiling, head, head, head, 0)
    if last:
        parts["last rows"] = fused(problem, tiling, last, n, n, n - last)
    scores = sum(computed for _, computed in parts.values())
    works = {name: work for name, (work, _) in parts.items()}
    if sink:
        numbers = float(n * problem.heads)
        works["merge"] = Work(vector=MERGE_OPS * numbers * problem.dim, hbm=3 * problem.bytes(n) + 8 * numbers)
    if head or last:
        works["slice"] = Work(hbm=2.0 * problem.bytes(n - head - last))
        works["concatenation"] = Work(hbm=2.0 * problem.bytes(n))
    return works, scores


def one_kernel(problem: Problem, tiling: Tiling, geometry: Geometry) -> tuple[dict[str, Work], int]:
    """The same blocks in a single kernel: nothing is merged, sliced or joined in memory, every operand moves once."""
    parts, _ = lowering(problem, tiling, geometry)
    if "band" not in parts:
        return dense(problem, tiling)
    total = sum((parts[name] for name in ("band", "sinks", "last rows") if name in parts), Work())
    once = 2 * problem.bytes(problem.n) + 2 * problem.bytes(problem.n, kv=True)
    kernel = Work(total.cube, total.vector, total.l2, float(once))
    return {"kernel": kernel}, round(total.cube / (4 * problem.dim))


FORMS = {"lowering": lowering, "one kernel": one_kernel}
GEOMETRIES = (Geometry(4, 32, 64), Geometry(8, 512, 128), Geometry(64, 1024, 128))
LENGTHS = (8192, 32768, 131072)

# Published measurements of torch_npu's dense attention on a 910B2 (one head, head dim 128, no mask), in microseconds.
CHECK: dict[str, Any] = {
    "source": "github.com/hw-native-sys/pto-isa, kernels/manual/common/flash_atten/README.md, column torch_npu",
    "chip": "910B2",
    "microseconds": {4096: 118.302, 8192: 353.147, 16384: 1118.462, 32768: 3646.173},
}
# A single-kernel port of TriangleMix to the 910B3, at a prompt of 8K.
PORT: dict[str, Any] = {
    "source": "github.com/vllm-project/vllm-ascend, pull request 13331",
    "chip": "910B3",
    "n": 8192,
    "attention": -0.456,
    "ttft": -0.09,
    "layers": "its example names layers 5, 7, 10 and 15-35 of 36",
    "layer_share": 24 / 36,
}


def _record(chip: Chip, tiling: Tiling, form: str, n: int, geometry: Geometry | None) -> dict[str, Any]:
    problem = Problem(n)
    parts, scores = FORMS[form](problem, tiling, geometry) if geometry else dense(problem, tiling)
    whole = sum(parts.values(), Work())
    base = sum(part.floor(chip) for part in dense(problem, tiling)[0].values())
    floor = sum(part.floor(chip) for part in parts.values())
    return {
        "chip": chip.name,
        "tiling": tiling.name,
        "form": form if geometry else "dense",
        "n": n,
        "geometry": [] if geometry is None else list(geometry.counts),
        "cube_tflop": whole.cube / 1e12,
        "vector_gop": whole.vector / 1e9,
        "l2_gb": whole.l2 / 1e9,
        "hbm_gb": whole.hbm / 1e9,
        "computed_scores": scores,
        "floor_ms": floor,
        "dense_floor_ms": base,
        "reduction": floor / base - 1,
        "parts": {
            name: {"floor_ms": part.floor(chip), **{f"{rate}_ms": ms for rate, ms in part.times(chip).items()}}
            for name, part in parts.items()
        },
    }


def records() -> list[dict[str, Any]]:
    """Every chip, tiling, form, length and geometry; dense once each."""
    found = []
    for chip in CHIPS:
        for tiling in TILINGS:
            for n in LENGTHS:
                found.append(_record(chip, tiling, "dense", n, None))
                for geometry in GEOMETRIES:
                    found += [_record(chip, tiling, form, n, geometry) for form in FORMS]
    return found


def check() -> list[dict[str, Any]]:
    """The floor of what was published as measured: unmasked attention of one head, for every tiling."""
    chip = next(chip for chip in CHIPS if chip.name == CHECK["chip"])
    found = []
    for tiling in TILINGS:
        for n, microseconds in CHECK["microseconds"].items():
            work, _ = fused(Problem(n, 1, 1), tiling, n, n, n, n)
            item = {"tiling": tiling.name, "n": n, "measured_ms": microseconds / 1e3, "floor_ms": work.floor(chip)}
            found.append({**item, "share": item["floor_ms"] / item["measured_ms"]})
    return found


def content() -> dict[str, Any]:
    """What the result file holds."""
    settings = {
        "layer": asdict(Problem(0)) | {"batch": 1, "bytes_a_number": ELEMENT},
        "chips": {chip.name: asdict(chip) | {"rates": chip.rates} for chip in CHIPS},
        "tilings": {tiling.name: asdict(tiling) for tiling in TILINGS},
        "vector_ops_a_score": VECTOR_OPS,
        "merge_ops_a_number": MERGE_OPS,
        "check": CHECK,
        "port": PORT,
    }
    return {
        "case": "ascend_cost",
        "command": "python -m studies.ascend_cost",
        "kind": "arithmetic, not a measurement",
        "settings": record.rounded(settings),
        "check": [record.rounded(item) for item in check()],
        "records": [record.rounded(item) for item in records()],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.ascend_cost", description="Cost on Ascend, on paper.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    record.write(content(), parser.parse_args(arguments).out / FILE)


if __name__ == "__main__":
    main()
