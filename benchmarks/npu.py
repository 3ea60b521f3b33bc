"""Attention and time to first token on an Ascend NPU, dense against triangle. For someone who has one.

    python -m benchmarks.npu                       # both parts, into benchmarks/results/npu.json
    python -m benchmarks.npu layer --lengths 8192  # one attention layer alone
    python -m benchmarks.npu --device cpu --quick  # the same steps on a CPU, tiny: shows that they work

``layer`` times one attention layer: CANN's fused operator under its causal mode, the operator of this package called
eagerly, and both in graphs. Every variant is first compared with float32 attention computed on the host. ``ttft`` times
the prefill of a model of Llama-3.1-8B's shape with random weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common import RESULTS, Records, command, note
from benchmarks.npu_platform import Compiled, Cpu, Npu, Platform
from benchmarks.shapes import MODELS, Prefill, build, check_layers, triangle
from tmx_compile import TriangleMixConfig, triangle_attention
from tmx_compile.bench import record, reference
from tmx_compile.bench.record import Measured
from tmx_compile.bench.timing import describe
from tmx_compile.commands import values
from tmx_compile.mask.geometry import Geometry

FILE = "npu.json"
MODEL = "llama"
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""Largest absolute error that passes, for inputs of unit variance."""
_SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Plan:
    """What to measure; lengths in tokens; ``modes`` None: all there are."""

    lengths: tuple[int, ...] = (8192, 32768, 131072)
    geometries: tuple[Geometry, ...] = (Geometry(4, 32, 64), Geometry(8, 512, 128), Geometry(64, 1024, 128))
    dtype: str = "bfloat16"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    min_seq_len: int = 2048
    rounds: int = 11
    warmup: int = 3
    calls: int = 3
    modes: tuple[str, ...] | None = None
    quick: bool = False

    def ways(self, platform: Platform) -> Sequence[str]:
        """How graphs are compiled: as asked for, by default in every way there is."""
        return platform.modes if self.modes is None else self.modes

    def config(self, geometry: Geometry, layers: Sequence[int]) -> TriangleMixConfig:
        """The configuration that makes ``layers`` triangle layers."""
        return triangle(geometry, layers, self.min_seq_len)


QUICK = Plan(
    lengths=(320, 512),
    geometries=(Geometry(4, 32, 64),),
    dtype="float32",
    heads=4,
    kv_heads=2,
    head_dim=16,
    min_seq_len=256,
    rounds=1,
    warmup=1,
    calls=1,
    quick=True,
)


class _Attention(nn.Module):
    """Dense causal attention: as models write it, or by the platform's own operator."""

    def __init__(self, dense: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.dense is not None:
            return self.dense(query, key, value, query.shape[3] ** -0.5)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class Layer(nn.Module):
    """One attention call whose recorded path has a layer number."""

    def __init__(self, dense: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Attention(dense)])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = self.layers[0](query, key, value)
        return out


def layer(platform: Platform, plan: Plan) -> Records:
    """The records of one attention layer, one for each length and variant."""
    modes = plan.ways(platform)
    made: dict[str, Compiled] = {}
    for mode in modes:
        made[_name(None, mode)] = platform.compile(Layer(platform.dense), mode, None)
        for geometry in plan.geometries:
            made[_name(geometry, mode)] = platform.compile(Layer(), mode, plan.config(geometry, [0]))
    found: Records = []
    # A graph that is not compiled for want of a place in Dynamo's cache would be timed uncompiled.
    limits = torch._dynamo.config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31)
    with torch.no_grad(), limits:
        for n in plan.lengths:
            note(f"layer, {n:,} tokens")
            found += _layer_at(platform, plan, n, modes, made)
            platform.settle()
    return found


def _layer_at(platform: Platform, plan: Plan, n: int, modes: Sequence[str], made: dict[str, Compiled]) -> Records:
    generator = torch.Generator().manual_seed(n)
    host = [
        torch.randn(1, heads, n, plan.head_dim, generator=generator).to(getattr(torch, plan.dtype))
        for heads in (plan.heads, plan.kv_heads, plan.kv_heads)
    ]
    query, key, value = (x.to(platform.device) for x in host)
    rows = reference.sampled_rows(n, list(plan.geometries), _SAMPLED_ROWS, torch.device("cpu"))
    scale = plan.head_dim**-0.5
    runs: dict[str, Callable[[], Tensor]] = {}
    records: Records = []
    for geometry in (None, *plan.geometries):
        # On the host, whose float32 is float32.
        expected = reference.attention_rows(*(x.float() for x in host), rows, geometry or Geometry(0, 0, n))
        for mode in ("eager", *modes):
            name = _name(geometry, mode)
            counts = list(geometry.counts) if geometry else []
            item = {"part": "layer", "n": n, "geometry": counts, "mode": mode, **_EMPTY}
            records.append(item)
            try:
                if mode == "eager":
                    run = _eager(platform, query, key, value, scale, geometry)
                else:
                    run = compiled(made[name], query, key, value)
                item["error"] = reference.largest_error(run().cpu(), rows, expected)
                if not item["error"] <= TOLERANCE[plan.dtype]:
                    raise RuntimeError(f"wrong result: error {item['error']:.3g}")
                runs[name] = run
            # A variant that fails says how, and the others are measured all the same.
            except Exception as error:
                item["failed"] = describe(error)
                note(f"{name}, {n:,} tokens: {item['failed']}")
    timings = platform.interleaved(runs, plan.rounds, plan.warmup)
    for item in records:
        name = _name(Geometry(*item["geometry"]) if item["geometry"] else None, item["mode"])
        if name in timings:
            item |= timings[name].fields()
    dense = min((r["ms"] for r in records if not r["geometry"] and r["ms"]), default=None)
    for item in records:
        item["dense_ms"] = dense
        item["speedup"] = dense / item["ms"] if dense and item["ms"] else None
    return records


