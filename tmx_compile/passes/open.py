"""Stages 1 and 9, open and close.

A copy of the graph to work on, its child graphs laid open, and when it writes to which tensor; in the end bodies of
child graphs again, and a graph that can run.
"""

from __future__ import annotations

from dataclasses import replace

from tmx_compile.graph.children import flatten, restore
from tmx_compile.graph.copies import copy_graph
from tmx_compile.graph.erase import drop_unread
from tmx_compile.graph.storages import Storages
from tmx_compile.passes.plan import Plan


def open_graph(plan: Plan) -> Plan:
    """Work on a copy from here on: whoever handed the graph over may still want it as it is."""
    opened = flatten(plan.gm)
    gm = copy_graph(plan.gm) if opened is plan.gm else opened
    if plan.host.compiler == "":
        drop_unread(gm.graph)
    return replace(plan, gm=gm, storages=Storages(gm.graph), limit=plan.config.min_seq_len)


def close(plan: Plan) -> Plan:
    """Nothing of the pass is left in the graph but what it computes."""
    restore(plan.gm)
    plan.gm.recompile()
    return plan
