"""What a launch of a forward kernel allocates and gets. Importing this module needs Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from tmx_compile.lowering.triton import driver
from tmx_compile.lowering.triton.prepared import Kind, Prepared, allocator, number_of
from tmx_compile.lowering.triton.splits import split_memory
from tmx_compile.operator.layout import strides_by_tokens


class Forward:
    """A launch of one of the forward kernels for calls of one kind.

    Args:
        launch: of the kernel, whose pointers are those of query, key, value, then in one that takes pieces those of key
            and value again and of what the copy engine writes, out, lse, mask, extent, parts, counters, and in one that
            does not, done and sink logits.
        query, value: the kinds of these.
        with_lse: whether the log-sum-exp is written.
        parts: elements of the partial results of all splits; 0 where nothing is split.
        takes_pieces: see ``launch``.
        copies_out: whether the copy engine writes the result; where not, query stands in its place.
    """

    def __init__(
        self,
        launch: Prepared,
        query: Kind,
        value: Kind,
        with_lse: bool,
        parts: int,
        *,
        takes_pieces: bool = False,
        copies_out: bool = False,
    ) -> None:
        batch, heads, q_len, _ = query.shape
        dim = value.shape[3]
        self._launch, self._parts, self._takes_pieces, self._copies_out = launch, parts, takes_pieces, copies_out
        self._allocate, self._device = allocator(query.device), number_of(query.device)
        self._out = (batch, heads, q_len, dim), strides_by_tokens(heads, q_len, dim), query.dtype
        self._lse = ((batch, heads, q_len), (heads * q_len, q_len, 1), torch.float32) if with_lse else None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        extent: Tensor | None = None,
        done: tuple[Tensor, Tensor] | None = None,
        sink_logits: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Launch it with tensors of the kinds that it is for, on the current device.

        Arguments and results are those of :func:`launch.attend`.
        """
        there = None
        if done is not None:
            out, there = done
        elif out is None:
            out = self._allocate(*self._out)
        lse = None if self._lse is None else self._allocate(*self._lse)
        counters = parts = None
        if self._parts:
            counters, parts = split_memory(self._allocate, self._device, self._parts)
        again = self._launch.again
        if again is not None:
            at = query.data_ptr(), key.data_ptr(), value.data_ptr()
            results = (
                out.data_ptr(),
                0 if lse is None else lse.data_ptr(),
                0 if key_mask is None else key_mask.data_ptr(),
                0 if extent is None else extent.data_ptr(),
                0 if parts is None else parts.data_ptr(),
                0 if counters is None else counters.data_ptr(),
            )
            addresses: tuple[int, ...]
            if self._takes_pieces:
                addresses = (*at, at[1], at[2], results[0] if self._copies_out else at[0], *results)
            else:
                of_sinks = 0 if sink_logits is None else sink_logits.data_ptr()
                addresses = (*at, *results, 0 if there is None else there.data_ptr(), of_sinks)
            if again(addresses, driver.stream_of(self._device)):
                return out, lse
        tensors: tuple[Tensor | None, ...]
        if self._takes_pieces:
            copied = out if self._copies_out else query
            tensors = query, key, value, key, value, copied, out, lse, key_mask, extent, parts, counters
        else:
            tensors = query, key, value, out, lse, key_mask, extent, parts, counters, there, sink_logits
        self._launch.by_triton(out, *tensors)
        return out, lse
