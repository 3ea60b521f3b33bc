"""Block-sparse attention in the place of a dense call: one opaque operator, which chooses its blocks while it runs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Proxy

from tmx_compile.lowering.base import AttentionCall, Operands, Writer
from tmx_compile.lowering.triton.dynamic.op import TRITON_BLOCK_SPARSE
from tmx_compile.lowering.triton.lowering import Triton
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic import BLOCK_SPARSE
from tmx_compile.report import Accepted, Reason, Rejected


@dataclass(frozen=True)
class BlockSparse:
    """In plain PyTorch, for a CPU; takes calls whose every row is a last row, as a dense layer is substituted."""

    selection: Selection
    name: ClassVar[str] = "block-sparse operator"
    operator: ClassVar[OpOverload] = BLOCK_SPARSE

    def inductor_options(self, call: AttentionCall) -> Mapping[str, Any]:
        """None: to Inductor the call is opaque."""
        return {}

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """Inference, causality and padding."""
        why = None
        if call.documents:
            why = "packed documents"
        elif call.geometry.reach is not None:
            why = "a sliding window of the layer's own"
        elif call.needs_grad:
            why = "forward only"
        elif call.dense_up_to is not None:
            why = "one graph for short prompts too"
        return Accepted() if why is None else Rejected(Reason.NO_LOWERING, f"dynamic blocks: {why}")

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """One call; its count of blocks is left for whoever reads it."""
        both = write.call(
            self.operator,
            *operands.of_attention,
            *self.selection.arguments,
            call.scale,
        )
        out: Proxy = write.call(operator.getitem, both, 0)
        return out

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Attention (B, H, Sq, Dv) of a call of real tensors, and (2,) the blocks visited and those of dense."""
        operands = (call.query, call.key, call.value, call.key_mask)
        both: tuple[Tensor, Tensor] = self.operator(*operands, *self.selection.arguments, call.scale)
        return both


class BlockSparseTriton(BlockSparse):
    """By kernels, on an NVIDIA GPU."""

    name = "block-sparse triton"
    operator = TRITON_BLOCK_SPARSE

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """As the ``triton`` lowering, beside what holds for every form."""
        answer = super().supports(call)
        return answer if isinstance(answer, Rejected) else Triton().supports(call)


OPERATORS = (BLOCK_SPARSE, TRITON_BLOCK_SPARSE)
"""What stands in a graph for a dynamic layer: (out, blocks visited and those of dense attention)."""
