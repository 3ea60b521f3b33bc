"""Checks of what users hand to the original API, in its own layout (batch, seq, heads, head_dim)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tmx_compile.legacy.masks import check_inf_dtype
from tmx_compile.operator.triangle import check_alike


def check_tensors(query: Any, key: Any, value: Any) -> None:
    """Raise ``ValueError`` with the values unless the three tensors are one attention problem.

    query is (batch, rows, heads, head_dim), key and value (batch, keys, key heads, head_dim), where value may have a
    head_dim of its own; one floating dtype, one device, and a number of key heads that divides that of the heads.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
    check_alike(query, key, value, "batch, seq, heads, head_dim")
    shapes = f"got shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    if key.shape[0] != query.shape[0] or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"query, key and value must share the batch, key and value the length and the heads: {shapes}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must share the head_dim: {shapes}")
    heads, kv_heads = query.shape[2], key.shape[2]
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"key heads must divide query heads, got {kv_heads} and {heads}")


def check_tensor(name: str, value: Any) -> None:
    """Raise ``ValueError`` where ``value`` is no tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {value!r}")


def as_mask(name: str, mask: Any, query: Tensor, kv_len: int, *, boolean: bool = False) -> Tensor:
    """Return a mask as a view of shape (1 or batch, 1 or heads, rows, keys).

    It may be (rows, keys) or (1 or batch, 1 or heads, rows, keys), on query's device, of any dtype that holds -inf, or
    with ``boolean`` of bool.

    Raises:
        ValueError: anything else, with its shape, dtype or device.
    """
    check_tensor(name, mask)
    if not (boolean and mask.dtype == torch.bool):
        check_inf_dtype(mask.dtype, f"{name}.dtype")
    if mask.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {mask.device}")
    batch, rows, heads = query.shape[:3]
    shape = tuple(mask.shape)
    fits = shape == (rows, kv_len) or (
        len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (rows, kv_len)
    )
    if not fits:
        raise ValueError(
            f"{name} must be (rows, keys) = ({rows}, {kv_len}) or (1 or {batch}, 1 or {heads}, {rows}, {kv_len}), "
            f"got shape {shape}"
        )
    view: Tensor = mask if mask.dim() == 4 else mask[None, None]
    return view


def as_scale(scale: Any) -> float:
    """Return ``scale`` as a float; ``ValueError`` where it is no finite number."""
    if isinstance(scale, (bool, Tensor)) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return float(scale)
