"""A small decoder that recalls nearly perfectly over thousands of tokens, trained for the purpose in minutes on a GPU.

    python -m studies.recall_model --minutes 3 --out benchmarks/results/recall

writes the weights (bfloat16) and a record of the training: seed, steps, losses, hardware, accuracy per task and length.
``--quick`` trains nothing worth keeping, anywhere. The tasks are in ``recall_tasks.py``; dense attention throughout.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import note
from studies.recall_tasks import COPY, HOPS, VOCABULARY, Batch, evaluation, training
from tmx_compile.bench.record import hardware, today, versions

SEED = 20260729
TASKS = {**{f"{hops} hops": hops for hops in range(HOPS)}, "copy": COPY}
QUESTIONS = 12
"""Asked at the end of an evaluated sequence: 48 tokens, within any number of last rows that is recommended."""
WEIGHTS, RECORD = "recall-model.safetensors", "recall-model.json"
QUICK_SHAPE = {"layers": 2, "hidden": 96, "heads": 3, "head_dim": 32}
_SHAPE = {"layers": 6, "hidden": 128, "heads": 4, "head_dim": 64}
# (tokens, names of a group, slots for it while names last, accuracy of the worst task from which the next stage is
# worth its cost). To look up at all is learnt from many names and no chains, chains from single names, long sequences
# from short ones.
_CURRICULUM = (
    (256, 1, 4, 0.9),
    (256, 2, 8, 0.9),
    (256, 3, 16, 0.9),
    (1024, 3, 16, 0.95),
    (4096, 3, 16, 0.98),
    (8192, 3, 16, 1.1),
)
_TOKENS_A_STEP = 32768
_RATE = 1e-3
_INITIAL = 0.08
"""Standard deviation of fresh weights, near 1 / sqrt(hidden). With the usual 0.02 the scores of so narrow a model begin
as nearly nothing, and all attention as a mean."""
_THETA = 1e8
"""Half of the rotary frequencies turn by less than a radian over the longest sequence: names match at any distance."""
_BACK, _TURNED, _SHARP = 3, 5, 7.0
"""Heads that begin looking 1 to :data:`_BACK` tokens back, by so many of the fastest frequencies, with this bias."""
_FORGET = 0.03
"""Weight of the last step in the running accuracy, which starts at 0 in each stage."""


def build(shape: dict[str, int] | None = None) -> nn.Module:
    """A Llama of the recall model's shape with fresh weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape or _SHAPE
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape["hidden"],
        intermediate_size=shape["hidden"] * 8 // 3 // 32 * 32,
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
        tie_word_embeddings=False,
        initializer_range=_INITIAL,
        attention_bias=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    _begin(model.model, shape["heads"], shape["head_dim"])
    return model


def _begin(decoder: Any, heads: int, head_dim: int) -> None:
    """Let attention begin as one that can look up.

    What follows a name is found by the token *after* it, which needs to know the token before (induction heads, Olsson
    et al. 2022). So the first heads of the first layer begin as ones that look 1, 2, 3 tokens back whatever is there,
    by their biases. In the later layers keys begin as queries are: a token finds its like. In all layers outputs begin
    as the transpose of values: it passes on what it is. After mimetic initialization (Trockman and Kolter 2023), whose
    outputs have the other sign. All is trained on from there.
    """
    turn = _THETA ** (-torch.arange(0, head_dim, 2) / head_dim)[:_TURNED]
    half = head_dim // 2
    first = decoder.layers[0].self_attn
    with torch.no_grad():
        decoder.embed_tokens.weight.normal_()
        for layer in decoder.layers:
            attention = layer.self_attn
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
            if attention is not first:
                attention.k_proj.weight.copy_(attention.q_proj.weight)
        query, key = (x.bias.view(heads, head_dim) for x in (first.q_proj, first.k_proj))
        for back in range(1, min(_BACK, heads) + 1):
            query[back - 1, :_TURNED] = _SHARP
            # Turned ahead by as many tokens: the scores are highest where the rotation of the distance takes it back.
            key[back - 1, :_TURNED] = _SHARP * torch.cos(back * turn)
            key[back - 1, half : half + _TURNED] = _SHARP * torch.sin(back * turn)


def load(folder: Path) -> nn.Module:
    """The trained model, bfloat16.

    Raises:
        RuntimeError: the folder has no weights.
    """
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise RuntimeError(f"{path} is missing: python -m studies.recall_model trains it, on a GPU")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    model = build(record["shape"]).to(torch.bfloat16)
    model.load_state_dict(load_file(path))
    return model.eval()


