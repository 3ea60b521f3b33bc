"""A small random Llama, engines on it, and what they must say: the model in float64 with its masks written out."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from studies.vllm_engine import few_blocks

VOCABULARY, LAYERS = 512, 4
GEOMETRY = {"num_sink_tokens": 4, "sliding_window_size": 16, "num_last_tokens": 24}
SETTINGS: dict[str, Any] = GEOMETRY | {
    "triangle_layer_indices": [1, 3],
    "min_seq_len": 64,
    # "auto" would leave such short prompts dense.
    "lowering": "vllm",
    "strict": True,
}
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
    # Scores are sharp enough that the masks show in the results.
    initializer_range=0.25,
    bos_token_id=0,
    eos_token_id=1,
)
NEW_TOKENS, TOP = 8, 10
TOWER = {"": "eager", "vision_config": "eager"}  # how towers for pictures attend
BLOCK = 32  # tokens of a block of the cache
TOLERANCE = 5e-4  # float32 against float64
SHOWS = 1.0  # what the wrong mask makes of the same log-probabilities, at least


def prompts() -> dict[str, list[int]]:
    """By name: long ones, a short one, and some that begin like the first."""
    generator = torch.Generator().manual_seed(1)

    def random(length: int) -> list[int]:
        return torch.randint(10, VOCABULARY, (length,), generator=generator).tolist()

    long, middle, short = random(300), random(177), random(50)
    return {
        "long": long,
        "middle": middle,
        "short": short,
        "fork": long[:200] + random(60),
        # Its last rows lie where rows of "long" streamed.
        "cut": long[:200],
        # Short, with the same beginning.
        "beginning": long[:60],
    }


def make_model(folder: str) -> None:
    """Save the model; its scores are sharp enough that the masks show in the results."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_hybrid(folder: str) -> None:
    """Save a model two of whose layers, 0 and 2, see a sliding window of 40 keys."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SIZES,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=32,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@dataclass
class Answer:
    """What a prompt gets: greedy tokens, log-probabilities of the best ones, and of the prompt's own."""

    tokens: list[int]
    tops: list[dict[int, float]]
    prompt: list[float] | None = None


class Oracle:
    """The model in float64 under its masks, one row of the mask for every row of the prompt.

    Args:
        folder: the model's.
        settings: the plugin's.
        dtype: of the model.
        pictures: what a model with a tower for pictures gets beside every prompt.
    """

    def __init__(
        self,
        folder: str,
        settings: dict[str, Any] = SETTINGS,
        dtype: torch.dtype = torch.float64,
        pictures: dict[str, Any] | None = None,
    ) -> None:
        # A name for each, since the interface is one for all models of a process.
        name = f"masks_of_{id(self)}"
        AttentionInterface.register(name, self._attend)
        kind: Any = AutoModelForCausalLM if pictures is None else AutoModelForImageTextToText
        attention: Any = name if pictures is None else TOWER | {"text_config": name}
        self.model = kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
        self.settings, self.pictures = settings, pictures or {}
        self._prompt, self._layers = 0, ()
        self._known: dict[Any, Answer] = {}

    def _attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[Any, None]:
        rows, keys = query.shape[2], key.shape[2]
        row, column = torch.arange(keys - rows, keys)[:, None], torch.arange(keys)[None, :]
        allowed = column <= row
        if module.layer_idx in self._layers and self._prompt > self.settings["min_seq_len"]:
            sink, window, last = (self.settings[name] for name in GEOMETRY)
            allowed &= (column < sink) | (row - column <= window) | (row >= self._prompt - last)
        own = getattr(module, "sliding_window", None)
        if own is not None:
            allowed &= row - column < own
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    def answer(self, prompt: list[int], layers: tuple[int, ...] | None = None, new_tokens: int = NEW_TOKENS) -> Answer:
        """Greedy decoding; ``layers`` are the triangle layers, those of the settings by default."""
        layers = tuple(self.settings["triangle_layer_indices"]) if layers is None else layers
        known = (tuple(prompt), layers, new_tokens)
        if known not in self._known:
            self._known[known] = self._compute(prompt, layers, new_tokens)
        return self._known[known]

    @torch.no_grad()
    def _compute(self, prompt: list[int], layers: tuple[int, ...], new_tokens: int) -> Answer:
        self._prompt, self._layers = len(prompt), layers
        out = self.model(torch.tensor([prompt]), use_cache=True, **self.pictures)
        logs = out.logits[0].log_softmax(-1)
        answer = Answer([], [], logs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist())
        last = logs[-1]
        for _ in range(new_tokens):
            answer.tops.append(dict(enumerate(last.tolist())))
            answer.tokens.append(int(last.argmax()))
            step = torch.tensor([answer.tokens[-1:]])
            out = self.model(step, past_key_values=out.past_key_values, use_cache=True)
            last = out.logits[0, -1].log_softmax(-1)
        return answer


