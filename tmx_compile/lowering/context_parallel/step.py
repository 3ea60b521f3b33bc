"""New tokens after a prompt that is split: every process attends with them over the keys that it holds.

All processes get the same few tokens, and their keys are appended to every process's piece of the cache. Which of its
keys count on a process is what its key mask says: those of its piece, and the new ones on one process only. So nothing
is known here of where a piece ends. The parts are added up by their log-sum-exp, on every process in the same order:
all go on with the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from tmx_compile.lowering.base import Operands, Writer, length
from tmx_compile.lowering.context_parallel import partial
from tmx_compile.lowering.context_parallel.ranks import Ranks

COUNTED_TWICE = (
    "context_parallel: the key of a new token counts on more than one process: its attention_mask has to be 1 on one "
    "of them and 0 on the others"
)


def attend(write: Writer, ranks: Ranks, operands: Operands, scale: float) -> Any:
    """Attention (B, H, S, Dv) of the last S rows over the keys (B, Hkv, P, D) of all; a key mask (B, P) bool.

    Sends one tensor of the size of the result and its log-sum-exp to every other process.

    Raises:
        RuntimeError: when it runs, on every process: a new token's key counts twice (an assertion of the device).
    """
    q, k, v, key_mask = operands.of_attention
    # Of nothing but the mask, so that all layers of a graph share it.
    counts = ranks.sum(write, key_mask[:, length(key_mask, 1) - length(q, 2) :].to(torch.int32).contiguous())
    part = partial.causal(write, q, k, v, key_mask, scale)
    parts = ranks.all_gather(write, partial.packed(*part))
    write.call(torch._assert_async, (counts.wait() <= 1).all(), COUNTED_TWICE)
    return partial.merged(*partial.unpacked(parts.wait().reshape(ranks.size, -1), *part))