def accuracy(model: Any, batch: Batch) -> float:
    """The share of targets that are the most likely token."""
    with torch.no_grad():
        asked = batch.targets >= 0
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[asked]
        return float((model.lm_head(hidden).argmax(-1) == batch.targets[asked]).float().mean())


def _loss(model: Any, layers: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of the targets alone, few positions have one; and the share that is right, of each task (T,).

    NaN for a task that is not asked.
    """
    asked = batch.targets >= 0
    hidden = layers(input_ids=batch.ids, use_cache=False).last_hidden_state[asked]
    logits = model.lm_head(hidden).float()
    targets = batch.targets[asked]
    of_task = F.one_hot(batch.kind[asked], len(TASKS)).float()
    # No matrix product: autocast would round it to bfloat16.
    right = ((logits.argmax(-1) == targets)[:, None] * of_task).sum(0) / of_task.sum(0)
    return F.cross_entropy(logits, targets), right


def train(model: Any, minutes: float, device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Train along the curriculum until the time is over (quick: for four steps); a line for every hundred steps."""
    generator = torch.Generator(device).manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=not quick)
    # One compilation for all lengths; eager mode would spend its time on launching kernels.
    layers: Any = model.model if quick else torch.compile(model.model, dynamic=True)
    curriculum = ((256, 1, 4, 0.0), (512, 3, 16, 1.1)) if quick else _CURRICULUM
    begun, step, stage = time.perf_counter(), 0, 0
    recent = torch.zeros(len(TASKS), device=device)
    log: list[dict[str, Any]] = []
    while (spent := (time.perf_counter() - begun) / 60) < minutes and not (quick and step == 4):
        tokens, names, room, enough = curriculum[stage]
        # Warm up, along a cosine of the whole time, compilation included.
        rate = _RATE * min(1.0, (step + 1) / 200) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * spent / minutes)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = training(2 if quick else _TOKENS_A_STEP // tokens, tokens, generator, names, room)
        with torch.autocast(device.type, torch.bfloat16):
            loss, right = _loss(model, layers, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        recent.lerp_(right, _FORGET)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % (2 if quick else 100):
            continue
        # Only what this stage asks.
        each = {task: share for task, share in zip(TASKS, recent.tolist(), strict=True) if not math.isnan(share)}
        at = {"step": step, "tokens": tokens, "names": names}
        log.append({**at, "loss": float(loss.detach()), "accuracy": each, "minutes": spent})
        said = ", ".join(f"{task} {value:.3f}" for task, value in each.items())
        note(f"recall: step {step}, {tokens} tokens, {names} names, loss {log[-1]['loss']:.3f}, {said}")
        # The worst task: lists are learnt first, and would hide that nothing else is.
        if min(each.values()) >= enough:
            stage += 1
            recent.zero_()
    return log


def evaluate(model: Any, device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Dense accuracy by task and length."""
    records = []
    for tokens in (512,) if quick else (1024, 2048, 4096, 8192):
        for task, hops in TASKS.items():
            generator = torch.Generator(device).manual_seed(SEED + tokens)
            batch = evaluation(2 if quick else 32, tokens, QUESTIONS, hops, generator)
            records.append({"tokens": tokens, "task": task, "accuracy": accuracy(model, batch)})
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.recall_model", description="Train the recall model.")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training")
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights and the record")
    parser.add_argument("--quick", action="store_true", help="a tiny model for a moment: shows that it works")
    options = parser.parse_args(arguments)
    if not options.quick and not torch.cuda.is_available():
        parser.error("training needs a CUDA device, and torch finds none (--quick runs without)")
    from safetensors.torch import save_file

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    shape = dict(QUICK_SHAPE if options.quick else _SHAPE)
    before = hardware()
    model = build(shape).to(device)
    log = train(model, options.minutes, device, options.quick)
    kept: Any = model.to(torch.bfloat16).eval()
    found = evaluate(kept, device, options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: x.cpu().contiguous() for name, x in kept.state_dict().items()}
    save_file(weights, options.out / WEIGHTS)
    record = {
        "command": "python -m studies.recall_model"
        + (" --quick" if options.quick else f" --minutes {options.minutes:g} --out benchmarks/results/recall"),
        "quick": options.quick,
        "date": today(),
        "hardware": before,
        "versions": versions(),
        "seed": SEED,
        "shape": shape,
        "parameters": sum(p.numel() for p in kept.parameters()),
        "accuracy": found,
        "log": log,
    }
    (options.out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for line in found:
        print(f"{line['tokens']:6} tokens, {line['task']}: {line['accuracy']:.3f}")


if __name__ == "__main__":
    main()
