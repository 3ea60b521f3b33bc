"""Keep the operator: its eager kernel runs inside the compiled graph. Slower than a kernel, O(N) in memory, general."""

from __future__ import annotations

import operator

from torch.fx import Proxy

from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer
from tmx_compile.operator import OPERATOR
from tmx_compile.report import Accepted, Rejected


class OperatorCall(Lowering):
    """The ``operator`` lowering: takes every call."""

    name = "operator"

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """Always."""
        return Accepted("runs the operator's eager kernel")

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """The operator again, as an opaque call."""
        both = write.call(
            OPERATOR,
            *operands.of_attention,
            *call.geometry.arguments(call.scale, operands.sink_logits, call.softcap),
        )
        out: Proxy = write.call(operator.getitem, both, 0)
        return out
