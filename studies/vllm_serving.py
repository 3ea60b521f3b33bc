"""vLLM serves a Llama of the 8B shape, dense and with TriangleMix: answers, time to first token, decoding, waiting.

    python -m studies.vllm_serving OUT/vllm.json [--phases ttft,decode] [--eager] [--quick]

Needs vLLM, which is in neither of the project's environments for GPUs; so it is no case of ``studies.run``. One engine
serves both: for dense, the builders' plans are switched off, and what is left is vLLM's own backend. With ``--off`` the
plugin is not switched on at all. Records of earlier calls stay in the file; each is printed and stored as it comes.
VLLM_USE_V2_MODEL_RUNNER=0 picks the first model runner.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from studies.vllm_model import Shape, calm, gap, log_probabilities
from tmx_compile.bench import record
from tmx_compile.integrations.vllm.counts import Counts

GEOMETRY = (8, 512, 128)
CHUNK = 8192
PHASES = ("oracle", "ttft:32768", "ttft:65536", "waiting", "ttft:8192", "decode", "kernels", "ttft:131072", "mixed")
_NAMES = ("num_sink_tokens", "sliding_window_size", "num_last_tokens")


class Bench:
    """One engine in this process, and what is measured with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM

        self.quick = options.quick
        self.shape = Shape(4, 256, 384, 8, 2, 32, 512, 4096) if self.quick else Shape()
        self.geometry = (4, 32, 24) if self.quick else GEOMETRY
        self.layers = self.shape.layers
        self.triangle = list(range(self.layers // 2, self.layers))
        self.most = 2048 if self.quick else 131072
        self.chunk = 256 if self.quick else CHUNK
        folder = Path(tempfile.mkdtemp()) / "model"
        self.shape.write(folder)
        settings = dict(zip(_NAMES, self.geometry, strict=True)) | {"triangle_layer_indices": self.triangle}
        if self.quick:
            settings |= {"min_seq_len": 128, "lowering": "blocked"}
        self.off = options.off
        arguments: dict[str, Any] = {} if self.off else {"additional_config": {"trianglemix": settings}}
        if options.eager or self.quick:
            arguments["enforce_eager"] = True
        else:
            arguments["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
        self.mode = "eager" if "enforce_eager" in arguments else "compiled"
        self.llm = LLM(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32" if self.quick else "bfloat16",
            max_model_len=self.most + 64,
            max_num_batched_tokens=self.most,
            max_num_seqs=32,
            gpu_memory_utilization=0.7,
            enable_prefix_caching=False,
            generation_config="vllm",
            **arguments,
        )
        core: Any = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.weights = dict(self.runner.get_model().named_parameters())
        # On a CPU vLLM keeps them in forms of its own.
        self.plain = all(weight.numel() for weight in self.weights.values())
        if self.plain:
            calm(self.weights)
        self.builders = [
            builder for groups in self.runner.attn_groups for group in groups for builder in group.metadata_builders
        ]
        self.on = [getattr(builder, "active", None) for builder in self.builders]
        self.name = ("V2" if ".gpu." in type(self.runner).__module__ else "V1") + f" {self.mode}"
        self._generator = torch.Generator().manual_seed(0)
        self._known: dict[Any, torch.Tensor] = {}

    @property
    def counts(self) -> Counts | None:
        """The plugin's counters."""
        return self.on[0].counts if self.on and self.on[0] is not None else None

    def switch(self, triangle: bool) -> None:
        """Serve with the triangle layers, or as vLLM alone does."""
        for builder, on in zip(self.builders, self.on, strict=True):
            builder.active = on if triangle else None

    def fused(self, whole_prompts: bool) -> None:
        """Whether a whole prompt's last rows are computed with its streaming rows."""
        for builder in self.builders:
            builder.whole_prompts = whole_prompts

    def prompt(self, tokens: int) -> list[int]:
        """Random tokens."""
        return torch.randint(10, self.shape.vocabulary - 10, (tokens,), generator=self._generator).tolist()

    def ask(
        self, prompts: Sequence[list[int]], new_tokens: int | Sequence[int] = 1, tops: int | None = None, chunk: int = 0
    ) -> tuple[float, list[Any]]:
        """Milliseconds until all is answered, and the answers. ``chunk``: most rows of a step; 0: no limit."""
        from vllm import SamplingParams

        self.scheduler.max_num_scheduled_tokens = chunk or self.most
        counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
        sampling = [
            SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False, logprobs=tops)
            for n in counts
        ]
        started = time.perf_counter()
        asked = [{"prompt_token_ids": tokens} for tokens in prompts]
        results = self.llm.generate(asked, sampling, use_tqdm=False)
        return (time.perf_counter() - started) * 1e3, [result.outputs[0] for result in results]

    def both(self, run: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
        """Milliseconds dense and with triangle layers, in turns, after one of each that does not count."""
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds + 1):
            for triangle in (False,) if self.off else (False, True):
                self.switch(triangle)
                took = run()
                if number:
                    times[triangle].append(took)
        return times

    def compared(self, what: str, n: int, chunk: int, times: tuple[list[float], list[float]], **more: Any) -> dict:
        """A record of :meth:`both`."""
        dense, triangle = times
        found = {
            "what": what,
            "runner": self.name + (" without the plugin" if self.off else ""),
            "n": n,
            "chunk": chunk,
            "layers": self.layers,
            "triangle_layers": 0 if self.off else len(self.triangle),
            "dense_ms": statistics.median(dense),
            "dense_range_ms": [min(dense), max(dense)],
            "rounds": len(dense),
        }
        if triangle:
            found |= {"ms": statistics.median(triangle), "range_ms": [min(triangle), max(triangle)]}
            found["speedup"] = found["dense_ms"] / found["ms"]
        return found | more

    # The phases

    def oracle(self, *lengths: int) -> list[dict[str, Any]]:
        """Answers against the model in float32: with its mask, and with the wrong one."""
        tokens, tops, records = 4, 20, []
        lengths = lengths or ((600, 1024) if self.quick else (3000, 8192))
        asked = {n: self.prompt(n) for n in lengths}
        chunks = (0, 256, 700) if self.quick else (0, 2048, 2944)
        ways: list[tuple[str, bool, int, int, bool]] = [
            (f"chunk {chunk}" if chunk else "whole", True, n, chunk, True) for n in lengths for chunk in chunks
        ]
        ways += [("whole, last rows apart", True, n, 0, False) for n in lengths]
        ways += [("dense", False, n, 0, True) for n in lengths]
        kept = self.builders[0].whole_prompts if not self.off else False
        for what, triangle, n, chunk, fused in ways:
            if self.off or not self.plain:
                continue
            self.switch(triangle)
            self.fused(fused and kept)
            _, (output,) = self.ask([asked[n]], tokens, tops, chunk)
            records.append(self._answered(f"oracle: {what}", asked[n], output, tokens, n=n, chunk=chunk or n))
        self.fused(kept)
        if not self.off and self.plain:
            self.switch(True)
            several = [self.prompt(length) for length in ((400, 90, 300) if self.quick else (5000, 700, 3000))]
            chunk = 256 if self.quick else 2048
            _, outputs = self.ask(several, tokens, tops, chunk)
            for one, output in zip(several, outputs, strict=True):
                found = self._answered("oracle: of a batch", one, output, tokens, n=len(one), chunk=chunk)
                records.append(found)
        return records

    def _answered(self, what: str, asked: list[int], output: Any, tokens: int, **more: Any) -> dict[str, Any]:
        found = [{token: each.logprob for token, each in step.items()} for step in output.logprobs]
        text = asked + list(output.token_ids)[: tokens - 1]
        limit = self.on[0].limit
        layers = frozenset(self.triangle) if len(asked) > limit else frozenset()
        wants = {"triangle": layers, "dense": frozenset()}
        gaps = {}
        for name, sparse in wants.items():
            known = (tuple(text), len(asked), sparse)
            if known not in self._known:
                self._known[known] = log_probabilities(self.weights, self.shape, *known, self.geometry)
            gaps[name] = gap(found, self._known[known])
        return {"what": what, "runner": self.name, **more, "to_triangle": gaps["triangle"], "to_dense": gaps["dense"]}

    def ttft(self, n: int) -> list[dict[str, Any]]:
        """Milliseconds to the first token of one prompt, whole and in chunks."""
        n = min(n, self.most // 2) if self.quick else n
        records, rounds = [], 3 if n <= 32768 else 2
        for chunk in (self.chunk, n) if n > self.chunk else (n,):
            times = self.both(lambda chunk=chunk: self.ask([self.prompt(n)], chunk=chunk)[0], rounds)  # type: ignore[misc]
            records.append(self.compared("ttft", n, chunk, times))
        if not self.off and n <= 32768:
            kept = self.builders[0].whole_prompts
            self.fused(False)
            times = self.both(lambda: self.ask([self.prompt(n)], chunk=n)[0], rounds)
            self.fused(kept)
            records.append(self.compared("ttft, last rows of a whole prompt by the platform", n, n, times))
        return records

    def decode(self) -> list[dict[str, Any]]:
        """Short prompts and their answers, many at once and one alone."""
        records = []
        for batch, n, new in ((4, 32, 8), (1, 32, 8)) if self.quick else ((32, 256, 128), (1, 256, 128), (32, 1024, 1)):
            prompts = [self.prompt(n) for _ in range(batch)]
            times = self.both(lambda prompts=prompts, new=new: self.ask(prompts, new)[0], 3)  # type: ignore[misc]
            records.append(self.compared("short prompts", n, self.most, times, batch=batch, new_tokens=new))
        return records

    def mixed(self) -> list[dict[str, Any]]:
        """Long prompts that come to requests which decode."""
        short, long, new = (32, 1000, 16) if self.quick else (256, 32768, 128)
        prompts = [self.prompt(short) for _ in range(8)] + [self.prompt(long) for _ in range(3)]
        counts = [new] * 8 + [32] * 3
        times = self.both(lambda: self.ask(prompts, counts, chunk=self.chunk)[0], 1 if self.quick else 2)
        return [self.compared("8 requests that decode, 3 long prompts", long, self.chunk, times, new_tokens=new)]

    def waiting(self) -> list[dict[str, Any]]:
        """How often the host waits for the GPU while a prompt of several chunks is computed."""
        from torch.profiler import ProfilerActivity, profile

        n, records = 1000 if self.quick else 32768, []
        for triangle in (False, True):
            self.switch(triangle)
            self.ask([self.prompt(n)], 4, chunk=self.chunk)
            asked = self.prompt(n)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                self.ask([asked], 4, chunk=self.chunk)
            names = Counter(event.name for event in seen.events())
            waits = {name: count for name, count in names.items() if "ynchronize" in name or "aten::item" in name}
            copies = {name: count for name, count in names.items() if name.startswith("Memcpy")}
            what = "triangle" if triangle else "dense"
            records.append({"what": f"waits, {what}", "runner": self.name, "n": n, "waits": waits, "copies": copies})
        return records

    def kernels(self) -> list[dict[str, Any]]:
        """One layer's streaming rows of a chunk: the general kernel and Hopper's, and putting keys together."""
        from tmx_compile.integrations.vllm.gather import Scratch, from_packed, places, seen
        from tmx_compile.integrations.vllm.rows import Streaming
        from tmx_compile.lowering.triton.launch import attend
        from tmx_compile.lowering.triton.tuning import LARGE
        from tmx_compile.mask.geometry import Geometry

        geometry, records = Geometry(*self.geometry), []
        heads, kv_heads, dim = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        cache = torch.randn(1024, 16, kv_heads, 2 * dim, **options).transpose(1, 2)
        table, scratch = torch.randperm(1024, device="cuda").int(), Scratch()
        for rows in (128, 256, 512, 1024, 2048, 4096, 8192):
            qkv = torch.randn(rows, heads + 2 * kv_heads, dim, **options)
            q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
            out = torch.empty(rows, heads, dim, **options)
            earlier = places(Streaming(0, 0, rows, 8192), table, 16, geometry)

            def together(k: Any = k, v: Any = v, earlier: Any = earlier) -> Any:
                return seen(lambda *at: from_packed(cache, kv_heads, dim, *at), earlier, k, v, scratch)

            keys, values = together()
            views = [x.transpose(0, 1)[None] for x in (q, keys, values)]

            def run(shapes: Any, views: Any = views, out: Any = out) -> None:
                into = out.transpose(0, 1)[None]
                attend(*views, None, None, Geometry(*self.geometry[:2], 0), 0.1, out=into, shapes=shapes)

            found = {"general_ms": lambda: run(LARGE), "chosen_ms": lambda: run(None), "gather_ms": together}
            times = {name: _gpu_ms(call) for name, call in found.items()}
            hosts = {f"host_{name}": _host_ms(call) for name, call in found.items()}
            records.append({"what": "one layer's chunk", "rows": rows, "position": 8192, **times, **hosts})
        return records


def _gpu_ms(call: Callable[[], Any], rounds: int = 20) -> float:
    """Milliseconds of the GPU for one call, the host being ahead."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / rounds


def _host_ms(call: Callable[[], Any], rounds: int = 20) -> float:
    """Milliseconds of the host to launch one call."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        call()
    took = (time.perf_counter() - started) * 1e3 / rounds
    torch.cuda.synchronize()
    return took


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phases; one that fails is told, and costs no other."""
    parser = argparse.ArgumentParser(prog="python -m studies.vllm_serving", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the result file")
    parser.add_argument("--phases", default=",".join(PHASES), help="by default all")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--off", action="store_true", help="vLLM without TriangleMix")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too: shows that it works")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further phase after so long")
    options = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    started, before = time.monotonic(), record.hardware()
    bench = Bench(options)
    import vllm

    print(f"engine {vllm.__version__}, runner {bench.name}: {time.monotonic() - started:.0f} s", flush=True)
    if bench.counts is not None:
        print(bench.counts.startup_line(bench.on[0].lowering), "| kernels ready:", bench.on[0].prepared, flush=True)
    elif not options.off:
        print(f"TriangleMix is not on: {[type(each).__name__ for each in bench.builders]}", flush=True)
        return 1
    command = " ".join(["python -m studies.vllm_serving", *sys.argv[2:]])
    settings = {"geometry": bench.geometry, "shape": vars(bench.shape), "vllm": vllm.__version__, "unit": "ms"}
    failed = 0
    for phase in options.phases.split(","):
        begin = time.monotonic()
        if begin - started > options.seconds:
            print(f"{phase}: no time left", flush=True)
            continue
        name, _, number = phase.partition(":")
        try:
            records = getattr(bench, name)(*[int(number)] if number else [])
        except Exception:
            failed += 1
            traceback.print_exc()
            continue
        for each in records:
            print(json.dumps(record.rounded(each)), flush=True)
        old = json.loads(options.file.read_text(encoding="utf-8")) if options.file.is_file() else {}
        measured = record.Measured(settings, [*old.get("records", []), *records])
        content = record.result("vllm", command, options.quick, before, measured)
        run = {"command": command, "tmx_compile_sources": content["versions"]["tmx_compile_sources"]}
        content["runs"] = old.get("runs", {}) | {f"{bench.name}{' off' if options.off else ''}": run}
        record.write(content, options.file)
        print(f"{phase}: {time.monotonic() - begin:.1f} s; counters: {bench.counts}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
