"""One row after the prompt: every process attends over the keys that it holds, and all get the sum.

The row is the same on every process, and so is what comes of it. Each appends its key to its own cache; the key mask
tells the one process where it counts.
"""

from __future__ import annotations

from typing import Any

from tmx_compile.lowering.base import AttentionCall, Operands, Writer
from tmx_compile.lowering.context_parallel import partial
from tmx_compile.lowering.context_parallel.ranks import Ranks


def attend(write: Writer, ranks: Ranks, call: AttentionCall, operands: Operands) -> Any:
    """Attention (B, H, 1, Dv) of one row over the valid keys of all processes."""
    q, k, v, key_mask = operands.query, operands.key, operands.value, operands.key_mask
    out, lse = partial.causal(write, q, k, v, key_mask, call.scale)
    parts = ranks.all_gather(write, partial.packed(out, lse))
    return partial.merged(*partial.unpacked(parts.reshape(ranks.size, -1), out, lse))
