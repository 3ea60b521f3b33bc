"""Which lowering a call gets: one table by place and role, from measurements; or the one that the user names."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tmx_compile.errors import LoweringError
from tmx_compile.lowering.ascend import Ascend
from tmx_compile.lowering.base import AttentionCall, Lowering
from tmx_compile.lowering.blocked import Blocked
from tmx_compile.lowering.chunk import Chunked
from tmx_compile.lowering.decode import Decode
from tmx_compile.lowering.fa4 import FlashAttention4
from tmx_compile.lowering.flex import Flex
from tmx_compile.lowering.operator_call import OperatorCall
from tmx_compile.lowering.reference import Reference
from tmx_compile.lowering.sdpa import Dense
from tmx_compile.lowering.triton import Triton
from tmx_compile.report import Reason, Rejected

TRITON, FLEX, BLOCKED, REFERENCE = Triton(), Flex(), Blocked(), Reference()
OPERATOR, DENSE, FA4, DECODE, ASCEND = OperatorCall(), Dense(), FlashAttention4(), Decode(), Ascend()
NAMED: dict[str, Lowering] = {low.name: low for low in (TRITON, FLEX, BLOCKED, REFERENCE, OPERATOR, ASCEND)}
LOWERINGS = ("auto", *NAMED)
CHUNK_LOWERINGS = ("auto", TRITON.name, BLOCKED.name, OPERATOR.name)


class Role(enum.Enum):
    """What the rows of a site are."""

    PROMPT = "a whole prompt"
    CHUNK = "a chunk of a prompt, or a whole one"
    ROW_OF_PROMPT = "one row, and a chunk of a prompt"
    STEP = "one row: a decode step, which stays dense"
    STREAM = "a decode step over sinks and window"
    MASKLESS = "dense, without forming its mask"
    FASTER = "dense, by a faster kernel than SDPA's"

    @property
    def shows_own_key(self) -> bool:
        """Whether it is one row whose own key has to be shown to join the keys."""
        return self in (Role.STREAM, Role.ROW_OF_PROMPT)

    @property
    def is_chunk(self) -> bool:
        """Whether the graph learns only when it runs where its prompt ends."""
        return self in (Role.CHUNK, Role.ROW_OF_PROMPT)


@dataclass(frozen=True)
class Wish:
    """What the choice depends on beside the call.

    Attributes:
        named: the user's lowering, or "auto".
        limit: prompts of at most this length stay dense.
        streaming: whether decode steps stream.
    """

    named: str = "auto"
    limit: int = 0
    streaming: bool = False


# In the order in which they are asked: benchmarks/results/operator_{cpu,cuda}.json. "portable" is a graph that is
# handed back: run without Inductor, a flex call would form all scores; a package cannot hold a call of Python code.
_TABLE: Mapping[tuple[str, Role], tuple[Lowering, ...]] = {
    ("cpu", Role.PROMPT): (BLOCKED, FLEX, OPERATOR),
    ("cuda", Role.PROMPT): (TRITON, FLEX, BLOCKED, OPERATOR),
    ("portable", Role.PROMPT): (BLOCKED, OPERATOR),
    # What the others write, torchair does not convert.
    ("ascend", Role.PROMPT): (ASCEND,),
    # No graph at all, or one node in a graph that somebody else compiles.
    ("eager cpu", Role.PROMPT): (BLOCKED, OPERATOR),
    ("eager cuda", Role.PROMPT): (TRITON, BLOCKED, OPERATOR),
    ("node cpu", Role.PROMPT): (OPERATOR,),
    ("node cuda", Role.PROMPT): (TRITON, OPERATOR),
    ("cpu", Role.STREAM): (DECODE, OPERATOR),
    ("cuda", Role.STREAM): (DECODE, OPERATOR),
    ("cpu", Role.MASKLESS): (DENSE,),
    # No SDPA kernel takes causal with padding there, and the one that takes any mask is slower than ours without.
    ("cuda", Role.MASKLESS): (FA4, DENSE, TRITON),
    ("cuda", Role.FASTER): (FA4,),
    ("portable", Role.MASKLESS): (DENSE,),
    ("ascend", Role.MASKLESS): (ASCEND,),
}
# On a CPU flex leads from these windows on.
_FLEX_FROM_WINDOW = {torch.float32: 128}


def candidates(place: str, role: Role, call: AttentionCall, wish: Wish) -> tuple[Lowering, ...]:
    """The lowerings to ask for a call, in order."""
    if role is Role.PROMPT and wish.named != "auto":
        return (NAMED[wish.named],)
    if role is Role.STREAM and wish.named == OPERATOR.name:
        return (OPERATOR,)
    if role.is_chunk:
        # Of parts that it picks, or that the user names, when it is written.
        return (Chunked(wish.limit, wish.streaming, wish.named),)
    asked = _TABLE.get((place, role), ())
    if (place, role) == ("cpu", Role.PROMPT):
        from_window = _FLEX_FROM_WINDOW.get(call.query.dtype)
        wide = from_window is not None and call.geometry.window >= from_window
        return (FLEX, BLOCKED, OPERATOR) if wide else asked
    if role in (Role.MASKLESS, Role.FASTER) and (call.needs_grad or wish.named not in ("auto", TRITON.name)):
        # In training nobody measured them against the SDPA kernel that takes any mask.
        return tuple(low for low in asked if low not in (TRITON, FA4))
    return asked


def choose(place: str, role: Role, call: AttentionCall, wish: Wish) -> Lowering | Rejected:
    """The lowering for a call, or why it has none and stays as it is written.

    Args:
        place: what compiles the graph, and where: "cpu", "cuda", "portable" or "ascend"; "eager cpu",
            "eager cuda": nothing does; "node cpu", "node cuda": somebody else, for whom one node is to do it.
        role: what the call's rows are.
        call: fake tensors and constants.
        wish: what else the choice depends on.

    Raises:
        LoweringError: what the user named, or asked for, cannot take the call; it is never replaced silently.
    """
    refused = Rejected(Reason.NO_LOWERING, f"{role.value}: nothing on {place}")
    for lowering in candidates(place, role, call, wish):
        answer = lowering.supports(call)
        if not isinstance(answer, Rejected):
            return lowering
        refused = answer
    if role.is_chunk:
        raise LoweringError(f"chunked_prefill=True cannot take this attention: {refused.detail}")
    if role is Role.PROMPT and wish.named != "auto":
        raise LoweringError(f"lowering {wish.named!r} cannot take this attention: {refused.detail}")
    return refused
