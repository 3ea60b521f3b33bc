"""Tokens per second end to end, a prompt and what is generated after it: dense, triangle, streaming decode.

A part is one workload (``batch-4``): its variants take turns, A B C A B C. What was compiled for one part serves the
next in the same process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import Case, Parts, Records, device, free, note
from benchmarks.generation import VARIANTS, Run, Runner
from benchmarks.models import smollm2
from benchmarks.shapes import CAUSAL, MODELS, build, register_causal
from benchmarks.texts import EVALUATION, token_stream
from tmx_compile.bench.timing import describe

GEOMETRY = {"num_sink_tokens": 8, "sliding_window_size": 512, "num_last_tokens": 128}
SHARED: dict[str, Any] = {**GEOMETRY, "new_tokens": 256, "min_seq_len": 2048, "warm_tokens": 2176, "warm_steps": 3}
CPU: dict[str, Any] = {
    **SHARED,
    "layers": 12,
    "dtype": "float32",
    "variants": ["dense", "triangle", "streaming-cache"],
    # batch, tokens of each prompt, timed rounds
    "workloads": [[1, 4096, 3], [2, 4096, 3], [4, 3072, 3], [8, 3072, 3]],
    "sizes": "12 of 30 layers, and shorter prompts from batch 4 on, so that two cores take minutes, "
    "not an hour; prompts stay above min_seq_len, below which all variants are dense",
}
CUDA: dict[str, Any] = {
    **SHARED,
    "layers": 16,
    "dtype": "bfloat16",
    "variants": ["dense", "triangle", "streaming-cache"],
    "workloads": [[1, 32768, 3], [8, 8192, 3]],
    # On CUDA shorter prompts stay dense, whatever min_seq_len.
    "warm_tokens": 4096,
    "sizes": "16 of 32 layers: compiling a graph takes time in proportion, and a part has seven",
}
QUICK: dict[str, Any] = {
    **SHARED,
    "num_sink_tokens": 4,
    "sliding_window_size": 32,
    "num_last_tokens": 64,
    "new_tokens": 6,
    "min_seq_len": 128,
    "warm_tokens": 160,
    # Two triangle layers: the last layer's streaming rows reach no later row.
    "layers": 4,
    "dtype": "float32",
    "variants": ["dense", "triangle", "streaming", "streaming-cache"],
    "workloads": [[2, 200, 2]],
    "sizes": "tiny",
}


def names(quick: bool) -> list[str]:
    return [f"batch-{batch}" for batch, _, _ in _plan(quick)["workloads"]]


def settings(quick: bool) -> dict[str, Any]:
    plan = _plan(quick)
    return {
        **plan,
        "device": device().type,
        "model": _model_name(quick),
        "triangle_layers": f"the deepest {plan['layers'] // 2} of {plan['layers']}",
        "prompts": "random ids"
        if quick or device().type == "cuda"
        else "pydoc_data.topics, sequences that share no text: " + ", ".join(EVALUATION),
        "generated": "every variant is given the same next tokens, those of the text, so that each makes the same "
        "number of steps at the same positions; the greedy choice is computed in each step all the same",
        "attention": "F.scaled_dot_product_attention(is_causal=rows > 1, enable_gqa=True) without a mask, in every "
        "variant: as Hugging Face's code is compiled it builds a mask for a single row too, and then copies every key "
        "to all query heads. Right here because nothing is padded",
        "dense": "torch.compile(backend='inductor', dynamic=True), a DynamicCache",
        "triangle": "torch.compile(backend=tmx_backend(config, strict=True), dynamic=True), a DynamicCache: single "
        "rows are dense",
        "streaming": "the same with decode='streaming': a DynamicCache that keeps every key",
        "streaming-cache": "the backend as in triangle, and a StreamingCache, which frees the keys in between. It is "
        "made with attn_implementation='sdpa', as it asks for; then the attention above is used",
        "calls": "model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1): the prompt in one call, "
        "then a token a call",
        "prefill_s": "until the prompt's call has finished, a new cache included",
        "decode_s": "the new_tokens - 1 calls that follow; before the first, keys and values are made contiguous, so "
        "that it is no graph of its own. The host waits for the device after the last one only",
        "tokens_per_s": "batch * new_tokens / (prefill + decode); medians over the rounds, for each figure by itself",
        "decode_tokens_per_s": "batch * (new_tokens - 1) / decode",
        "cache_mib": "what the cache's tensors hold at the end of the prompt, and at the end, whole storages",
        "peak_gib": "peak of torch's allocator over a round, weights included (CUDA)",
        "compile_s": "the untimed first run: a prompt of warm_tokens and warm_steps further tokens, nearly all of it "
        "compilation. Compile caches start empty and are shared: later variants and parts find what earlier ones made",
        "compilations": "graphs compiled for the variant in this part",
        "recompiles": "those of them after the first run; a round with one is not counted and is made again",
        "like_dense": "share of the greedy tokens that are those of the dense variant",
    }


def measure(part: str, quick: bool) -> Records:
    """The records of one workload, one for each variant."""
    plan = _plan(quick)
    batch, tokens, rounds = next(w for w in plan["workloads"] if f"batch-{w[0]}" == part)
    lab = lab_of(quick)
    ids = lab.ids(batch, tokens + plan["new_tokens"])
    with lab.caches(), torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        found = {name: Outcome() for name in plan["variants"]}
        for name, outcome in found.items():
            note(f"{part}: {name}, compiling")
            outcome.attempt(lambda name=name: _warm(lab.runner(name), ids, plan))
        for number in range(rounds):
            note(f"{part}: round {number + 1} of {rounds}")
            for name, outcome in found.items():
                outcome.attempt(lambda name=name: counted(lab.runner(name), ids, tokens))
        lowerings = {name: lab.runner(name).lowerings() for name in found}
    reference = found["dense"].last
    records: Records = []
    for name, outcome in found.items():
        record = {
            "variant": name,
            "batch": batch,
            "tokens": tokens,
            "new_tokens": plan["new_tokens"],
            "layers": plan["layers"],
            "triangle_layers": plan["layers"] // 2 if VARIANTS[name].triangle else 0,
            **outcome.fields(batch, plan["new_tokens"]),
            "lowerings": lowerings[name],
            "like_dense": None,
        }
        if reference is not None and outcome.last is not None:
            record["like_dense"] = float((outcome.last.chosen == reference.chosen).float().mean())
        records.append(record)
    return records


class Outcome:
    """What a variant's runs came to: the first, untimed one and the rounds, or why it failed."""

    def __init__(self) -> None:
        self.first_s = 0.0
        self.compilations = self.recompiles = 0
        self.runs: list[Run] = []
        self.failed: str | None = None

    def attempt(self, runs: Callable[[], list[Run]]) -> None:
        """Make runs, unless one failed before: the last of them counts, as a round if it compiled nothing."""
        if self.failed:
            return
        try:
            start = time.perf_counter()
            made = runs()
            self.compilations += sum(run.graphs for run in made)
            if self.first_s == 0.0:
                self.first_s = time.perf_counter() - start
                return
            self.recompiles += sum(run.graphs for run in made)
            self.runs.append(made[-1])
        # A variant that fails says how, and the others are measured all the same.
        except Exception as error:
            self.failed = describe(error)
            note(f"failed: {self.failed}")
        free()

    @property
    def last(self) -> Run | None:
        return self.runs[-1] if self.runs and not self.failed else None

    def fields(self, batch: int, new_tokens: int) -> dict[str, Any]:
        """As record fields; None for what a failed variant lacks."""
        keys = ("prefill_s", "decode_s", "tokens_per_s", "decode_tokens_per_s", "cache_prompt_mib", "cache_mib")
        found: dict[str, Any] = dict.fromkeys((*keys, "peak_gib"))
        if self.last is not None:
            prefills, decodes = [run.prefill_s for run in self.runs], [run.decode_s for run in self.runs]
            totals = [a + b for a, b in zip(prefills, decodes, strict=True)]
            peaks = [run.peak_gib for run in self.runs if run.peak_gib is not None]
            found |= {
                "prefill_s": statistics.median(prefills),
                "decode_s": statistics.median(decodes),
                "tokens_per_s": batch * new_tokens / statistics.median(totals),
                "decode_tokens_per_s": batch * (new_tokens - 1) / statistics.median(decodes),
                "prefill_s_all": prefills,
                "decode_s_all": decodes,
                "cache_prompt_mib": self.last.prompt_bytes / 2**20,
                "cache_mib": self.last.end_bytes / 2**20,
                "peak_gib": max(peaks, default=None),
            }
        return found | {
            "rounds": len(self.runs),
            "compile_s": self.first_s or None,
            "compilations": self.compilations,
            "recompiles": self.recompiles,
            "failed": self.failed,
        }


