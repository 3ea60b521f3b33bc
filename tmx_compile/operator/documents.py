"""The operator over packed documents: each is a problem of its own, with its own sinks and last rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator import kernel


@dataclass(frozen=True)
class Document:
    """Where one document's keys and rows are, in one sequence."""

    sequence: slice
    rows: slice
    keys: slice
    valid: Tensor  # (1, keys) bool: the document's own keys
    own: Tensor  # (rows,) bool: the document's own rows


def split(numbers: Tensor, q_len: int) -> Iterator[Document]:
    """The documents of (B, Skv) numbers that have rows and keys; see the operator. Reads the numbers on the host."""
    kv_len = numbers.shape[1]
    offset = kv_len - q_len
    for b in range(numbers.shape[0]):
        for number in torch.unique(numbers[b]).tolist():
            if number <= 0:
                continue
            valid = numbers[b] == number
            mine = numbers[b].abs() == number
            places = mine.nonzero()
            start, end = int(places[0]), int(places[-1]) + 1
            row, row_end = max(0, start - offset), end - offset
            if row_end <= row:
                continue
            yield Document(
                slice(b, b + 1),
                slice(row, row_end),
                slice(start, end),
                valid[None, start:end],
                mine[offset + row : offset + row_end],
            )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Tensor,
    geometry: Geometry,
    scale: float,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`tmx_compile.operator.kernel.forward` over documents."""
    b, h, q_len, _ = query.shape
    out = query.new_zeros(b, q_len, h, value.shape[3]).transpose(1, 2)
    lse = query.new_full((b, h, q_len), float("-inf"), dtype=torch.float32)
    if sink_logits is not None:
        lse = lse.copy_(sink_logits[:, None])
    for document in split(numbers, q_len):
        s, rows, keys = document.sequence, document.rows, document.keys
        part, part_lse = kernel.forward(
            query[s, :, rows],
            key[s, :, keys],
            value[s, :, keys],
            document.valid,
            geometry,
            scale,
            sink_logits,
            softcap,
        )
        out[s, :, rows] = torch.where(document.own[:, None], part, out[s, :, rows])
        lse[s, :, rows] = torch.where(document.own, part_lse, lse[s, :, rows])
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Tensor,
    out: Tensor,
    geometry: Geometry,
    scale: float,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`tmx_compile.operator.kernel.backward` over documents."""
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    for document in split(numbers, query.shape[2]):
        s, rows, keys = document.sequence, document.rows, document.keys
        # A row of another document between this one's took nothing from it.
        own = document.own[:, None]
        parts = kernel.backward(
            grad_out[s, :, rows] * own,
            None if grad_lse is None else grad_lse[s, :, rows] * document.own,
            query[s, :, rows],
            key[s, :, keys],
            value[s, :, keys],
            document.valid,
            out[s, :, rows],
            geometry,
            scale,
            sink_logits,
            softcap,
        )
        for grad, part, where in zip(grads, parts, (rows, keys, keys), strict=True):
            grad[s, :, where] += part
    return grads[0], grads[1], grads[2]
