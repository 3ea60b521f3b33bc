"""The lowering of a graph that holds a piece of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer
from tmx_compile.lowering.context_parallel import halo, heads, padded, step
from tmx_compile.lowering.context_parallel.ranks import Ranks
from tmx_compile.lowering.operator_call import OperatorCall
from tmx_compile.report import Accepted, Reason, Rejected

Choice = Callable[[AttentionCall], "Lowering | Rejected"]


@dataclass(frozen=True)
class ContextParallel:
    """Attention of all tokens of a prompt, or of new ones after it, for the process that holds a piece of the prompt.

    Attributes:
        ranks: the processes.
        choose: what computes a process's own share.
    """

    ranks: Ranks
    choose: Choice
    name: str = "context_parallel"

    def inductor_options(self, call: AttentionCall) -> Mapping[str, Any]:
        """What the lowering of its own share needs."""
        lowering = self.choose(call)
        return {} if isinstance(lowering, Rejected) else lowering.inductor_options(call)

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """Whole prompts, and what follows them, for inference."""
        if call.needs_grad:
            return Rejected(Reason.NO_LOWERING, "context_parallel: inference only, and a gradient is asked for")
        if call.documents:
            return Rejected(Reason.NO_LOWERING, "context_parallel: packed documents")
        if _is_prompt(call):
            return Accepted()
        if not call.geometry.is_dense:
            return Rejected(Reason.NO_LOWERING, "context_parallel: a cache holds tokens before this piece")
        if call.geometry.reach is not None:
            # How far a key of another piece is, only the caller knows.
            return Rejected(
                Reason.NO_LOWERING, "context_parallel: a step over a split cache in a layer with a window of its own"
            )
        if call.key_mask is None:
            return Rejected(
                Reason.NO_LOWERING,
                "context_parallel: a step over a split cache needs an attention mask, which tells on which process "
                "the new tokens' keys count",
            )
        return Accepted()

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """Sinks, halo and last rows where that is all a process lacks, else all rows for a share of the heads.

        Of new tokens over a cache: parts over each process's keys.
        """

        def inner(call: AttentionCall, operands: Operands) -> Any:
            lowering = self.choose(call)
            return (OperatorCall() if isinstance(lowering, Rejected) else lowering).emit(write, call, operands)

        if self.ranks.size == 1:
            return cast("Proxy", inner(call, operands))
        form = self.form(call)
        if form == "step":
            return cast("Proxy", step.attend(write, self.ranks, operands, call.scale))
        return cast("Proxy", _FORMS[form](write, self.ranks, call, operands, inner))

    def form(self, call: AttentionCall) -> str:
        """What the processes exchange for a call, in which all have to agree: "step", "heads", "halo" or "padded".

        A halo serves triangle layers whose pieces are surely long enough.
        """
        if not _is_prompt(call):
            return "step"
        geometry = call.geometry
        long = statically_known_true(call.query.shape[2] >= halo.least_piece(geometry))
        if geometry.is_dense or geometry.reach is not None or not long:
            return "heads"
        return "halo" if call.key_mask is None else "padded"


_FORMS = {"heads": heads.attend, "halo": halo.attend, "padded": padded.attend}


def _is_prompt(call: AttentionCall) -> bool:
    """Whether the keys are those of the rows, and no cache holds any before them."""
    return bool(statically_known_true(call.query.shape[2] == call.key.shape[2]))
