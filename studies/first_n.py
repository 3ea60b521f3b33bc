"""What the choice of layers costs in quality: SmolLM2-135M's real weights on English prose."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Case, Measured, note
from benchmarks.models import smollm2
from benchmarks.texts import EVALUATION
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.analysis.choose.direct import divergence

GEOMETRY = {"num_sink_tokens": 4, "sliding_window_size": 32, "num_last_tokens": 64}
LOWERING = "blocked"
FULL: dict[str, Any] = {"texts": 2, "tokens": 3072, "scored": 64, "layers": 30, "sparse": 9, "min_seq_len": 2048}
QUICK: dict[str, Any] = {"texts": 1, "tokens": 320, "scored": 16, "layers": 4, "sparse": 1, "min_seq_len": 256}


def measure(quick: bool) -> Measured:
    from pydoc_data.topics import topics

    plan = QUICK if quick else FULL
    model, tokenizer = smollm2(plan["layers"])
    # One token more than is read: the last scored position has a next token too.
    texts = [
        tokenizer(topics[name], return_tensors="pt").input_ids[:, : plan["tokens"] + 1].clone()
        for name in EVALUATION[: plan["texts"]]
    ]
    short = [name for name, ids in zip(EVALUATION, texts, strict=False) if ids.shape[1] != plan["tokens"] + 1]
    if short:
        raise RuntimeError(f"too short: {', '.join(short)}")
    tokens = torch.cat(texts).numpy().tobytes()
    settings = {
        **plan,
        **GEOMETRY,
        "model": "SmolLM2-135M-Instruct (4-bit weights, computed in float32)",
        "text": "pydoc_data.topics, the beginning of each: " + ", ".join(EVALUATION[: plan["texts"]]),
        "tokens_sha256": hashlib.sha256(tokens).hexdigest()[:16],
        "compiled": f"torch.compile: backend='inductor' for dense, tmx_backend(lowering={LOWERING!r}) for the others",
        "score": f"the last positions ({plan['scored']}), each predicting the next token; all of them are last rows",
        "kl": "KL(dense || sparse) of the next-token distributions, nats, mean over positions and texts",
    }
    reference = _logits(model, texts, (), plan)
    dense = _nll(reference, texts, plan)
    records = []
    for name, layers in _choices(plan).items():
        note(f"first_n: {name}")
        logits = _logits(model, texts, layers, plan) if layers else reference
        nll = _nll(logits, texts, plan)
        cost = statistics.fmean(nll) - statistics.fmean(dense)
        records.append(
            {
                "layers": name,
                "indices": list(layers),
                "nll": statistics.fmean(nll),
                "kl": statistics.fmean(
                    divergence(a.log_softmax(-1), b.log_softmax(-1)) for a, b in zip(reference, logits, strict=True)
                ),
                "perplexity_ratio": math.exp(cost),
                "perplexity_increase": math.exp(cost) - 1,
                "nll_per_text": nll,
            }
        )
    return Measured(settings, records)


def _choices(plan: dict[str, Any]) -> dict[str, Sequence[int]]:
    layers, sparse = plan["layers"], plan["sparse"]
    return {
        "dense": (),
        "first": tuple(range(sparse)),
        "deepest": TriangleMixConfig.deepest(sparse, num_layers=layers).layers(),
    }


def _logits(model: nn.Module, texts: list[Tensor], layers: Sequence[int], plan: dict[str, Any]) -> list[Tensor]:
    """Logits (scored, vocabulary) of every text, with the given layers sparse."""
    torch._dynamo.reset()
    backend: Any = "inductor"
    if layers:
        config = TriangleMixConfig(triangle_layer_indices=layers, min_seq_len=plan["min_seq_len"], **GEOMETRY)
        backend = tmx_backend(config, lowering=LOWERING, strict=True)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        found = [
            compiled(input_ids=ids[:, :-1].contiguous(), use_cache=False, logits_to_keep=plan["scored"]).logits[0]
            for ids in texts
        ]
    if layers and sorted({site.layer for site in backend.report.triangle()}) != sorted(layers):
        raise RuntimeError(f"wanted layers {layers} sparse, got\n{backend.report}")
    return found


def _nll(logits: list[Tensor], texts: list[Tensor], plan: dict[str, Any]) -> list[float]:
    """Mean negative log-likelihood of every text, in nats per token."""
    targets = [ids[0, -plan["scored"] :] for ids in texts]
    return [float(nn.functional.cross_entropy(x, y)) for x, y in zip(logits, targets, strict=True)]


COLUMNS = ("layers", "indices", "nll", "kl", "perplexity_ratio", "perplexity_increase")
CASE = Case("first_n", "first_n.json", measure, COLUMNS)
