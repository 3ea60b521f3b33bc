"""What the programs share: a tiny model, a prompt, and what a client computed held against masks written out."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models import attentions as attentions
from tests.support.models import tiny_qwen3
from tests.support.oracle import attended
from tmx_compile import TmxBackend, TriangleMixConfig

LAYERS, TOKENS, VOCABULARY = 3, 300, 128
CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1, 2], num_sink_tokens=4, sliding_window_size=32, num_last_tokens=16, min_seq_len=128
)
# Of float32, relative to the largest number; and how much more than that the triangle has to change.
TOLERANCE, CHANGE = 2e-4, 20

# What the package says where layers stay dense.
_OURS = re.compile("went sparse|ran uncompiled")

Result = dict[str, Any]


def qwen3(**changes: Any) -> Any:
    """Random weights, large enough for attention to matter."""
    return tiny_qwen3(layers=LAYERS, initializer_range=0.2, pad_token_id=0, eos_token_id=None, **changes)


def prompt(batch: int = 1, tokens: int = TOKENS) -> Tensor:
    """(batch, tokens) random ids, always the same."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(5))


def tokenizer() -> Any:
    """Words w3 to w127 and three of its own, for clients that want text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    vocabulary = [*special.values(), *(f"w{i}" for i in range(3, VOCABULARY))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def text(count: int = 1) -> list[str]:
    """As many prompts in the tokenizer's words."""
    return [" ".join(f"w{i}" for i in row) for row in prompt(count).tolist()]


def generated(model: Any, **settings: Any) -> Tensor:
    """(steps, vocabulary) logits of a greedy ``generate``."""
    settings = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True) | settings
    return torch.cat(model.generate(prompt(), **settings).logits)


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Of every weight that learns, in one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def compared(
    call: Callable[[], Tensor],
    holder: Any,
    modules: Sequence[nn.Module] | Mapping[int, nn.Module],
    *,
    switched: Any = None,
    oracle: Callable[[], Tensor] | None = None,
    tolerance: float = TOLERANCE,
    change: float = CHANGE,
) -> Result:
    """Run a client, then the same call uncompiled with the masks written out in float64.

    Args:
        call: the client's call.
        holder: the backend or the registered attention, whose report tells what went sparse.
        modules: the attention of every layer, in order or by its number.
        switched: the model to switch back to ``sdpa`` for the oracle.
        oracle: the call that the oracle makes, where it is another.
        tolerance: the largest error, relative to the largest number.
        change: how many times the error the triangle has to change.
    """
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = call().detach().clone()
    taken = time.perf_counter() - begin
    report = holder.report
    sparse = sorted({layer for site in report.triangle() for layer in site.layers or (site.layer,)})
    reasons = sorted({site.reason for site in report if site.decision != "triangle" and site.reason})
    warned = next((str(warning.message) for warning in told if _OURS.search(str(warning.message))), "")
    found = {"triangle": sparse, "reasons": reasons, "graphs": report.graphs, "seconds": taken, "warned": warned}
    if switched is not None:
        switched.set_attn_implementation("sdpa")
    if isinstance(holder, TmxBackend):
        holder.allow_uncompiled()
    with torch.compiler.set_stance("force_eager"):
        dense = (oracle or call)().detach().clone()
        with written_out(modules, sparse):
            want = (oracle or call)().detach()
    size = want.abs().max().clamp(min=1e-3)
    found |= {"error": float((got - want).abs().max() / size), "change": float((want - dense).abs().max() / size)}
    if found["error"] > tolerance:
        raise AssertionError(f"the numbers are wrong: {found}")
    if sparse and found["change"] < change * found["error"]:
        raise AssertionError(f"the triangle changes nothing: {found}")
    return found


@contextlib.contextmanager
def written_out(modules: Sequence[nn.Module] | Mapping[int, nn.Module], sparse: Sequence[int]) -> Iterator[None]:
    """``F.scaled_dot_product_attention`` as a softmax in float64, with the triangle's mask in the modules named.

    Keys that no row sees (behind the prompt in a static cache, padding) are no keys.
    """
    inside: list[int] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **given: Any) -> Tensor:
        rows, keys = query.shape[-2], key.shape[-2]
        own = torch.ones(1, 1, rows, keys, dtype=torch.bool)
        own = own.tril(keys - rows) if given.get("is_causal") else own
        if attn_mask is not None:
            own = own & (attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4)
        if inside and inside[-1] in sparse and rows > CONFIG.min_seq_len:
            valid = own[:, 0].any(-2)
            end = int(valid.nonzero()[:, -1].max()) + 1
            mask = attended(rows, end, valid[:, :end], *CONFIG.geometry.counts)[:, None]
            own = own & F.pad(mask, (0, keys - end))
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scale = given.get("scale") or query.shape[-1] ** -0.5
        scores = query.double() @ key.double().transpose(-2, -1) * scale
        scores = scores.masked_fill(~own, torch.finfo(torch.float64).min / 2)
        return (scores.softmax(-1) @ value.double()).to(query.dtype)

    hooks = []
    for index, module in modules.items() if isinstance(modules, Mapping) else enumerate(modules):
        hooks.append(module.register_forward_pre_hook(lambda *_, index=index: inside.append(index)))
        hooks.append(module.register_forward_hook(lambda *_: inside.clear(), always_call=True))
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", attend):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def main(package: str, ways: Mapping[str, Callable[[], Result]]) -> None:
    """The command of a program: run its ways and print a record of each as a line of JSON.

    Args:
        package: the client's distribution, whose version is recorded.
        ways: in words, how the client is used.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--inductor", action="store_true", help="to the end; else the pass's graphs run as they are")
    context: Any = contextlib.nullcontext()
    if not parser.parse_args().inductor:
        context = mock.patch("torch._inductor.compile_fx.compile_fx", lambda gm, *args, **kwargs: gm.forward)
    version = importlib.metadata.version(package)
    for way, run in ways.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        record: Result = {"client": package, "version": version, "way": way, "failed": ""}
        try:
            with context:
                record |= run()
        # One way that fails is told, and the others run all the same.
        except Exception as error:
            traceback.print_exc()
            cause = getattr(error, "inner_exception", error)
            record["failed"] = f"{type(cause).__name__}: {cause}".splitlines()[0][:300]
        print(json.dumps(record), flush=True)
