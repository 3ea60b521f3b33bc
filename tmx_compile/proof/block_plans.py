"""Which block plans of FlexAttention calls can be checked when the graph runs."""

from __future__ import annotations

from tmx_compile.find.site import AttentionSite
from tmx_compile.proof.conclude import Proof
from tmx_compile.report import Reason, Rejected


def checkable(site: AttentionSite, proof: Proof) -> Rejected | None:
    """Whether ``check_blocks`` can check the site's block plan; a refusal where not."""
    if site.block_plan is None:
        return None
    offset = proof.offset
    if proof.promised is not None or proof.positions is not None or (offset is not None and offset.atoms):
        return Rejected(Reason.MASK_UNKNOWN, "a block mask over positions from data cannot be checked", site.node)
    return None
