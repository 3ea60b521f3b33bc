"""One vLLM engine in this process, whose triangle layers can be switched off and on, and asking it.

Where the engine has several GPUs, its workers are processes of their own; so what is done in a worker are functions of
this module.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from studies.ratios import Round, of_pairs, of_rounds

NAMES = ("num_sink_tokens", "sliding_window_size", "num_last_tokens")
_KEPT = "study_active"


@dataclass
class Answer:
    """What one request got.

    Attributes:
        tokens: that it generated.
        tops: of each, the best tokens' logarithms of probabilities.
        cached: tokens of the prompt that came from the prefix cache.
        decoding: seconds from its first token to its last.
    """

    tokens: list[int]
    tops: list[dict[int, float]]
    cached: int
    decoding: float


@contextlib.contextmanager
def few_blocks(llm: Any, count: int) -> Iterator[None]:
    """Leave the cache of a ``vllm.LLM`` in this process so many blocks, with nothing in them."""
    assert llm.reset_prefix_cache()
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - count)
    try:
        yield
    finally:
        pool.free_blocks(taken)


class Engine:
    """An engine with TriangleMix on, and what studies do with it.

    Args:
        folder: the model's.
        geometry: sinks, window, last rows.
        triangle: the triangle layers; empty: TriangleMix is off.
        chunk: most rows of a step, unless a request says otherwise; also the largest step that memory is kept for.
        more: other settings of the plugin.
        arguments: of ``vllm.LLM``.
    """

    def __init__(
        self,
        folder: Path,
        geometry: tuple[int, int, int],
        triangle: Sequence[int],
        chunk: int,
        more: dict[str, Any],
        **arguments: Any,
    ) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from vllm import LLM

        self.chunk, self.off = chunk, not triangle
        settings = dict(zip(NAMES, geometry, strict=True)) | {"triangle_layer_indices": list(triangle)} | more
        config = {} if self.off else {"additional_config": {"trianglemix": settings}}
        common: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "max_num_batched_tokens": chunk,
            "generation_config": "vllm",
            "disable_log_stats": False,
        }
        self.llm = LLM(str(folder), **common | config | arguments)
        self.core: Any = self.llm.llm_engine.engine_core.engine_core
        state = self.state()
        self.runner: str = state["runner"] + (" eager" if arguments.get("enforce_eager") else " compiled")
        self.limit: int = state.get("limit", 0)
        self._generator = torch.Generator().manual_seed(0)
        self._names = itertools.count()

    def state(self) -> dict[str, Any]:
        """What the plugin says in a worker, and which runner this has: of a pipeline, a stage with triangle layers."""
        found: list[dict[str, Any]] = self.llm.collective_rpc(_state)
        return max(found, key=len)

    def connect(self) -> None:
        """Take the memory between a pipeline's stages: vLLM does in a run that eager engines on a CPU leave out."""
        self.llm.collective_rpc(_connect)

    def calm(self) -> None:
        """Random weights in the place of vLLM's dummies."""
        self.llm.collective_rpc(_calm)

    def switch(self, triangle: bool) -> None:
        """Serve with the triangle layers, or as vLLM alone does: then nothing of the plugin's runs in a worker."""
        self.llm.collective_rpc(_switch, args=(triangle,))

    def fused(self, whole_prompts: bool) -> None:
        """Whether a whole prompt's last rows are computed with its streaming rows."""
        self.llm.collective_rpc(_fuse, args=(whole_prompts,))

    @contextlib.contextmanager
    def last_rows(self, count: int) -> Iterator[None]:
        """Another number of last rows."""
        before = max(self.llm.collective_rpc(_last, args=(count,)))
        try:
            yield
        finally:
            self.llm.collective_rpc(_last, args=(before,))

    @contextlib.contextmanager
    def one_row_is_decode(self, control: bool) -> Iterator[None]:
        """With ``control``, do not keep chunks of one row out of the graphs of decode steps."""
        self.llm.collective_rpc(_look_ahead, args=(not control,))
        try:
            yield
        finally:
            self.llm.collective_rpc(_look_ahead, args=(True,))

    def blocks(self, count: int) -> contextlib.AbstractContextManager[None]:
        """Leave the cache so many blocks, with nothing in them."""
        return few_blocks(self.llm, count)

    @property
    def block(self) -> int:
        """Tokens of a block of the cache."""
        size: int = self.core.vllm_config.cache_config.block_size
        return size

    def total(self, name: str) -> int:
        """One of vLLM's own counters."""
        return sum(each.value for each in self.llm.get_metrics() if each.name == name and hasattr(each, "value"))

    def prompt(self, tokens: int, vocabulary: int) -> list[int]:
        """Random tokens."""
        return torch.randint(10, vocabulary - 10, (tokens,), generator=self._generator).tolist()

    def ask(
        self, prompts: Sequence[list[int]], new_tokens: int | Sequence[int] = 1, tops: int | None = None, chunk: int = 0
    ) -> tuple[float, list[Answer]]:
        """Milliseconds until all is answered, and the answers. ``chunk``: most rows of a step; 0: the engine's own."""
        self.core.scheduler.max_num_scheduled_tokens = chunk or self.chunk
        counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
        started = time.perf_counter()
        asked: list[Any] = [{"prompt_token_ids": tokens} for tokens in prompts]
        results = self.llm.generate(asked, [_sampling(count, tops) for count in counts], use_tqdm=False)
        return (time.perf_counter() - started) * 1e3, [_answer(result) for result in results]

    def step_by_step(
        self, running: Sequence[list[int]], asked: list[int], chunks: Sequence[int], new_tokens: int, tops: int
    ) -> list[Answer]:
        """The answers to ``asked`` in chunks of given sizes while other requests decode, then to those.

        Each step has one row of every request that decodes, and the chunk.
        """
        engine, scheduler = self.llm.llm_engine, self.core.scheduler
        scheduler.max_num_scheduled_tokens = self.chunk
        names = [f"study-{next(self._names)}" for _ in range(len(running) + 1)]
        others, mine = names[:-1], names[-1]
        done: dict[str, Any] = {}

        def step() -> None:
            done.update({result.request_id: result for result in engine.step() if result.finished})

        for name, tokens in zip(others, running, strict=True):
            engine.add_request(name, {"prompt_token_ids": tokens}, _sampling(len(chunks) + 16, tops))
        for _ in range(4 if others else 0):
            step()
        engine.add_request(mine, {"prompt_token_ids": asked}, _sampling(new_tokens, tops))
        for chunk in chunks:
            scheduler.max_num_scheduled_tokens = len(others) + chunk
            step()
        scheduler.max_num_scheduled_tokens = self.chunk
        while engine.has_unfinished_requests():
            step()
        return [_answer(done[name]) for name in (mine, *others)]

    def both(
        self, run: Callable[[], dict[str, float]], rounds: int, warm: int = 1, control: bool = False
    ) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """What ``run`` measures dense and with triangle layers, in turns, after ``warm`` of each that do not count.

        Which of both is first changes from round to round. With ``control`` both are dense, but switched all the same.
        """
        found: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
        for number in range(rounds + warm):
            for triangle in (False,) if self.off else (False, True) if number % 2 else (True, False):
                self.switch(triangle)
                if control:
                    self.switch(False)
                took = run()
                if number >= warm:
                    found[triangle].append(took)
        return found

    def in_turns(self, run: Callable[[], float], seconds: float, each: int = 2, control: bool = False) -> list[Round]:
        """Milliseconds of ``run``, dense and with triangle layers: rounds one behind the other, for so many seconds.

        A round is ``each`` runs of one kind, twice as many of the other, and as many of the first again, so that what
        changes slowly is in both; which is first changes from round to round. Behind a switch Python's own caches are
        cold, which no server's are: one run there does not count. With ``control`` both are dense, but switched all
        the same.
        """
        rounds: list[Round] = []
        started = time.perf_counter()
        while time.perf_counter() - started < seconds or len(rounds) < 2:
            found: tuple[list[float], list[float]] = ([], [])
            first = bool(len(rounds) % 2)
            for triangle, runs in ((first, each), (not first, 2 * each), (first, each)):
                self.switch(triangle)
                if control:
                    self.switch(False)
                found[triangle].extend([run() for _ in range(runs + 1)][1:])
            rounds.append(found)
        return rounds

    def decoding(
        self, prompts: Sequence[list[int]], pairs: int, steps: int
    ) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """Milliseconds of a decode step of one batch, dense and with triangle layers: blocks of steps, in turns.

        Args:
            prompts: of the requests, which decode all the time.
            pairs: blocks of each kind.
            steps: of a block; a quarter as many before them do not count.
        """
        engine, before = self.llm.llm_engine, max(2, steps // 4)
        self.core.scheduler.max_num_scheduled_tokens = self.chunk
        names = [f"study-{next(self._names)}" for _ in prompts]
        most = 8 + 2 * pairs * (steps + before)
        for name, tokens in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": tokens}, _sampling(most + 8, None))
        for _ in range(8):
            engine.step()
        found: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
        for number in range(pairs):
            for triangle in (False, True) if number % 2 else (True, False):
                self.switch(triangle)
                for _ in range(before):
                    engine.step()
                started = time.perf_counter()
                for _ in range(steps):
                    engine.step()
                found[triangle].append({"ms": (time.perf_counter() - started) * 1e3 / steps})
        while engine.has_unfinished_requests():
            engine.step()
        return found

    def compared(self, what: str, found: tuple[list[dict[str, float]], list[dict[str, float]]], **more: Any) -> dict:
        """A record of :meth:`both`: medians, the range of the time ``ms``, and the ratios of pairs."""
        dense, triangle = found
        record = {"what": what, "runner": self.runner + (" without the plugin" if self.off else ""), **more}
        record |= {"rounds": len(dense)}
        for prefix, runs in (("dense_", dense), ("", triangle)):
            if not runs:
                continue
            record |= {f"{prefix}{name}": statistics.median(run[name] for run in runs) for name in runs[0]}
            times = [run["ms"] for run in runs]
            record[f"{prefix}range_ms"] = [min(times), max(times)]
        if triangle:
            record["speedup"] = record["dense_ms"] / record["ms"]
            record |= of_pairs([one["ms"] / other["ms"] for one, other in zip(dense, triangle, strict=True)])
        return record

    def compared_in_turns(self, what: str, rounds: list[Round], **more: Any) -> dict[str, Any]:
        """A record of :meth:`in_turns`: medians, ranges, and the ratio of the medians."""
        record = {"what": what, "runner": self.runner + (" without the plugin" if self.off else ""), **more}
        record |= {"rounds": len(rounds), "runs": sum(len(one) for one, _ in rounds)}
        for prefix, times in zip(("dense_", ""), zip(*rounds, strict=True), strict=True):
            runs = list(itertools.chain.from_iterable(times))
            record |= {f"{prefix}ms": statistics.median(runs), f"{prefix}range_ms": [min(runs), max(runs)]}
        return record | {"speedup": record["dense_ms"] / record["ms"]} | of_rounds(rounds)


def _sampling(new_tokens: int, tops: int | None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=tops)


def _answer(result: Any) -> Answer:
    output, times = result.outputs[0], result.metrics
    tops = [{token: each.logprob for token, each in step.items()} for step in output.logprobs or ()]
    decoding = times.last_token_ts - times.first_token_ts if times else 0.0
    return Answer(list(output.token_ids), tops, result.num_cached_tokens or 0, decoding)


# In a worker


def _runner(worker: Any) -> Any:
    return worker.model_runner


def _connect(worker: Any) -> None:
    _runner(worker).profile_run()


def _builders(worker: Any) -> list[Any]:
    groups = itertools.chain.from_iterable(_runner(worker).attn_groups)
    return [builder for group in groups for builder in group.metadata_builders]


def _state(worker: Any) -> dict[str, Any]:
    runner, builders = _runner(worker), _builders(worker)
    found: dict[str, Any] = {"runner": "V2" if ".gpu." in type(runner).__module__ else "V1"}
    found["builders"] = sorted({type(each).__module__ for each in builders})
    active = next((each.active for each in builders if getattr(each, "active", None)), None)
    if active is not None:
        found |= {"limit": active.limit, "prepared": active.prepared, "counts": str(active.counts)}
        found |= {"line": active.counts.startup_line(active.lowering)}
    return found


def _switch(worker: Any, triangle: bool) -> None:
    """Put the plugin's methods and functions in place, or vLLM's own: what is between them is all that differs."""
    from tmx_compile.integrations.vllm import hooks

    for builder in _builders(worker):
        kind = type(builder)
        if kind.__module__.startswith("tmx_compile."):
            vars(builder).pop("build", None)
            if not triangle:
                builder.build = functools.partial(kind.__bases__[-1].build, builder)
                # As in any step without streaming rows: the layers have vLLM's own function.
                if builder.active is not None:
                    builder.active.follow(False)
    for hook in hooks.HOOKS:
        owner_name, _, name = hook.name.rpartition(".")
        owner = getattr(sys.modules.get(hook.module), owner_name, None)
        kept = f"{_KEPT}_{name}"
        ours = getattr(owner, kept, None) or getattr(owner, name, None)
        if hook.module.startswith("vllm.v1.worker.") and hasattr(ours, "trianglemix_wraps"):
            setattr(owner, kept, ours)
            setattr(owner, name, ours if triangle else ours.trianglemix_wraps)


def _fuse(worker: Any, whole_prompts: bool) -> None:
    for builder in _builders(worker):
        if getattr(type(builder), "whole_prompts", False):
            builder.whole_prompts = whole_prompts


def _look_ahead(worker: Any, on: bool) -> None:
    from tmx_compile.integrations.vllm import lengths

    kept = getattr(lengths.is_no_decode_step, _KEPT, lengths.is_no_decode_step)

    def never(*_: Any) -> bool:
        return False

    setattr(never, _KEPT, kept)
    lengths.is_no_decode_step = kept if on else never  # type: ignore[assignment]


def _calm(worker: Any) -> None:
    from studies.vllm_model import calm

    calm(dict(_runner(worker).get_model().named_parameters()))


def _last(worker: Any, count: int) -> int:
    import dataclasses

    before = 0
    for active in {
        id(each.active): each.active for each in _builders(worker) if getattr(each, "active", None)
    }.values():
        before = active.geometry.last
        active.geometry = dataclasses.replace(active.geometry, last=count)
    return before