def _warm(runner: Runner, ids: Tensor, plan: dict[str, Any]) -> list[Run]:
    """The first run of a variant, short: its graphs are for all lengths, and have the layers that were asked for."""
    made = [runner(ids[:, : plan["warm_tokens"] + plan["warm_steps"] + 1], plan["warm_tokens"])]
    runner.check()
    return made


def counted(runner: Runner, ids: Tensor, tokens: int) -> list[Run]:
    """One round, made again while something was compiled in it.

    Raises:
        RuntimeError: every round compiles something.
    """
    made = [runner(ids, tokens)]
    while made[-1].graphs:
        if len(made) == 4:
            raise RuntimeError(f"still compiling after {len(made)} rounds")
        made.append(runner(ids, tokens))
    return made


class _Lab:
    """A model, its compiled variants, and where their code is kept, for all parts measured in one process."""

    def __init__(self, quick: bool) -> None:
        self._quick, self._plan, place = quick, _plan(quick), device()
        self._folder = tempfile.TemporaryDirectory(prefix="tmx-bench-")
        self._text: Tensor | None = None
        register_causal()
        if quick or place.type == "cuda":
            dtype = getattr(torch, self._plan["dtype"])
            self._model = build(MODELS["llama"], place, dtype, quick=quick, layers=self._plan["layers"])
        else:
            self._model, tokenizer = smollm2(self._plan["layers"])
            self._text = token_stream(tokenizer, EVALUATION)
        self._model.requires_grad_(False)
        self._model.config._attn_implementation = CAUSAL
        self._runners: dict[str, Runner] = {}
        with self.caches():
            # What a compiler prepares once (precompiled headers) is no variant's.
            torch.compile(torch.sin, dynamic=False)(torch.ones(64, device=place))

    @contextlib.contextmanager
    def caches(self) -> Iterator[None]:
        """Compile caches that begin empty and live as long as this process; a quick run has the user's own."""
        kept = {} if self._quick else {"TORCHINDUCTOR_CACHE_DIR": self._folder.name}
        with mock.patch.dict(os.environ, kept):
            yield

    def runner(self, name: str) -> Runner:
        """A variant; made when it is first asked for."""
        if name not in self._runners:
            self._runners[name] = Runner(self._model, name, self._plan)
        return self._runners[name]

    def ids(self, batch: int, tokens: int) -> Tensor:
        """Token ids (batch, tokens): pieces of the text, or random ones."""
        if self._text is None:
            generator = torch.Generator().manual_seed(tokens)
            size = self._model.config.vocab_size
            return torch.randint(0, size, (batch, tokens), generator=generator).to(device())
        apart = self._text.shape[0] // batch
        if apart < tokens:
            raise RuntimeError(f"the text has {self._text.shape[0]} tokens, {batch} sequences of {tokens} need more")
        return torch.stack([self._text[i * apart : i * apart + tokens] for i in range(batch)])


