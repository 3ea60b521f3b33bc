"""The run-time check that the blocks of a FlexAttention call agree with its mask.

The kernel reads only the blocks that the plan lists, whatever ``mask_mod`` says; a block mask that is an input of the
graph is not known when it is compiled. The check costs O(tokens + blocks^2), once for all layers that share the mask.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from tmx_compile.find.site import AttentionSite
from tmx_compile.operator.block_plan import MESSAGE, PLAN_HOLDS
from tmx_compile.passes.emit import Emitter
from tmx_compile.proof.conclude import Proof


def check_blocks(emit: Emitter, site: AttentionSite, proof: Proof, key_mask: Node | None) -> None:
    """Insert the check of a site's block plan at the emitter's place; a no-op for a site without one.

    Args:
        emit: inserts before the site.
        site: a site of which :func:`checkable` says that it is.
        proof: what was proven about its mask.
        key_mask: the operator's key mask for that proof, (B, at most Skv) bool or numbers of documents.
    """
    plan = site.block_plan
    if plan is None:
        return
    partial = map(emit.source, plan.partial)
    full: tuple[Any, Any] = (
        (None, None) if plan.full is None else (emit.source(plan.full[0]), emit.source(plan.full[1]))
    )
    q_len, kv_len = emit.q_len(), emit.kv_len()
    if proof.offset is None:
        first_row = emit.arithmetic(operator.sub, kv_len, q_len)
    else:
        first_row = emit.expression(proof.offset.const)
    holds = emit.call(
        PLAN_HOLDS,
        *partial,
        *full,
        key_mask,
        q_len,
        kv_len,
        first_row,
        plan.rows,
        plan.keys,
        proof.reach,
    )
    emit.call(torch._assert_async, holds, MESSAGE)
