"""vLLM's answers with TriangleMix, whatever its scheduler does to a prompt, against the model in float32.

    python -m studies.vllm_oracle OUT/vllm_oracle.json [--cases long,cache] [--ranks 2] [--drafts ngram] [--eager]

A Llama with random weights, in bfloat16 on a GPU. Of every answer the 20 best log-probabilities of each token are
compared with the model's in plain PyTorch on the same tokens: with its triangle mask, and with the wrong, dense one.
Rounding gives what "oracle: dense" is off from the dense model. Needs vLLM, as :mod:`studies.vllm_serving` does; as
there, records of earlier calls stay in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from studies.vllm_engine import Answer, Engine
from studies.vllm_model import Shape, gap, log_probabilities, random_weights
from tmx_compile.bench import record

CASES = ("whole", "chunks", "batch", "rows", "cache", "preemption", "long", "ttft")
WITH_DRAFTS = ("drafts",)
GEOMETRY, QUICK_GEOMETRY = (8, 512, 128), (4, 32, 24)
TOPS = 20


class Checks:
    """One engine, and the model that it serves."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.quick: bool = options.quick
        self.gpus: int = options.ranks * options.stages
        self.stages: int = options.stages
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.geometry = QUICK_GEOMETRY if self.quick else GEOMETRY
        # A tenth of the prompts' lengths on a GPU.
        self.scale = 10 if self.quick else 1
        if self.quick:
            self.shape = Shape(4, 256, 384, 8, 2, 32, 512, 4096)
        elif options.large:
            self.shape = Shape(layers=8, vocabulary=32768, positions=40960)
        else:
            self.shape = Shape(8, 2048, 5632, 16, 4, 128, 32768, 40960)
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.weights = random_weights(self.shape, dtype, self.device)
        folder = Path(tempfile.mkdtemp()) / "model"
        self.shape.write(folder, self.weights, dtype)
        self.triangle = frozenset(range(self.shape.layers // 2, self.shape.layers))
        arguments: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": 4096 if self.quick else 33000,
            "max_num_seqs": 8,
            "tensor_parallel_size": options.ranks,
            "pipeline_parallel_size": options.stages,
            "enable_prefix_caching": not options.drafts,
            "max_logprobs": TOPS,
        }
        # By name, since "auto" would leave the shorter prompts dense.
        more: dict[str, Any] = {
            "min_seq_len": 1024 // self.scale,
            "lowering": "blocked" if self.device == "cpu" else "triton",
        }
        if self.device == "cpu":
            arguments |= {"block_size": 32}
        else:
            # So that engines beside this one do not matter.
            arguments |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": options.cache << 30}
        if options.eager or self.quick:
            arguments["enforce_eager"] = True
        else:
            arguments["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
        if options.ranks > 1:
            arguments["disable_custom_all_reduce"] = True
        self.drafter: str = options.drafts
        if self.drafter == "ngram":
            method = "ngram" if self.device == "cpu" else "ngram_gpu"
            lookup = {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
            arguments["speculative_config"] = {"method": method, "num_speculative_tokens": 3} | lookup
        elif self.drafter == "model":
            # The model drafts for itself, densely: many of its drafts are right, not all.
            drafter = {"method": "draft_model", "model": str(folder)}
            arguments["speculative_config"] = drafter | {"num_speculative_tokens": 3}
        most = 4096 if self.quick else 32768
        self.engine = Engine(folder, self.geometry, sorted(self.triangle), most, more, **arguments)
        if self.device == "cpu" and options.stages > 1:
            self.engine.connect()
        self._known: dict[Any, torch.Tensor] = {}

    def prompt(self, tokens: int) -> list[int]:
        """Random tokens, fewer in a quick run."""
        return self.engine.prompt(tokens // self.scale, self.shape.vocabulary)

    def record(
        self, what: str, asked: list[int], answer: Answer, last: int | None = None, **more: Any
    ) -> dict[str, Any]:
        """How far an answer is from the model's with its mask and with the wrong one.

        Args:
            what: of the record.
            asked: the prompt.
            answer: to it.
            last: last rows, unless they are the engine's.
            more: of the record.
        """
        text = asked + answer.tokens[:-1]
        sinks, window, rows = self.geometry
        geometry = (sinks, window, rows if last is None else last)
        gaps = {}
        for name, layers in (("triangle", self.triangle), ("dense", frozenset[int]())):
            layers = layers if len(asked) > self.engine.limit else frozenset()
            known = (tuple(text), len(asked), layers, geometry)
            if known not in self._known:
                self._known[known] = log_probabilities(self.weights, self.shape, *known)
            gaps[f"to_{name}"] = gap(answer.tops, self._known[known])
        about = {"what": f"oracle: {what}", "runner": self.engine.runner, "gpus": self.gpus, "n": len(asked)}
        if self.stages > 1:
            about["stages"] = self.stages
        return about | more | gaps

    # The cases

    def whole(self) -> list[dict[str, Any]]:
        """A whole prompt: in one call, with its last rows apart, and dense."""
        asked, records = self.prompt(3000), []
        for what, triangle, fused in (
            ("whole", True, True),
            ("whole, last rows apart", True, False),
            ("dense", False, True),
        ):
            self.engine.llm.reset_prefix_cache()
            self.engine.switch(triangle)
            self.engine.fused(fused)
            _, (answer,) = self.engine.ask([asked], 4, TOPS)
            records.append(self.record(what, asked, answer, chunk=len(asked)))
        self.engine.switch(True)
        self.engine.fused(True)
        return records

    def chunks(self) -> list[dict[str, Any]]:
        """Chunks; of the second size the last begins inside the last rows."""
        asked, records = self.prompt(3000), []
        for chunk in (1024 // self.scale, len(asked) - self.geometry[2] // 2):
            self.engine.llm.reset_prefix_cache()
            _, (answer,) = self.engine.ask([asked], 4, TOPS, chunk)
            records.append(self.record("chunks", asked, answer, chunk=chunk))
        return records

    def batch(self) -> list[dict[str, Any]]:
        """Prompts of different lengths at once, in steps that hold parts of several."""
        several, chunk = [self.prompt(n) for n in (5000, 700, 3000)], 2048 // self.scale
        _, answers = self.engine.ask(several, 4, TOPS, chunk)
        return [
            self.record("of a batch", asked, answer, chunk=chunk)
            for asked, answer in zip(several, answers, strict=True)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Chunks of one row, alone and while others decode: without last rows, the answer comes from such a chunk."""
        records = []
        # In eager mode there are no graphs, and the control would show nothing.
        eager = self.engine.runner.endswith("eager")
        for others, control in ((0, False), (3, False)) if eager else ((0, False), (3, False), (3, True)):
            asked, running = self.prompt(3000), [self.prompt(200) for _ in range(others)]
            self.engine.llm.reset_prefix_cache()
            with self.engine.last_rows(0), self.engine.one_row_is_decode(control):
                chunks = [len(asked) - 3, 1, 1, 1]
                answer, *rest = self.engine.step_by_step(running, asked, chunks, 4, TOPS)
            what = f"chunks of one row while {others} decode" if others else "chunks of one row"
            if control:
                what += ", taken for decode steps"
            records.append(self.record(what, asked, answer, last=0, chunk=1))
            short = zip(running, rest, strict=True)
            records += [self.record("decoding beside them", tokens, answer, chunk=1) for tokens, answer in short]
        return records

    def cache(self) -> list[dict[str, Any]]:
        """Prefix-cache hits, and the negative control: hits that cover last rows of the new prompt."""
        long, records = self.prompt(3000), []
        fork, cut = long[: 2000 // self.scale] + self.prompt(900), long[: 2000 // self.scale]
        self.engine.llm.reset_prefix_cache()
        for what, asked in (("first", long), ("again", long), ("a beginning of it", cut), ("another end", fork)):
            _, (answer,) = self.engine.ask([asked], 8, TOPS)
            records.append(self.record(f"prefix cache, {what}", asked, answer, cached=answer.cached))
            assert answer.cached <= len(asked) - self.geometry[2]
        rule = self.engine.core.scheduler.kv_cache_manager.trianglemix_rule
        rule.longest_hit = lambda request: 2**62
        try:
            self.engine.llm.reset_prefix_cache()
            self.engine.ask([long])
            _, (answer,) = self.engine.ask([cut], 8, TOPS)
        finally:
            del rule.longest_hit
        self.engine.llm.reset_prefix_cache()
        return [*records, self.record("prefix cache, hits not capped", cut, answer, cached=answer.cached)]

    def preemption(self) -> list[dict[str, Any]]:
        """Two prompts, and fewer blocks than they and what they generate need."""
        several, new_tokens = [self.prompt(n) for n in (2200, 2400)], 48
        # Both fit, with a few tokens to generate, and no more.
        need = sum(-(-(len(asked) + 8) // self.engine.block) for asked in several)
        before = self.engine.total("vllm:num_preemptions")
        with self.engine.blocks(need + 1):
            _, answers = self.engine.ask(several, new_tokens, TOPS)
        preempted = self.engine.total("vllm:num_preemptions") - before
        return [
            self.record("preempted", asked, answer, new_tokens=new_tokens, preemptions=preempted)
            for asked, answer in zip(several, answers, strict=True)
        ]

    def long(self) -> list[dict[str, Any]]:
        """A prompt of 32,768 tokens, whole and in chunks."""
        asked, records = self.prompt(32768), []
        for chunk in (len(asked), 8192 // self.scale):
            self.engine.llm.reset_prefix_cache()
            _, (answer,) = self.engine.ask([asked], 4, TOPS, chunk)
            records.append(self.record("long", asked, answer, chunk=chunk))
        return records

    def drafts(self) -> list[dict[str, Any]]:
        """Drafts by n-grams or by a model, verified several rows at a time."""
        what = {"ngram": "n-gram drafts", "model": "drafts of a model"}[self.drafter]
        several, new_tokens = [self.prompt(n) for n in (3000, 1800, 700)], 48
        names = ("drafts", "draft_tokens", "accepted_tokens")
        before = [self.engine.total(f"vllm:spec_decode_num_{name}") for name in names]
        _, answers = self.engine.ask(several, new_tokens, TOPS, 2048 // self.scale)
        made = {
            name: self.engine.total(f"vllm:spec_decode_num_{name}") - count
            for name, count in zip(names, before, strict=True)
        }
        return [
            self.record(what, asked, answer, new_tokens=new_tokens, **made)
            for asked, answer in zip(several, answers, strict=True)
        ]

    def ttft(self) -> list[dict[str, Any]]:
        """Milliseconds to the first token of 32,768 tokens, whole and in chunks."""
        records = []
        for chunk in (8192 // self.scale, 32768 // self.scale):

            def run(chunk: int = chunk) -> dict[str, float]:
                return {"ms": self.engine.ask([self.prompt(32768)], chunk=chunk)[0]}

            sizes = {"n": 32768 // self.scale, "chunk": chunk, "layers": self.shape.layers}
            sizes["triangle_layers"] = len(self.triangle)
            records.append(self.engine.compared("ttft", self.engine.both(run, 8), gpus=self.gpus, **sizes))
        self.engine.switch(True)
        return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; one that fails is told, and costs no other."""
    parser = argparse.ArgumentParser(prog="python -m studies.vllm_oracle", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the result file")
    parser.add_argument("--cases", help=f"by default {','.join(CASES[:-1])}")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs")
    parser.add_argument("--stages", type=int, default=1, help="of a pipeline, each with its own GPUs")
    parser.add_argument("--drafts", choices=("ngram", "model"), default="", help="an engine with speculation")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--large", action="store_true", help="8 layers of the 8B shape")
    parser.add_argument("--cache", type=int, default=2, help="GiB of the KV cache on a GPU")
    parser.add_argument("--after", type=Path, help="measure when this file is there: engines may be side by side")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too: shows that it works")
    options = parser.parse_args(arguments)
    cases = options.cases.split(",") if options.cases else WITH_DRAFTS if options.drafts else CASES[:-1]
    started, before = time.monotonic(), record.hardware()
    checks = Checks(options)
    import vllm

    print(f"engine {vllm.__version__}: {time.monotonic() - started:.0f} s, {checks.engine.state()}", flush=True)
    command = " ".join(["python -m studies.vllm_oracle", *sys.argv[2:]])
    settings = {"geometry": checks.geometry, "vllm": vllm.__version__, "unit": "nats"}
    old = json.loads(options.file.read_text(encoding="utf-8")) if options.file.is_file() else {}
    failed, records = 0, list(old.get("records", []))
    for case in cases:
        while case == "ttft" and options.after and not options.after.exists():
            time.sleep(0.2)
        begin = time.monotonic()
        try:
            found = getattr(checks, case)()
        except Exception:
            failed += 1
            traceback.print_exc()
            continue
        records += [record.rounded(each) for each in found]
        for each in records[-len(found) :]:
            print(json.dumps(each), flush=True)
        measured = record.Measured(settings, records)
        content = record.result("vllm_oracle", command, options.quick, before, measured)
        run = {"command": command, "shape": vars(checks.shape)}
        run["tmx_compile_sources"] = content["versions"]["tmx_compile_sources"]
        name = f"{checks.engine.runner}, {checks.gpus} GPU{', stages' if options.stages > 1 else ''}"
        name += f", drafts by {options.drafts}" if options.drafts else ""
        content["runs"] = old.get("runs", {}) | {name: run}
        record.write(content, options.file)
        print(f"{case}: {time.monotonic() - begin:.1f} s", flush=True)
    print(f"done: {time.monotonic() - started:.0f} s, {failed} failed; {checks.engine.state()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
