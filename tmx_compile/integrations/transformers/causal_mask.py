"""What Transformers' mask functions hand to attention layers in place of a mask of all rows and keys.

Registered as a mask interface, :func:`causal_mask` answers for causal masks, with padding and with a layer's own
sliding window, in O(N); for every other mask it gives what ``sdpa`` would get.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MODEL_MAPPING
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_overlay,
)

from tmx_compile.integrations.transformers.packed import is_packed, numbers_of


@dataclass(eq=False)
class CausalMask:
    """A mask in words: row i attends to key j where j <= first_row + i, the key is valid, and the window reaches it.

    Nothing else makes one, so that a layer that is given one knows its mask. Whatever else a model does with it (an
    index, a sum) is done to the boolean mask of shape (B, 1, rows, keys), which is written out then.

    Attributes:
        shape: (B, 1, rows, keys), of the mask that is not written out.
        key_mask: (B, keys) bool, True for a key that may be attended; or int64, the numbers of packed sequences, from 1
            on: a row attends keys of its own; None: all.
        first_row: the place of row 0 among the keys.
        first_key: the position of the first key in the sequence: not 0 where a cache has let go of what was before.
        window: how many keys, its own included, the layer lets a row see; None: all.
        write: writes the mask out as ``sdpa_mask`` does, for the rows from its second argument on; the first tells
            whether the answer may be None (causal).
    """

    shape: tuple[int, int, int, int]
    key_mask: Tensor | None
    first_row: int
    first_key: int
    window: int | None
    write: Callable[[bool, int], Tensor | None]
    _written: dict[torch.device, Tensor | None] = field(default_factory=dict)

    ndim = 4

    @property
    def is_packed(self) -> bool:
        """Whether the key mask numbers packed sequences."""
        return self.key_mask is not None and self.key_mask.dtype != torch.bool

    def for_sdpa(self, device: torch.device) -> Tensor | None:
        """The mask that Transformers gives its ``sdpa`` attention, None where it gives none; shared by all layers."""
        if torch.compiler.is_compiling():
            # A change of this object would be a side effect of the graph; equal masks become one there anyway.
            return self.write(True, 0)
        if device not in self._written:
            written = self.write(True, 0)
            self._written[device] = None if written is None else written.to(device)
        return self._written[device]

    def to(self, *args: Any, **kwargs: Any) -> CausalMask:
        """Itself: a layer moves what it needs to its own device."""
        return self

    def contiguous(self) -> CausalMask:
        """Itself."""
        return self

    def _out(self) -> Tensor:
        return self._rows_from(0)

    def _rows_from(self, first: int) -> Tensor:
        written = self.write(False, first)
        assert written is not None
        return written

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._out(), name)

    def __getitem__(self, index: Any) -> CausalMask | Tensor:
        last = index[2] if isinstance(index, tuple) and len(index) == 4 else None
        if isinstance(last, slice) and all(index[i] == slice(None) for i in (0, 1, 3)):
            first, end, step = last.indices(self.shape[2])
            if (end, step) == (self.shape[2], 1):
                return self if first == 0 else self._rows_from(first)
        return self._out()[index]

    def __and__(self, other: Any) -> Tensor:
        joined: Tensor = self._out().bitwise_and(other)
        return joined

    def __or__(self, other: Any) -> Tensor:
        joined: Tensor = self._out().bitwise_or(other)
        return joined

    def __invert__(self) -> Tensor:
        return ~self._out()

    def __add__(self, other: Any) -> Tensor:
        joined: Tensor = self._out() + other
        return joined

    def __mul__(self, other: Any) -> Tensor:
        joined: Tensor = self._out() * other
        return joined

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            return x._out() if isinstance(x, CausalMask) else x

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        return function(*args, **kwargs)


def causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **settings: Any,
) -> CausalMask | Tensor | None:
    """Transformers' mask interface; the arguments are those of its ``sdpa_mask``.

    Returns:
        A :class:`CausalMask` for several rows whose mask is causal and-ed with padding, or with a sliding window too,
        or causal in packed sequences; for everything else, and where a model asks for the mask itself, what
        ``sdpa_mask`` returns.

    Raises:
        ValueError: for a model with attention of its own, which would read the mask in its own way.
    """
    if not torch.compiler.is_compiling():
        kind: Any = type(settings.get("config"))
        _check_model(kind)
    if isinstance(attention_mask, CausalMask):
        # Made before the call of the model, as generate does it for static caches.
        return attention_mask

    def write(skip: bool, first: int) -> Tensor | None:
        written: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length - first,
            kv_length=kv_length,
            q_offset=q_offset + first,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=skip and allow_is_causal_skip,
            **settings,
        )
        return written

    # The plain function is the rule, and quickly told from others.
    alone = q_length > 1 and attention_mask is None and q_length == kv_length
    if alone and mask_function is not causal_mask_function and is_packed(mask_function):
        numbers = numbers_of(mask_function, batch_size, q_length, settings.get("device"))
        return CausalMask((batch_size, 1, q_length, kv_length), numbers, 0, 0, None, write)
    shown = _without_blocks(mask_function)
    # Such a mask is always written out, for the blocks; every other one because the model asks for it.
    wanted = not allow_is_causal_skip and shown is mask_function
    window = None if shown is causal_mask_function else _window(shown)
    plain = window is not None or shown is causal_mask_function
    padding = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)
    if q_length == 1 or wanted or not plain or not padding:
        return write(True, 0)
    if isinstance(q_offset, Tensor):
        if torch.compiler.is_compiling():
            return write(True, 0)
        # A static cache counts in place: what is written later has to know where it stood now.
        q_offset = int(q_offset)
    key_mask = None
    if attention_mask is not None:
        last = kv_offset + kv_length
        key_mask = F.pad(attention_mask, (0, max(0, last - attention_mask.shape[1])))[:, kv_offset:last].bool()
        if not torch.compiler.is_compiling() and bool(key_mask[:, : q_offset - kv_offset + q_length].all()):
            key_mask = None
    shape = (batch_size, 1, q_length, kv_length)
    return CausalMask(shape, key_mask, q_offset - kv_offset, kv_offset, window, write)


@functools.cache
def _check_model(config: type) -> None:
    """Refuse models in whose attention an implementation by name has no place; Transformers itself lets them by."""
    models = MODEL_MAPPING.get(config, ())
    for model in models if isinstance(models, tuple) else (models,):
        if not model._can_set_attn_implementation():
            raise ValueError(f"{model.__name__} has attention of its own, which attn_implementation does not reach")


def _without_blocks(mask_function: Callable[..., Any]) -> Callable[..., Any]:
    """The mask function without blocks that see both ways (images' tokens) where a prompt has no such block."""
    # Dynamo does not look into functions.
    if torch.compiler.is_compiling():
        return mask_function
    if parts := _joined(mask_function, and_masks):
        # A model of images has its window around the blocks.
        kept = tuple(_without_blocks(part) for part in parts)
        return mask_function if kept == parts else and_masks(*kept)
    parts = _joined(mask_function, or_masks)
    if len(parts) != 2 or not _same_code(parts[1], blockwise_overlay(torch.empty(0))):
        return mask_function
    (blocks,) = _cells(parts[1])
    return parts[0] if bool((blocks < 0).all()) else mask_function


def _window(mask_function: Callable[..., Any]) -> int | None:
    """The size of a sliding window, its own key included, where a mask function is that of one; else None."""
    if torch.compiler.is_compiling():
        return None
    overlays = [part for part in _joined(mask_function, and_masks) if part is not causal_mask_function]
    if len(overlays) != 1 or not _same_code(overlays[0], sliding_window_overlay(1)):
        return None
    (window,) = _cells(overlays[0])
    return window if type(window) is int else None


def _joined(mask_function: Callable[..., Any], join: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The functions that ``and_masks`` or ``or_masks`` has joined; none where it was not the one."""
    if not _same_code(mask_function, join()):
        return ()
    (parts,) = _cells(mask_function)
    return parts if isinstance(parts, tuple) else ()


def _same_code(a: Any, b: Any) -> bool:
    code = getattr(a, "__code__", None)
    return code is not None and code is getattr(b, "__code__", None)


def _cells(function: Any) -> tuple[Any, ...]:
    return tuple(cell.cell_contents for cell in function.__closure__ or ())
