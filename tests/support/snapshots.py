"""The graphs of a tiny model that snapshots show: before the pass, after it, and after a lowering."""

import torch

from tests.support.models import tiny_qwen3
from tmx_compile import TriangleMixConfig
from tmx_compile.graph.nodes import INSERTED
from tmx_compile.testing import attention_nodes, captured_graphs, render_graph, rewritten_graphs

N = 70
CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1], num_sink_tokens=4, sliding_window_size=16, num_last_tokens=8, min_seq_len=10
)


def inputs(padded, mark=False):
    ids = torch.zeros(2, N, dtype=torch.long)
    if not padded:
        return (ids,), {"use_cache": False}
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    if mark:
        torch._dynamo.mark_dynamic(ids, 1)
        torch._dynamo.mark_dynamic(mask, 1)
    return (ids,), {"attention_mask": mask}


def before(padded, mark=False):
    args, kwargs = inputs(padded, mark)
    torch._dynamo.reset()
    with torch.no_grad():
        (gm,) = captured_graphs(tiny_qwen3(2), *args, dynamic=None if mark else False, **kwargs)
    return render_graph(gm, only=attention_nodes(gm))


def after_graph(lowering, padded=False, mark=False, **changes):
    args, kwargs = inputs(padded, mark)
    torch._dynamo.reset()
    config, dynamic = CONFIG.replace(**changes), None if mark else False
    with torch.no_grad():
        (gm,) = rewritten_graphs(tiny_qwen3(2), *args, config=config, lowering=lowering, dynamic=dynamic, **kwargs)
    return gm


def after(lowering, padded=False, mark=False, **changes):
    gm = after_graph(lowering, padded, mark, **changes)
    return render_graph(gm, only=attention_nodes(gm))


def layer_1(gm):
    """The nodes that the triangle layer added."""

    def is_layer_1(node):
        return "layers.1." in str(node.meta.get("nn_module_stack"))

    shown = [node for node in gm.graph.nodes if node.meta.get(INSERTED) and is_layer_1(node)]
    return render_graph(gm, only=shown)


def whole():
    """Whole graphs, not only their attention: whatever a graph may hold."""
    graphs = [
        after_graph("flex", padded=True),
        after_graph("blocked", padded=True, mark=True),
        after_graph("operator", padded=True, mark=True),
        after_graph("reference"),
    ]
    return "\n\n".join(map(render_graph, graphs))
