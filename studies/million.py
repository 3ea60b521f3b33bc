"""One triangle layer at 1,048,576 tokens on one GPU: time, memory beyond the tensors themselves, error."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import operator
from benchmarks.common import Case, Measured, cold_compiles, device, note
from tmx_compile.bench import layer
from tmx_compile.bench.timing import Rounds
from tmx_compile.mask.geometry import Geometry

# Dense attention at the shorter length gives the floor's rate, and what eight times the tokens cost.
LENGTHS, DENSE_UP_TO = (131072, 1048576), 131072


def measure(quick: bool) -> Measured:
    plan = operator.plan(quick, device().type)
    if quick:
        plan = replace(plan, lengths=(320, 640), dense_up_to=320, lowerings=("blocked",))
    else:
        lowerings = tuple(name for name in ("triton", "flex") if name in layer.NAMED)
        geometries = (Geometry(4, 32, 64), Geometry(8, 512, 128))
        plan = replace(
            plan,
            lengths=LENGTHS,
            dense_up_to=DENSE_UP_TO,
            geometries=geometries,
            lowerings=lowerings,
            rounds=Rounds(10.0, 5, 20),
        )
    with cold_compiles():
        return layer.measure(plan, note=note)


CASE = Case("million", "million.json", measure, layer.COLUMNS, needs_cuda=True)