@functools.lru_cache(maxsize=1)
def lab_of(quick: bool) -> _Lab:
    """The lab of this process."""
    return _Lab(quick)


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else CUDA if device().type == "cuda" else CPU


def _model_name(quick: bool) -> str:
    layers = _plan(quick)["layers"]
    if quick:
        return "a tiny Llama, random weights"
    if device().type == "cuda":
        shape = MODELS["llama"]
        return f"{shape.name}'s shape with {layers} of its {shape.layers} layers, random weights"
    return f"SmolLM2-135M-Instruct, the first {layers} of its 30 layers (4-bit weights, computed in float32)"


def finish(records: Records) -> None:
    """Every figure against the dense variant of the same part."""
    for record in records:
        dense = next(r for r in records if r["part"] == record["part"] and r["variant"] == "dense")
        whole = record["tokens_per_s"] and dense["tokens_per_s"]
        record["ratio"] = record["tokens_per_s"] / dense["tokens_per_s"] if whole else None
        record["prefill_ratio"] = dense["prefill_s"] / record["prefill_s"] if whole else None
        record["decode_ratio"] = dense["decode_s"] / record["decode_s"] if whole else None


def file() -> str:
    """The result file on this machine."""
    return "throughput_cuda.json" if device().type == "cuda" else "throughput.json"


COLUMNS = (
    *("batch", "tokens", "variant", "prefill_s", "decode_s", "tokens_per_s", "ratio", "decode_tokens_per_s"),
    *("decode_ratio", "cache_mib", "peak_gib", "compile_s", "compilations", "recompiles", "like_dense", "failed"),
)
CASE = Case("throughput", file, None, COLUMNS, Parts(names, settings, measure, finish))
