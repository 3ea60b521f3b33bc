"""Stage 9, close: make bodies of child graphs again, and a graph that can run."""

from __future__ import annotations

from tmx_compile.graph.children import restore
from tmx_compile.passes.plan import Plan


def close(plan: Plan) -> Plan:
    """Nothing of the pass is left in the graph but what it computes."""
    restore(plan.gm)
    plan.gm.recompile()
    return plan
