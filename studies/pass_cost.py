"""What the pass adds to a compile: find, prove, decide, substitute, lower and verify, against Inductor's own time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from benchmarks.common import Case, Measured, cold_compiles, note
from studies.models import left_padded, small_qwen3
from tmx_compile import TriangleMixConfig
from tmx_compile.graph.copies import copy_graph
from tmx_compile.passes.pipeline import compile
from tmx_compile.request import INDUCTOR, Request

TOKENS, PADDING = 2304, 7
LOWERING = "auto"
# Inductor is not run on the deeper models: what it costs is not in question, and takes minutes.
FULL: dict[str, Any] = {"depths": [4, 36, 80], "inductor_up_to": 36, "repeats": 5}
QUICK: dict[str, Any] = {"depths": [2, 3], "inductor_up_to": 2, "repeats": 2}


def measure(quick: bool) -> Measured:
    plan = QUICK if quick else FULL
    settings = {
        **plan,
        "model": "Qwen3, random weights, hidden size 64, 4 heads, 2 key heads, head dim 16",
        "tokens": TOKENS,
        "padding": PADDING,
        "shapes": "dynamic length, 2-D attention mask, use_cache=True, logits_to_keep=1",
        "config": "the deepest half of the layers, 4/32/64; the other layers become dense without a mask",
        "lowering": LOWERING,
        "inductor": "cold: caches off and an empty cache folder; a throwaway compile comes first",
        "pass": "median over the repeats on copies of one Dynamo graph; first_ms is the first of them",
        "stages": "the stages of passes/pipeline.py, timed by themselves; open includes what each call writes",
    }
    # Imports and the compiler's precompiled header must not count for the first depth.
    _Capture(2, repeats=1, inductor=True).run()
    records = []
    for depth in plan["depths"]:
        note(f"pass_cost: {depth} layers")
        records.append(_Capture(depth, plan["repeats"], inductor=depth <= plan["inductor_up_to"]).run())
    return Measured(settings, records)


class _Capture:
    """A backend that measures on the graph that Dynamo hands it, where every real backend works too."""

    def __init__(self, depth: int, repeats: int, *, inductor: bool) -> None:
        self.depth, self.repeats, self.inductor = depth, repeats, inductor
        self.records: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        torch._dynamo.reset()
        model = small_qwen3(self.depth)
        ids, mask = left_padded(1, TOKENS, PADDING, 128)
        for x in (ids, mask):
            torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad(), cold_compiles():
            compiled = torch.compile(model, backend=self)
            compiled(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        (record,) = self.records
        return record

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        inputs = list(example_inputs)
        config = TriangleMixConfig.deepest(max(1, self.depth // 2), num_layers=self.depth)
        request = Request.of(config, lowering=LOWERING, strict=True)
        runs = []
        for _ in range(self.repeats):
            gc.collect()
            start = time.perf_counter()
            outcome = compile(gm, request, INDUCTOR)
            spent = time.perf_counter() - start
            runs.append({**outcome.plan.seconds, "pass": spent})
        plan = outcome.plan
        found = len(plan.sites)
        stages = {name: 1e3 * statistics.median(run[name] for run in runs) for name in runs[0]}
        dense_s = triangle_s = pass_share = None
        if self.inductor:
            dense_s = _seconds(lambda: compile_fx(copy_graph(gm), inputs))
            triangle_s = _seconds(lambda: compile_fx(outcome.graph, inputs, config_patches=dict(outcome.needs) or None))
            pass_share = statistics.median(run["pass"] for run in runs) / dense_s
        self.records.append(
            {
                "layers": self.depth,
                "nodes": len(gm.graph.nodes),
                "nodes_after": len(outcome.graph.graph.nodes),
                "sites": found,
                "triangle_sites": len(plan.triangle),
                "lowering": " ".join(sorted({site.lowering.name for site in plan.sites if site.lowering is not None})),
                "pass_ms": stages.pop("pass"),
                "first_ms": 1e3 * runs[0]["pass"],
                **{f"{name}_ms": stages[name] for name in sorted(stages)},
                "ms_per_site": 1e3 * statistics.median(run["pass"] for run in runs) / found,
                "find_prove_ms_per_site": (stages["find"] + stages["prove"]) / found,
                "inductor_dense_s": dense_s,
                "inductor_triangle_s": triangle_s,
                "pass_share": pass_share,
            }
        )
        return gm.forward


def _seconds(run: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


COLUMNS = (
    "layers",
    "nodes",
    "sites",
    "pass_ms",
    "first_ms",
    "open_ms",
    "find_ms",
    "prove_ms",
    "substitute_ms",
    "lower_ms",
    "ms_per_site",
    "find_prove_ms_per_site",
    "inductor_dense_s",
    "inductor_triangle_s",
    "pass_share",
)
CASE = Case("pass_cost", "pass_cost.json", measure, COLUMNS)
