"""SDPA's kernels: the ``aten`` operators that it becomes in a graph traced through AOTAutograd or ``make_fx``.

Each computes SDPA and returns a tuple, the result first. The rest of the tuple (log-sum-exp, random state) is for a
backward pass; where something reads it, the call cannot be replaced.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from tmx_compile.find.sdpa import site_of
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.calls import named, schema_arguments
from tmx_compile.report import Reason, Rejected

_NAMES = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
)
ATEN_TARGETS = frozenset(getattr(torch.ops.aten, name).default for name in _NAMES if hasattr(torch.ops.aten, name))

# Which SDPA argument each of theirs is; these decide only what comes back beside the result.
_MASKS = ("attn_mask", "attn_bias")
_ONLY_OUTPUTS = frozenset({"return_debug_mask", "compute_log_sumexp"})


def find_aten(node: Node) -> AttentionSite | Rejected | None:
    """A call of one of SDPA's kernels; the site's node is the first entry of its result."""
    if node.op != "call_function" or node.target not in ATEN_TARGETS:
        return None
    entries: list[Node] = []
    for user in node.users:
        taken = named(user, "getitem")
        if taken is None or not isinstance(taken["index"], int):
            return Rejected(Reason.FORM, f"{user.name} takes the whole tuple", node)
        if taken["index"] == 0:
            entries.append(user)
        elif user.users:
            return Rejected(Reason.FORM, f"{user.name} reads more than the result", node)
    if len(entries) != 1:
        return Rejected(Reason.FORM, f"its result is read {len(entries)} times", node)
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = schema_arguments(node.target, node.args, node.kwargs)
    if arguments.pop("dropout_mask", None) is not None:
        return Rejected(Reason.DROPOUT, "a dropout mask", node)
    masks = [mask for name in _MASKS if (mask := arguments.pop(name, None)) is not None]
    kept = {name: value for name, value in arguments.items() if name not in _ONLY_OUTPUTS}
    return site_of(entries[0], kept | {"attn_mask": masks[0] if masks else None}, "aten")