def gap(mine: Answer, theirs: Answer) -> float:
    """The largest difference of a logarithm of a probability, up to the first token that differs."""
    worst = 0.0
    for place, (one, other) in enumerate(zip(mine.tops, theirs.tops, strict=True)):
        worst = max([worst, *(abs(value - other[token]) for token, value in one.items())])
        if mine.tokens[place] != theirs.tokens[place]:
            break
    if mine.prompt is not None and theirs.prompt is not None:
        worst = max([worst, *(abs(x - y) for x, y in zip(mine.prompt, theirs.prompt, strict=True))])
    return worst


def check(oracle: Oracle, name: str, answer: Answer) -> None:
    """Compare the answer to a prompt with the oracle's, and see that it is not the dense model's."""
    want, dense = oracle.answer(prompts()[name]), oracle.answer(prompts()[name], ())
    assert answer.tokens == want.tokens, name
    assert gap(answer, want) < TOLERANCE, name
    if len(prompts()[name]) > SETTINGS["min_seq_len"]:
        assert gap(answer, dense) > SHOWS, name


class Engine:
    """A vLLM engine in this process."""

    def __init__(self, folder: str, settings: dict[str, Any] | None = SETTINGS, **arguments: Any) -> None:
        from vllm import LLM

        plain: dict[str, Any] = dict(
            dtype="float32",
            max_model_len=512,
            max_num_batched_tokens=512,
            max_num_seqs=8,
            block_size=BLOCK,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_logprobs=TOP,
            disable_log_stats=False,
        )
        if settings is not None:
            plain["additional_config"] = {"trianglemix": settings}
        self.llm = LLM(folder, **plain | arguments)

    @property
    def core(self) -> Any:
        """vLLM's engine core, where the engine runs in this process."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def active(self) -> Any:
        """What the plugin has in the worker; None: nothing."""
        runner = self.core.model_executor.driver_worker.worker.model_runner
        return getattr(runner.vllm_config.compilation_config, "trianglemix", None)

    def ask(
        self, asked: list[Any], *, prompt: bool = False, new_tokens: int = NEW_TOKENS, **sampling: Any
    ) -> tuple[list[Answer], list[int]]:
        """The answers to lists of tokens, or vLLM's own forms; how many of each one's tokens came from the cache."""
        from vllm import SamplingParams

        plain: dict[str, Any] = dict(
            temperature=0,
            max_tokens=new_tokens,
            logprobs=TOP,
            prompt_logprobs=0 if prompt else None,
            ignore_eos=True,
            detokenize=False,
        )
        parameters = SamplingParams(**plain | sampling)
        requests = [each if isinstance(each, dict) else {"prompt_token_ids": each} for each in asked]
        answers, cached = [], []
        for tokens, result in zip(asked, self.llm.generate(requests, parameters, use_tqdm=False), strict=True):
            for output in result.outputs:
                tops = [{token: each.logprob for token, each in step.items()} for step in output.logprobs]
                answers.append(Answer(list(output.token_ids), tops))
            if prompt:
                listed = zip(result.prompt_logprobs[1:], tokens[1:], strict=True)
                answers[-1].prompt = [step[token].logprob for step, token in listed]
            cached.append(result.num_cached_tokens or 0)
        return answers, cached

    @contextlib.contextmanager
    def chunks_of(self, tokens: int) -> Iterator[None]:
        """Let the scheduler take no more rows than this in one step."""
        scheduler = self.core.scheduler
        before = scheduler.max_num_scheduled_tokens
        scheduler.max_num_scheduled_tokens = tokens
        try:
            yield
        finally:
            scheduler.max_num_scheduled_tokens = before

    def blocks(self, count: int) -> contextlib.AbstractContextManager[None]:
        """Leave the cache so many blocks, with nothing in them."""
        return few_blocks(self.llm, count)

    def close(self) -> None:
        """Let go of the model and the cache."""
        del self.llm
        gc.collect()
