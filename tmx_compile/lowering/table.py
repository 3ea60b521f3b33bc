"""Which lowering a call gets: by name, or by a measured rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tmx_compile.errors import LoweringError
from tmx_compile.lowering.ascend import Ascend
from tmx_compile.lowering.base import AttentionCall, Lowering
from tmx_compile.lowering.blocked import Blocked
from tmx_compile.lowering.chunk import Chunked
from tmx_compile.lowering.decode import Decode
from tmx_compile.lowering.flex.lowering import Flex
from tmx_compile.lowering.operator_call import OperatorCall
from tmx_compile.lowering.reference import Reference
from tmx_compile.lowering.sdpa import Dense
from tmx_compile.lowering.triton import Triton
from tmx_compile.report import Rejected

TRITON, FLEX, BLOCKED, REFERENCE = Triton(), Flex(), Blocked(), Reference()
OPERATOR, DENSE, DECODE, ASCEND = OperatorCall(), Dense(), Decode(), Ascend()
NAMED: dict[str, Lowering] = {low.name: low for low in (TRITON, FLEX, BLOCKED, REFERENCE, OPERATOR, ASCEND)}
CHOICES = ("auto", *NAMED)
INDUCTOR = "inductor"
TARGETS = ("auto", INDUCTOR, ASCEND.name)
CHUNK_CHOICES = ("auto", TRITON.name, BLOCKED.name, OPERATOR.name)

_FLEX_FROM_WINDOW = {torch.float32: 128, torch.bfloat16: 1 << 31, torch.float16: 1 << 31}


def preference(call: AttentionCall) -> Sequence[Lowering]:
    """The order in which ``auto`` asks, from the measurements in benchmarks/results/operator_{cpu,cuda}.json."""
    if call.query.device.type == "cuda":
        return (TRITON, FLEX, BLOCKED, OPERATOR)
    if call.geometry.window >= _FLEX_FROM_WINDOW.get(call.query.dtype, 1 << 31):
        return (FLEX, BLOCKED, OPERATOR)
    return (BLOCKED, FLEX, OPERATOR)


def select(name: str, call: AttentionCall, *, portable: bool = False, target: str = INDUCTOR) -> Lowering | Rejected:
    """The lowering for a call, or why "auto" has none; ``portable``: "auto" takes none that needs Inductor.

    For the target "ascend" there is one: what the others write, torchair does not convert.

    Raises:
        LoweringError: the lowering that the user named does not support the call; it is never replaced silently.
    """
    if name != "auto":
        answer = NAMED[name].supports(call)
        if isinstance(answer, Rejected):
            raise LoweringError(f"lowering {name!r} cannot take this attention: {answer.detail}")
        return NAMED[name]
    if target == ASCEND.name:
        answer = ASCEND.supports(call)
        return answer if isinstance(answer, Rejected) else ASCEND
    # Run without Inductor, a flex call would form all scores; a package cannot hold a call of Python code.
    asked = [low for low in preference(call) if not (portable and low in (FLEX, TRITON))]
    return next(low for low in asked if not isinstance(low.supports(call), Rejected))


def dense(name: str, call: AttentionCall, *, portable: bool = False, target: str = INDUCTOR) -> Lowering | None:
    """What forms no mask in a layer that stays dense, or None to leave it as it is written.

    On CUDA no SDPA kernel takes causal with padding, and the one that takes any mask is slower than ours without.
    Not in training: our backward is plain PyTorch, made for sparse layers.
    """
    if target == ASCEND.name:
        return None if isinstance(ASCEND.supports(call), Rejected) else ASCEND
    if not isinstance(DENSE.supports(call), Rejected):
        return DENSE
    ours = name in ("auto", TRITON.name) and call.query.device.type == "cuda" and not (portable or call.needs_grad)
    return TRITON if ours and not isinstance(TRITON.supports(call), Rejected) else None


def decode(name: str, call: AttentionCall) -> Lowering:
    """The lowering of one row over sinks and window: its own, whatever is named for prompts, but "operator"."""
    return OPERATOR if name == OPERATOR.name or isinstance(DECODE.supports(call), Rejected) else DECODE


def chunked(name: str, call: AttentionCall, dense_up_to: int, *, streaming: bool) -> Lowering:
    """The lowering of a call that may be a chunk of its prompt, with parts by ``name``.

    Raises:
        LoweringError: the call cannot be a chunk (it is differentiated).
    """
    lowering = Chunked(dense_up_to, streaming, name)
    answer = lowering.supports(call)
    if isinstance(answer, Rejected):
        raise LoweringError(f"chunked_prefill=True cannot take this attention: {answer.detail}")
    return lowering
