"""vLLM serves a Llama of the 8B shape, dense and with TriangleMix: time to first token, decoding, mixed load, waiting.

    python -m studies.vllm_serving OUT/vllm.json [--phases ttft:65536,ttft:8192:2048] [--layers 32] [--eager] [--quick]

Needs vLLM, which is in neither of the project's environments for GPUs; so it is no case of ``studies.run``. One engine
serves both: for dense, vLLM's own backend and functions are put back in place. With ``--off`` the
plugin is not switched on at all. Records of earlier calls stay in the file; each is printed and stored as it comes.
VLLM_USE_V2_MODEL_RUNNER=0 picks the first model runner. That the answers are right, :mod:`studies.vllm_oracle` shows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.account import account
from studies.vllm_engine import Engine
from studies.vllm_model import Shape
from tmx_compile.bench import record

GEOMETRY = (8, 512, 128)
CHUNK = 8192
PHASES = (
    "ttft:32768",
    "ttft:65536",
    "waiting",
    "ttft:8192",
    "short",
    "host",
    "decode",
    "kernels",
    "ttft:131072",
    "mixed",
)


class Bench:
    """One engine in this process, and what is measured with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.quick = options.quick
        self.shape = Shape(4, 256, 384, 8, 2, 32, 512, 4096) if self.quick else Shape(options.layers)
        self.geometry = (4, 32, 24) if self.quick else GEOMETRY
        self.layers = self.shape.layers
        self.triangle = [] if options.off else list(range(self.layers // 2, self.layers))
        self.most = 2048 if self.quick else options.most
        self.chunk = 256 if self.quick else CHUNK
        folder = Path(tempfile.mkdtemp()) / "model"
        self.shape.write(folder)
        arguments: dict[str, Any] = {"dtype": "float32" if self.quick else "bfloat16"}
        if torch.cuda.is_available():
            if options.cache:
                # Then engines beside this one do not matter.
                arguments |= {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": options.cache << 30}
            else:
                arguments["gpu_memory_utilization"] = 0.7
        if options.eager or self.quick:
            arguments["enforce_eager"] = True
        else:
            # Of a server's own sizes, up to 512, those that are measured here.
            arguments["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 256]}
        self.engine = Engine(
            folder,
            self.geometry,
            self.triangle,
            self.most,
            {"min_seq_len": 128, "lowering": "blocked"} if self.quick else {},
            load_format="dummy",
            max_model_len=self.most + 64,
            max_num_seqs=32,
            enable_prefix_caching=False,
            **arguments,
        )
        # vLLM's dummy weights make a chaotic model; its sampling is none of what is measured, but numbers should be.
        self.engine.calm()

    def prompt(self, tokens: int) -> list[int]:
        """Random tokens."""
        return self.engine.prompt(tokens, self.shape.vocabulary)

    def compared(
        self,
        what: str,
        n: int,
        chunk: int,
        run: Callable[[], dict[str, float]],
        rounds: int,
        warm: int = 1,
        control: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        """A record of what ``run`` measures dense and with triangle layers; with ``control``, dense twice."""
        found = self.engine.both(run, rounds, warm, control)
        layers = {"layers": self.layers, "triangle_layers": len(self.triangle)}
        return self.engine.compared(what, found, n=n, chunk=chunk, **layers, **more)

    # The phases

    def ttft(self, n: int, chunk: int = 0, rounds: int = 0) -> Iterator[dict[str, Any]]:
        """Milliseconds to the first token of one prompt: in chunks of a given size, or in the usual ones and whole."""
        n = min(n, self.most // 2) if self.quick else n
        # A call of seconds is warm behind its first tenth; shorter ones get a round that does not count.
        rounds, warm = rounds or max(4, min(12, 200000 // n)), int(n <= 32768)
        for size in [chunk] if chunk else sorted({self.chunk, n}) if n > self.chunk else [n]:

            def run(size: int = size) -> dict[str, float]:
                return {"ms": self.engine.ask([self.prompt(n)], chunk=size)[0]}

            yield self.compared("ttft", n, size, run, rounds, warm)

    def apart(self, n: int) -> list[dict[str, Any]]:
        """The same for a whole prompt, whose last rows vLLM's backend computes."""
        self.engine.fused(False)

        def run() -> dict[str, float]:
            return {"ms": self.engine.ask([self.prompt(n)], chunk=n)[0]}

        found = self.compared("ttft, last rows of a whole prompt by the platform", n, n, run, 3)
        self.engine.fused(True)
        return [found]

    def short(self, seconds: int = 18, only: int = 0) -> Iterator[dict[str, Any]]:
        """Milliseconds to the first tokens of prompts whose rows are all dense, one alone and several at once.

        Each kind takes so many seconds; ``only``: one prompt of so many tokens alone.
        """
        kinds = ((1, 32), (4, 32)) if self.quick else ((1, 1000), (1, 256), (1, 2000), (8, 1000))
        for batch, n in ((1, only),) if only else kinds:

            def run(batch: int = batch, n: int = n) -> float:
                return self.engine.ask([self.prompt(n) for _ in range(batch)])[0]

            # The second is what the way of measuring alone gives.
            for control in (False, True) if batch == 1 and n in (32, 256, 1000) and not only else (False,):
                rounds = self.engine.in_turns(run, 0.5 if self.quick else seconds, control=control)
                what = "short prompts, dense twice" if control else "short prompts"
                about = {"layers": self.layers, "triangle_layers": len(self.triangle), "batch": batch, "new_tokens": 1}
                yield self.engine.compared_in_turns(what, rounds, n=n, chunk=self.most, **about)

    def host(self, n: int = 256, seconds: int = 8) -> Iterator[dict[str, Any]]:
        """Milliseconds of the host for the step of such a short prompt, in which the GPU's own time is not.

        What the plugin adds to it is too little to be seen in the time to the first token.
        """
        n = 32 if self.quick else n
        with host_times(self.engine) as times:

            def run() -> float:
                times.clear()
                self.engine.ask([self.prompt(n)])
                return max(times)

            for control in (False, True):
                rounds = self.engine.in_turns(run, 0.5 if self.quick else seconds, control=control)
                what = "the host of a short prompt's step" + (", dense twice" if control else "")
                about = {"layers": self.layers, "triangle_layers": len(self.triangle), "batch": 1, "new_tokens": 1}
                yield self.engine.compared_in_turns(what, rounds, n=n, chunk=self.most, **about)

    def decode(self) -> Iterator[dict[str, Any]]:
        """One decode step of short requests, many at once and one alone."""
        n, pairs, steps = (32, 8, 4) if self.quick else (256, 30, 16)
        for batch in (4, 1) if self.quick else (32, 1):
            found = self.engine.decoding([self.prompt(n) for _ in range(batch)], pairs, steps)
            more = {"layers": self.layers, "triangle_layers": len(self.triangle), "batch": batch, "steps": steps}
            yield self.engine.compared("a decode step", found, n=n, **more)

    def mixed(self) -> list[dict[str, Any]]:
        """Long prompts that come to requests which decode; how fast these do."""
        short, long, new = (32, 1000, 16) if self.quick else (256, 32768, 128)
        prompts = [self.prompt(short) for _ in range(8)] + [self.prompt(long) for _ in range(3)]
        counts = [new] * 8 + [32] * 3

        def run() -> dict[str, float]:
            took, answers = self.engine.ask(prompts, counts, chunk=self.chunk)
            slowest = max(answer.decoding for answer in answers[:8])
            return {"ms": took, "decode_tokens_per_s": 8 * (new - 1) / slowest if slowest else 0.0}

        what = "8 requests that decode, 3 long prompts"
        return [self.compared(what, long, self.chunk, run, 1 if self.quick else 2, new_tokens=new)]

    def waiting(self) -> list[dict[str, Any]]:
        """How often the host waits for the GPU while a prompt of several chunks is computed."""
        from torch.profiler import ProfilerActivity, profile

        n, records = 1000 if self.quick else 32768, []
        for triangle in (False, True):
            self.engine.switch(triangle)
            self.engine.ask([self.prompt(n)], 4, chunk=self.chunk)
            asked = self.prompt(n)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                self.engine.ask([asked], 4, chunk=self.chunk)
            names = Counter(event.name for event in seen.events())
            waits = {name: count for name, count in names.items() if "ynchronize" in name or "aten::item" in name}
            copies = {name: count for name, count in names.items() if name.startswith("Memcpy")}
            what = "triangle" if triangle else "dense"
            records.append(
                {"what": f"waits, {what}", "runner": self.engine.runner, "n": n, "waits": waits, "copies": copies}
            )
        return records

    def parts(self, n: int, chunk: int) -> Iterator[dict[str, Any]]:
        """Of one prompt's time on the GPU, dense and with triangle layers: what each kernel took."""
        n, chunk = (1000, 256) if self.quick else (n, chunk)
        for triangle in (False, True):
            self.engine.switch(triangle)
            self.engine.ask([self.prompt(n)], chunk=chunk)
            asked = self.prompt(n)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            found = account(functools.partial(self.engine.ask, [asked], chunk=chunk), device)
            about = {"n": n, "chunk": chunk, "layers": self.layers, "triangle_layers": len(self.triangle)}
            what = f"parts, {'triangle' if triangle else 'dense'}"
            yield {"what": what, "runner": self.engine.runner, **about, **found}

    def kernels(self) -> list[dict[str, Any]]:
        """One layer's streaming rows of a chunk: the general kernel and Hopper's, and putting keys together."""
        from tmx_compile.integrations.vllm.gather import Scratch, places, together
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

            gather = functools.partial(together, cache, dim, earlier, k, v, scratch)
            keys, values = gather()
            views = [x.transpose(0, 1)[None] for x in (q, keys, values)]

            def run(shapes: Any, views: Any = views, out: Any = out) -> None:
                into = out.transpose(0, 1)[None]
                attend(*views, None, None, Geometry(*self.geometry[:2], 0), 0.1, out=into, shapes=shapes)

            found = {"general_ms": lambda: run(LARGE), "chosen_ms": lambda: run(None), "gather_ms": gather}
            times = {name: _gpu_ms(call) for name, call in found.items()}
            hosts = {f"host_{name}": _host_ms(call) for name, call in found.items()}
            records.append({"what": "one layer's chunk", "rows": rows, "position": 8192, **times, **hosts})
        return records


@contextlib.contextmanager
def host_times(engine: Engine) -> Iterator[list[float]]:
    """Milliseconds of the host for each step from here on: until all is launched, the GPU not waited for."""
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    plain, found = runner.execute_model, []

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            found.append((time.perf_counter() - started) * 1e3)

    runner.execute_model = execute_model
    try:
        yield found
    finally:
        del runner.execute_model


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
    parser.add_argument("--layers", type=int, default=16, help="of the model; half of them are triangle layers")
    parser.add_argument("--cache", type=int, default=0, help="GiB of the KV cache; by default what is left")
    parser.add_argument("--most", type=int, default=131072, help="tokens of the longest prompt")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further phase after so long")
    parser.add_argument("--after", type=Path, help="measure when this file is there: engines may start side by side")
    options = parser.parse_args(arguments)
    started, before = time.monotonic(), record.hardware()
    bench = Bench(options)
    import vllm

    engine = bench.engine
    print(f"engine {vllm.__version__}: {time.monotonic() - started:.0f} s, {engine.state()}", flush=True)
    if not options.off and "line" not in engine.state():
        print("TriangleMix is not on", flush=True)
        return 1
    while options.after and not options.after.exists() and time.monotonic() - started < options.seconds:
        time.sleep(0.2)
    command = " ".join(["python -m studies.vllm_serving", *sys.argv[2:]])
    settings = {"geometry": bench.geometry, "shape": vars(bench.shape), "vllm": vllm.__version__, "unit": "ms"}
    failed = 0
    for phase in options.phases.split(","):
        begin = time.monotonic()
        if begin - started > options.seconds:
            print(f"{phase}: no time left", flush=True)
            continue
        name, *numbers = phase.split(":")
        try:
            for each in getattr(bench, name)(*map(int, numbers)):
                print(json.dumps(record.rounded(each)), flush=True)
                old = json.loads(options.file.read_text(encoding="utf-8")) if options.file.is_file() else {}
                measured = record.Measured(settings, [*old.get("records", []), each])
                content = record.result("vllm", command, options.quick, before, measured)
                run = {"command": command, "tmx_compile_sources": content["versions"]["tmx_compile_sources"]}
                content["runs"] = old.get("runs", {}) | {
                    f"{engine.runner}, {bench.layers} layers{' off' if options.off else ''}": run
                }
                record.write(content, options.file)
        except Exception:
            failed += 1
            traceback.print_exc()
            continue
        print(f"{phase}: {time.monotonic() - begin:.1f} s; {engine.state().get('counts', '')}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
