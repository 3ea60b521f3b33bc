"""What the pass adds to a compile: find, prove, decide, substitute, lower and verify, against Inductor's own time."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from benchmarks.common import Case, Measured, cold_compiles, note
from benchmarks.models import left_padded, small_qwen3
from tmx_compile import TriangleMixConfig
from tmx_compile.graph.copies import copy_graph
from tmx_compile.passes import pipeline
from tmx_compile.passes.lower import Lowerer
from tmx_compile.passes.pipeline import Options, plan_graph, rewrite_graph
from tmx_compile.passes.substitute import Substituter
from tmx_compile.proof.prove import Prover

TOKENS, PADDING = 2304, 7
LOWERING = "auto"
# Inductor is not run on the deeper models: what it costs is not in question, and takes minutes.
FULL: dict[str, Any] = {"depths": [4, 36, 80], "inductor_up_to": 36, "repeats": 5}
QUICK: dict[str, Any] = {"depths": [2, 3], "inductor_up_to": 2, "repeats": 2}

# The functions whose time is told apart. None of them calls another of them.
_STAGES: Sequence[tuple[str, Any, str]] = (
    ("find", pipeline, "find_attention"),
    ("prove", Prover, "prove"),
    ("substitute", Substituter, "substitute"),
    ("clean", Substituter, "clean"),
    ("lower", Lowerer, "lower"),
)


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
        "decide": "the rest of plan_graph: building the prover, layers, lengths, verdicts",
        "verify": "the rest of rewrite_graph: choice of lowering, checks, lint, recompile of the graph's code",
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
        options = Options(config, LOWERING, strict=True)
        runs = []
        for _ in range(self.repeats):
            copy = copy_graph(gm)
            gc.collect()
            with _stages() as spent:
                start = time.perf_counter()
                plan = plan_graph(copy, options)
                planned = time.perf_counter()
                rewritten = rewrite_graph(plan)
                done = time.perf_counter()
            spent["decide"] = planned - start - spent["find"] - spent["prove"]
            spent["verify"] = done - planned - sum(spent[name] for name in ("substitute", "clean", "lower"))
            spent["pass"] = done - start
            runs.append(spent)
        found = len(rewritten.plan.sites)
        stages = {name: 1e3 * statistics.median(run[name] for run in runs) for name in runs[0]}
        dense_s = triangle_s = pass_share = None
        if self.inductor:
            dense_s = _seconds(lambda: compile_fx(copy_graph(gm), inputs))
            triangle_s = _seconds(
                lambda: compile_fx(rewritten.gm, inputs, config_patches=dict(rewritten.inductor_options) or None)
            )
            pass_share = statistics.median(run["pass"] for run in runs) / dense_s
        self.records.append(
            {
                "layers": self.depth,
                "nodes": len(gm.graph.nodes),
                "nodes_after": len(rewritten.gm.graph.nodes),
                "sites": found,
                "triangle_sites": len(rewritten.plan.triangle),
                "lowering": " ".join(sorted({site.lowering for site in rewritten.plan.sites})),
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


@contextlib.contextmanager
def _stages() -> Iterator[defaultdict[str, float]]:
    """Seconds spent in each of ``_STAGES`` inside the block."""
    spent: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            # A generator does its work when it is read.
            result = list(result) if isinstance(result, Iterator) else result
            spent[name] += time.perf_counter() - start
            return result

        return run

    with contextlib.ExitStack() as stack:
        for name, owner, attribute in _STAGES:
            spent[name] = 0.0
            function = getattr(owner, attribute)
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, function)))
        yield spent


COLUMNS = (
    "layers",
    "nodes",
    "sites",
    "pass_ms",
    "first_ms",
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
