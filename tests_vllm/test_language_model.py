"""A real language model: SmolLM2-135M reads a long text, half of its layers being triangle layers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from examples import serve_vllm
from examples.serve_vllm import LAYERS, NAME, long_text, make_model
from tests_vllm.support import Engine, Oracle, gap

LENGTH, LAST = 800, 64
SETTINGS: dict[str, Any] = {
    "triangle_layer_indices": list(range(LAYERS // 2, LAYERS)),
    "num_sink_tokens": 8,
    "sliding_window_size": 128,
    "num_last_tokens": LAST,
    "min_seq_len": 512,
    "lowering": "blocked",
    "strict": True,
}


def test_smollm2_answers_as_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 in both: the greedy answer, its probabilities, and what was counted; in chunks."""
    # The example takes another one for a neighbour.
    monkeypatch.syspath_prepend(str(Path(serve_vllm.__file__).parent))
    folder = Path(sys.prefix) / NAME
    if not folder.exists():
        make_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(long_text(folder, LENGTH))["input_ids"]
    engine = Engine(
        str(folder), SETTINGS, max_model_len=1024, max_num_batched_tokens=300, block_size=128, max_num_seqs=2
    )
    (answer,), _ = engine.ask([tokens])
    counts = engine.active.counts
    assert len(counts.report.triangle()) == LAYERS // 2
    assert counts.tokens == {"triangle": len(tokens) - LAST, "dense": LAST + len(answer.tokens) - 1}
    engine.close()
    oracle = Oracle(str(folder), SETTINGS, torch.float32)
    want, dense = oracle.answer(tokens), oracle.answer(tokens, ())
    assert answer.tokens == want.tokens
    assert gap(answer, want) < 2e-3
    assert gap(answer, dense) > 0.1
