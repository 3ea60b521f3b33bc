"""Prompts for calibration from plain text, and a Transformers model by name: what ``tmx calibrate`` needs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmx_compile.analysis.capture.capture import Inputs
from tmx_compile.analysis.capture.samples import Sample
from tmx_compile.config import as_count


def load(name: str, *, dtype: torch.dtype, device: str, gguf_file: str | None = None) -> tuple[nn.Module, Any]:
    """A causal language model of Transformers in evaluation mode, and its tokenizer.

    Args:
        name: a folder, or a name that Transformers finds.
        dtype: of the weights.
        device: where to put them.
        gguf_file: the file in the folder, for weights in that format.

    Raises:
        ValueError: Transformers is not installed, or cannot load the model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError(f"model needs the package transformers: {error}") from None
    where = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **where)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error
    return model.to(device).eval(), tokenizer


def read_texts(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Text files in UTF-8. ``ValueError`` for one that is none, or empty; ``OSError`` for one that cannot be read."""
    texts = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"text must be UTF-8, {os.fspath(path)} is not: {error}") from None
        if not text.strip():
            raise ValueError(f"text must not be empty, {os.fspath(path)} is")
        texts.append(text)
    return texts


def prompts(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, tokens: int, samples: int, keep: int
) -> list[Sample]:
    """Prompts of ``tokens`` tokens out of texts, each with the token that really follows as its answer.

    The texts are joined and cut into pieces that do not overlap; the prompts are spread evenly over them.

    Args:
        model: tells whether it takes ``use_cache`` and ``logits_to_keep``, and where the prompts have to be.
        tokenizer: one of Transformers.
        texts: any number of texts.
        tokens: length of a prompt.
        samples: how many prompts.
        keep: of how many last positions logits are needed.

    Raises:
        ValueError: the texts are too short.
    """
    tokens, samples = as_count("tokens", tokens, minimum=1), as_count("samples", samples, minimum=1)
    extra = call_arguments(model, keep)
    device = next(model.parameters()).device
    return [sample_at(piece, 0, tokens, device, extra) for piece in pieces(tokenizer, texts, tokens + 1, samples)]


def pieces(tokenizer: Any, texts: Sequence[str], tokens: int, samples: int) -> Tensor:
    """Token ids (samples, tokens) out of joined texts: pieces that do not overlap, spread evenly over them.

    ``ValueError`` where the texts are too short.
    """
    ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])
    count = ids.shape[0] // tokens
    if count < samples:
        raise ValueError(
            f"text must hold {samples} pieces of {tokens} tokens, {samples * tokens:,} in all, "
            f"got {ids.shape[0]:,} tokens"
        )
    starts = [i * count // samples * tokens for i in range(samples)]
    return torch.stack([ids[start : start + tokens] for start in starts])


def call_arguments(model: nn.Module, keep: int) -> dict[str, Any]:
    """Arguments that spare a Transformers model work: no cache, and logits of the last ``keep`` positions alone."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in (("use_cache", False), ("logits_to_keep", keep)) if name in known}


def sample_at(ids: Tensor, start: int, tokens: int, device: torch.device, extra: dict[str, Any]) -> Sample:
    """The prompt of ``tokens`` tokens from ``start`` on in ids (N,), and as its answer the token that follows it."""
    piece = ids[start : start + tokens + 1].to(device)
    # Copies: a slice with a storage offset of its own would be another kind of tensor to the compiler.
    return Sample(Inputs(kwargs={"input_ids": piece[None, :-1].clone(), **extra}), piece[-1:].clone())
