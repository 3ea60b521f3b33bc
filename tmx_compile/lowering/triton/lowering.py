"""The ``triton`` lowering: one call of a purpose-built GPU kernel. Imports without Triton."""

from __future__ import annotations

import functools
import importlib.util
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall, Operands, Writer, immediate, length
from tmx_compile.lowering.triton.op import TRAINING_OPERATOR, TRITON_OPERATOR
from tmx_compile.report import Accepted, Reason, Rejected

MAX_HEAD_DIM = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Triton:
    """The ``triton`` lowering: NVIDIA GPUs from Ampere on."""

    name = "triton"

    def inductor_options(self, call: AttentionCall) -> Mapping[str, Any]:
        """None: to Inductor the call is opaque."""
        return {}

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """What the kernels take, and whether Triton and a GPU for it are there."""
        why = self._why_not(call)
        return Accepted() if why is None else Rejected(Reason.NO_LOWERING, f"triton: {why}")

    def _why_not(self, call: AttentionCall) -> str | None:
        query, value = call.query, call.value
        dims = query.shape[3], value.shape[3]
        if call.documents:
            return "packed documents"
        if query.dtype not in _DTYPES:
            return f"{query.dtype} is not bfloat16, float16 or float32"
        if not all(isinstance(x, int) and 0 < x <= MAX_HEAD_DIM for x in dims):
            return f"head dims {dims[0]} and {dims[1]} are not from 1 to {MAX_HEAD_DIM}"
        if 0 in query.shape:
            return "an empty tensor"
        if not 0 < call.scale < math.inf:
            return f"scale={call.scale} is not positive and finite"
        why: str | None = missing(query.device)
        return why

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """The extents of padded sequences as ordinary nodes, shared by all layers, and one call."""
        extent = None
        if operands.key_mask is not None:
            extent = extents(operands.key_mask, length(operands.key, 2), call.geometry.last)
        made = write.call(
            TRAINING_OPERATOR if call.needs_grad else TRITON_OPERATOR,
            *operands.of_attention,
            extent,
            *call.geometry.arguments(call.scale, operands.sink_logits, call.softcap),
        )
        return write.call(operator.getitem, made, 0) if call.needs_grad else made


def attend(call: AttentionCall) -> Tensor | Rejected:
    """The attention (B, H, Sq, Dv) of a call of real tensors, or why the kernels cannot take it."""
    answer = Triton().supports(call)
    if isinstance(answer, Rejected):
        return answer
    return immediate(Triton(), call)


def extents(key_mask: Any, kv_len: Any, last: int) -> Any:
    """(B, 3) int32 of a (B, Skv) bool mask: first valid key, one past the last, whether a key between is masked.

    Where all rows are last rows, those behind the last valid key too, the extent goes on to the last key.
    """
    where = rows.last_extent(rows.extent(key_mask, kv_len), kv_len, last)
    holes = (where.end - where.start) != key_mask.sum(1, keepdim=True)
    return torch.cat([where.start, where.end, holes.to(torch.int64)], 1).to(torch.int32)


# Dynamo asks while it traces a model that calls attention by itself; it cannot look into Triton.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing(device: torch.device) -> str | None:
    """What the kernels lack to run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        if device.type == "cpu" and _interpreted():
            return None
        return f"written for NVIDIA GPUs, got {device.type}"
    if torch.version.hip is not None:
        return "written for NVIDIA GPUs, this is an AMD build of PyTorch"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere)"
    return None


@functools.cache
def _interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 makes Triton run kernels on the CPU: for tests."""
    import triton

    return bool(triton.knobs.runtime.interpret)
