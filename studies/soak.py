"""Five hundred mixed prompts through one model, compiled and switched: graphs, memory, and every answer.

Inductor alone takes the same prompts, for the number of its graphs. Most prompts run the graphs that would go to
Inductor as they are; fewer run its code. Once under Dynamo's own recompile limit, past which the compiled model goes on
uncompiled and the attention implementation keeps it sparse, and once under a limit that no load of this kind reaches.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.common import Case, Parts, Records, cold_compiles, note
from studies.processes import resident_mib
from tests.support.generation import answered, living_tensors
from tmx_compile import TriangleMixConfig, tmx_backend

GRAPHS, CODE = "graphs as left", "Inductor's code"
PARTS = (GRAPHS, CODE)
_SIZES: dict[str, Any] = {"shortest": 20, "longest": 1500, "min_seq_len": 512}
FULL: dict[str, dict[str, Any]] = {
    GRAPHS: {"prompts": 500, "block": 50, **_SIZES},
    CODE: {"prompts": 60, "block": 15, **_SIZES},
}
QUICK = {part: {"prompts": 4, "block": 2, "shortest": 20, "longest": 90, "min_seq_len": 48} for part in PARTS}
GEOMETRY = {"num_sink_tokens": 4, "sliding_window_size": 32, "num_last_tokens": 16}
LAYERS, ANSWERED, SEED = 2, 2, 0
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    # Large enough for attention to matter.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

# Dynamo's own, and one that is not reached.
LIMITS = (8, 64)
OURS = ("uncompiled_dense", "uncompiled_sparse", "largest_difference", "other_tokens")
HELD = ("graphs", "limit_reached", "resident_mib", "tensors")
COLUMNS = ("part", "recompile_limit", "compiler", "prompts", *HELD, *OURS)


def _settings(quick: bool) -> dict[str, Any]:
    return {
        **(QUICK if quick else FULL),
        **GEOMETRY,
        "model": f"Llama, random weights: {SHAPE}",
        "triangle_layers": _config(QUICK[GRAPHS] if quick else FULL[GRAPHS]).layers(),
        "batch": "1 to 3",
        "padding": "on the left of seven prompts in ten, up to half of each sequence",
        "compiled": {
            "inductor": 'model.compile(backend="inductor"); model.generate, greedy',
            "tmx": "model.compile(backend=tmx_backend(config, model=model)) and set_attn_implementation; "
            "model.generate, greedy",
        },
        "compiler": {
            GRAPHS: "none: the graphs that would go to Inductor run as Dynamo or the pass leaves them",
            CODE: "Inductor, one thread, caches off",
        },
        "answered_tokens": ANSWERED,
        "graphs": "so far, as Dynamo counts them",
        "oracle": "the model in float64, uncompiled, under masks written out; rows of the answer see every key",
        "largest_difference": "of any logit of any answered token of any prompt so far",
        "other_tokens": "answered tokens so far whose most likely token is another than the oracle's",
        "tensors": "tensors alive, after a collection",
    }


def _measure(part: str, quick: bool) -> Records:
    plan = (QUICK if quick else FULL)[part]
    records: Records = []
    with _compiler(part):
        for limit in LIMITS:
            with torch._dynamo.config.patch(recompile_limit=limit):
                for load in (alone(plan), ours(plan, _config(plan))):
                    for found in load:
                        records.append({"recompile_limit": limit, **found})
                        note(f"soak: {records[-1]}")
    return records


def _config(plan: dict[str, Any]) -> TriangleMixConfig:
    return TriangleMixConfig.deepest(1, num_layers=LAYERS, min_seq_len=plan["min_seq_len"], **GEOMETRY)


@contextlib.contextmanager
def _compiler(part: str) -> Iterator[None]:
    if part == CODE:
        with torch._inductor.config.patch(compile_threads=1), cold_compiles():
            yield
    else:
        with mock.patch("torch._inductor.compile_fx.compile_fx", lambda gm, *args, **kwargs: gm.forward):
            yield


def _names(quick: bool) -> Sequence[str]:
    return PARTS


def _finish(records: Records) -> None:
    """Every record stands for itself."""


def fresh() -> Any:
    """The model, with equal weights in each call, and Dynamo without graphs and counts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def alone(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record a block of prompts under Inductor alone. Its answers are not compared."""
    model = fresh()
    model.compile(backend="inductor")
    for turn, (ids, mask) in enumerate(prompts(plan), 1):
        answer(model, ids, mask)
        if turn % plan["block"] == 0:
            yield state("inductor", turn) | dict.fromkeys(OURS)


def ours(plan: dict[str, Any], config: TriangleMixConfig) -> Iterator[dict[str, Any]]:
    """A record a block of prompts, each answer compared with the oracle's."""
    from tmx_compile.integrations.transformers import register_attention

    model = fresh()
    oracle = copy.deepcopy(model).double()
    attention = register_attention(config, name="tmx_soak")
    model.set_attn_implementation(attention.name)
    backend = tmx_backend(config, model=model)
    model.compile(backend=backend)
    furthest, changed = 0.0, 0
    for turn, (ids, mask) in enumerate(prompts(plan), 1):
        tokens, logits = answer(model, ids, mask)
        want = true_logits(oracle, config, tokens, mask)
        furthest = max(furthest, float((logits.double() - want).abs().max()))
        changed += int((logits.argmax(-1) != want.argmax(-1)).sum())
        if turn % plan["block"] == 0:
            report = backend.report
            said = (report.uncompiled, report.switched, furthest, changed)
            yield state("tmx", turn) | dict(zip(OURS, said, strict=True))


def state(compiler: str, turn: int) -> dict[str, Any]:
    """What Dynamo and this process hold after so many prompts."""
    counters = torch._dynamo.utils.counters
    return {
        "compiler": compiler,
        "prompts": turn,
        "graphs": counters["stats"]["unique_graphs"],
        "limit_reached": "recompile limit" in str(counters["unimplemented"]),
        "resident_mib": resident_mib(),
        "tensors": len(living_tensors()),
    }


def prompts(plan: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, attention mask) of 1 to 3 sequences of a common length."""
    chance = random.Random(SEED)
    words = torch.Generator().manual_seed(SEED)
    for _ in range(plan["prompts"]):
        batch, tokens = chance.randint(1, 3), chance.randint(plan["shortest"], plan["longest"])
        mask = torch.ones(batch, tokens, dtype=torch.long)
        if chance.random() < 0.7:
            for row in range(batch):
                mask[row, : chance.randint(0, tokens // 2)] = 0
        yield torch.randint(2, SHAPE["vocab_size"], (batch, tokens), generator=words), mask


def answer(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`tests.support.generation.answered`."""
    with warnings.catch_warnings():
        # That the limit is reached is what this is about.
        warnings.filterwarnings("ignore", message=".*recompile_limit")
        return answered(model, ids, mask, ANSWERED)


def true_logits(model: nn.Module, config: TriangleMixConfig, tokens: Tensor, mask: Tensor) -> Tensor:
    """What :func:`answer` should give, (B, T, vocabulary), from a model in float64 that is given whole masks."""
    length, total = mask.shape[1], tokens.shape[1]
    valid = torch.cat([mask, mask.new_ones(mask.shape[0], total - length)], 1).bool()
    row, key = torch.arange(total)[:, None], torch.arange(total)
    dense = (key <= row) & valid[:, None, :] | (key == row)
    start = valid.int().argmax(1)[:, None, None]
    kept = (key < start + config.num_sink_tokens) | (row - key <= config.sliding_window_size)
    kept |= row >= length - config.num_last_tokens
    sparse = dense & kept if length > config.min_seq_len else dense
    model_: Any = model
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            _under(sparse if index in config.layers() else dense), with_kwargs=True
        )
        for index, layer in enumerate(model_.model.layers)
    ]
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    try:
        with torch.no_grad():
            out: Tensor = model_(tokens, position_ids=positions, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return out[:, length - 1 : total - 1]


def _under(mask: Tensor) -> Callable[..., Any]:
    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask[:, None]}

    return before


CASE = Case("soak", "soak.json", None, COLUMNS, Parts(_names, _settings, _measure, _finish))