def _name(geometry: Geometry | None, mode: str) -> str:
    return f"{geometry or 'dense'}, {mode}"


_EMPTY: dict[str, Any] = dict.fromkeys(("ms", "ms_min", "ms_max", "rounds", "error", "failed"))


def _eager(
    platform: Platform, query: Tensor, key: Tensor, value: Tensor, scale: float, geometry: Geometry | None
) -> Callable[[], Tensor]:
    if geometry is None:
        return lambda: platform.dense(query, key, value, scale)
    sink, window, last = geometry.counts
    return lambda: triangle_attention(query, key, value, sink=sink, window=window, last=last, scale=scale)[0]


def compiled(made: Compiled, *operands: Tensor) -> Callable[[], Tensor]:
    compiled, backend = made
    for x in operands:
        # Of three tensors with dynamic lengths nothing says that these are equal.
        torch._dynamo.mark_static(x)
    before = 0 if backend is None else backend.report.graphs
    compiled(*operands)
    if backend is not None:
        sites = list(backend.report.of_graph(before))
        if [site.decision for site in sites] != ["triangle"]:
            raise RuntimeError(f"the layer did not become a triangle layer: {[str(site.reason) for site in sites]}")
    return lambda: compiled(*operands)


def ttft(platform: Platform, plan: Plan) -> Records:
    """The records of whole prefills, one for each length and variant."""
    shape = MODELS[MODEL]
    note(f"building a model of {shape.name}'s shape")
    model = build(shape, platform.device, getattr(torch, plan.dtype), quick=plan.quick)
    layers = model.config.num_hidden_layers
    sparse = list(range(layers - shape.sparse * layers // shape.layers, layers))
    found: Records = []
    for geometry in (None, *plan.geometries):
        config = plan.config(geometry, sparse) if geometry else None
        for mode in ("eager", *plan.ways(platform)):
            base = {
                "part": "ttft",
                "model": shape.name,
                "geometry": list(geometry.counts) if geometry else [],
                "mode": mode,
                "triangle_layers": len(sparse) if geometry else 0,
                "layers": layers,
            }
            torch._dynamo.reset()
            name = _name(geometry, mode)
            own = mode == "eager" or config is None
            # Attention by the operators themselves; in graphs with triangle layers the pass finds SDPA.
            model.config._attn_implementation = register(platform, config, name) if own else "sdpa"
            compiled, backend = (model, None) if mode == "eager" else platform.compile(model, mode, config)
            for tokens in plan.lengths:
                note(f"ttft, {name}, {tokens:,} tokens")
                platform.settle()
                record_ = {**base, "n": tokens, "ms": None, "ms_all": [], "peak_gib": None, "failed": None}
                found.append(record_)
                try:
                    dynamic = mode != "eager" and platform.is_dynamic(mode)
                    # Hugging Face's DynamicCache begins with an empty tensor of one dimension, to which the first keys
                    # are concatenated: the ranks differ, which no document of GE's operator allows.
                    prefill = Prefill(model, compiled, tokens, dynamic=dynamic, cache=False)
                    if not bool(prefill().isfinite().all()):
                        raise RuntimeError("the prefill gave logits that are not finite")
                    check_layers(backend, sparse)
                    record_["peak_gib"] = platform.peak_gib(prefill)
                    record_["ms"], record_["ms_all"] = platform.median(prefill, plan.calls)
                except Exception as error:
                    record_["failed"] = describe(error)
                    note(f"{name}, {tokens:,} tokens: {record_['failed']}")
    for item in found:
        dense = min((r["ms"] for r in found if r["n"] == item["n"] and not r["geometry"] and r["ms"]), default=None)
        item["dense_ms"] = dense
        item["reduction"] = item["ms"] / dense - 1 if dense and item["ms"] else None
    return found


def register(platform: Platform, config: TriangleMixConfig | None, name: str) -> str:
    """Register attention by the platform's operators with Hugging Face; it builds no mask. Prompts alone, no cache."""
    from transformers import AttentionInterface

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        layer_idx: Any = module.layer_idx
        if config is not None and config.is_triangle_layer(layer_idx) and query.shape[2] > config.min_seq_len:
            sink, window, last = config.geometry.counts
            out = triangle_attention(query, key, value, sink=sink, window=window, last=last, scale=scale)[0]
        else:
            out = platform.dense(query, key, value, scale)
        return out.transpose(1, 2).contiguous(), None

    key = f"tmx_npu_{name.replace('/', '-').replace(', ', '-')}"
    AttentionInterface.register(key, attention)
    return key


PARTS: dict[str, Callable[[Platform, Plan], Records]] = {"layer": layer, "ttft": ttft}
COLUMNS = ("part", "n", "geometry", "mode", "ms", "dense_ms", "speedup", "reduction", "error", "peak_gib", "failed")


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.npu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)}; by default both")
    parser.add_argument("--device", choices=("npu", "cpu"), default="npu", help="cpu: with --quick, to try it out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    parser.add_argument("--lengths", help="tokens, such as 8192,32768")
    counts = "sinks/window/last rows, such as 8/512/128; repeatable"
    parser.add_argument("--geometry", action="append", type=values.geometry, help=counts)
    parser.add_argument("--modes", help="ways to compile, of max-autotune,npugraph_ex; none for eager alone")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"))
    parser.add_argument("--out", type=Path, help="folder for the result file (default: benchmarks/results)")
    options = parser.parse_args(given)
    if unknown := [name for name in options.part if name not in PARTS]:
        parser.error(f"unknown part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu goes with --quick: on a CPU this shows that the steps work, and measures nothing")
    try:
        platform: Platform = Cpu() if options.device == "cpu" else Npu()
    except RuntimeError as error:
        parser.error(f"this needs an Ascend NPU: {error}")
    try:
        plan = _plan(options, platform)
    except ValueError as error:
        parser.error(str(error))
    before = record.hardware()
    records = [item for name in options.part or PARTS for item in PARTS[name](platform, plan)]
    content = record.result(
        "npu", command("benchmarks.npu", given), plan.quick, before, Measured(_settings(platform, plan), records)
    )
    for group, more in zip(("hardware", "versions"), platform.describe(), strict=True):
        content[group] |= more
    console = Console() if Console().is_terminal else Console(width=180)
    console.print(", ".join(str(value) for more in platform.describe() for value in more.values()))
    console.print(record.table(content, COLUMNS))
    out = options.out or (None if plan.quick else RESULTS)
    if out is not None:
        record.write(content, out / FILE)
        console.print(f"wrote {out / FILE}")
    if failed := sum(item["failed"] is not None for item in records):
        sys.exit(f"{failed} of {len(records)} measurements failed: see the column failed")


def _plan(options: argparse.Namespace, platform: Platform) -> Plan:
    plan = QUICK if options.quick else Plan()
    changes: dict[str, Any] = {}
    if options.lengths:
        changes["lengths"] = tuple(int(n) for n in options.lengths.split(","))
        if min(changes["lengths"]) <= plan.min_seq_len:
            raise ValueError(f"--lengths must be over {plan.min_seq_len} tokens, got {options.lengths}")
    if options.geometry:
        changes["geometries"] = tuple(options.geometry)
    if options.modes:
        modes = () if options.modes == "none" else tuple(options.modes.split(","))
        if unknown := [mode for mode in modes if mode not in platform.modes]:
            raise ValueError(f"--modes must be among {', '.join(platform.modes)}, got {', '.join(unknown)}")
        changes["modes"] = modes
    if options.dtype:
        changes["dtype"] = options.dtype
    return Plan(**{**vars(plan), **changes})


def _settings(platform: Platform, plan: Plan) -> dict[str, Any]:
    return {
        "device": platform.device.type,
        **{name: value for name, value in vars(plan).items() if name != "quick"},
        "geometries": [list(geometry.counts) for geometry in plan.geometries],
        "batch": 1,
        "dense": "npu_fused_infer_attention_score, sparse_mode 3, BNSD" if platform.device.type == "npu" else "SDPA",
        "eager": "the operators called as they are",
        "layer": "time between two events of the device around a call, L2 cache overwritten before; variants in turn",
        "error": "largest absolute difference from float32 attention on the host, of sampled rows with every border "
        "of the mask",
        "ttft": "the same around model(input_ids, use_cache=False, logits_to_keep=1), random weights, the deepest half "
        "of the layers sparse",
        "reduction": "against the fastest dense variant of the same length",
    }


if __name__ == "__main__":
    main()
