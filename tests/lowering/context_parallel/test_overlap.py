"""Collectives of a split prompt are waited for when nothing else is left to do: where waits stand in the graph.

The processes that this one takes part with are torch's fake ones, which send nothing.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.processes import fakes
from tests.support.split import as_written
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.context_parallel import ContextParallel, Ranks
from tmx_compile.lowering.table import Role, Wish, choose
from tmx_compile.lowering.triton.op import TRAINING_OPERATOR
from tmx_compile.mask.geometry import ALL_ROWS, Geometry
from tmx_compile.operator import OPERATOR

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION = (OPERATOR, TRAINING_OPERATOR, F.scaled_dot_product_attention, FLASH)
WAIT = torch.ops._c10d_functional.wait_tensor.default
TRIANGLE = TriangleMixConfig(4, 8, 4, triangle_layer_indices=[0], min_seq_len=64)
DENSE = TRIANGLE.replace(triangle_layer_indices=[1])


class Layer(nn.Module):
    """Attention of rows as heads, with a padding mask that depends on the data, or as a step over what came before."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if self.kind == "plain":
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)
        counts = x[:, 0, :, 0] < 2
        if self.kind == "step":
            row, held = x[:, :, -1:], torch.cat([x, x[:, :, -1:]], 2)
            return F.scaled_dot_product_attention(
                row, held, held, attn_mask=F.pad(counts, (0, 1), value=True)[:, None, None]
            )
        row = torch.arange(x.shape[2])
        mask = (row[:, None] >= row) & counts[:, None, None, :]
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x):
        return self.layers[0](x)


def written(rank, world, config, kind):
    """The graph of one layer."""
    with fakes(rank, world) as mesh, as_written() as graphs:
        backend = tmx_backend(config, context_parallel=mesh, lowering="operator")
        with contextlib.suppress(RuntimeError):
            torch.compile(Net(Layer(kind)), backend=backend, dynamic=False)(torch.randn(1, 8, 100, 16))
    return graphs[0].graph


def could_go_before(graph):
    """(wait, attention) of one layer where attention behind a wait needs neither it nor a later one.

    Nor is anything sent between them for which others may wait.
    """
    nodes = list(graph.nodes)
    place = {node: at for at, node in enumerate(nodes)}
    # Of each node, the last wait that it needs.
    needs = {}
    for node in nodes:
        needs[node] = max((needs[x] for x in node.all_input_nodes), default=-1)
        if node.target is WAIT:
            needs[node] = place[node]
    waits = [place[node] for node in nodes if node.target is WAIT]
    found = [node for node in nodes if node.target in ATTENTION]
    sent = [node for node in nodes if "c10d" in str(node.target) and node.target is not WAIT]
    assert waits
    assert found
    return [
        (nodes[at], node)
        for at in waits
        for node in found
        if place[node] > at > needs[node] and not any(place[node] > place[x] and needs[x] >= at for x in sent)
    ]


@pytest.mark.parametrize("kind", ["plain", "padded", "step"])
@pytest.mark.parametrize("config", [TRIANGLE, DENSE], ids=["triangle", "dense"])
def test_no_wait_stands_before_attention_that_needs_none(config, kind):
    for rank in range(3):
        assert could_go_before(written(rank, 3, config, kind)) == [], rank


def test_last_rows_are_on_their_way_while_the_others_stream():
    """On every process but the first, whose rows stream while it waits for the last ones."""
    for rank in (0, 1, 2):
        nodes = list(written(rank, 3, TRIANGLE, "plain").nodes)
        sent = [at for at, node in enumerate(nodes) if "all_to_all" in str(node.target)]
        attention = [at for at, node in enumerate(nodes) if node.target in ATTENTION]
        waits = [at for at, node in enumerate(nodes) if node.target is WAIT]
        assert (len(sent), len(attention), len(waits)) == (2, 2, 2)
        if rank == 0:
            assert sent[0] < attention[0] < waits[0] < attention[1] < sent[1]
        else:
            assert sent[1] < attention[1] < waits[1]
        if rank == 2:
            assert sent[0] < attention[0] < waits[0]


def test_settings_of_what_computes_a_share():
    """FlexAttention's template on CPUs takes no epilogue: without the setting nothing compiles."""
    with fakes(0, 2) as mesh:
        x = torch.empty(1, 4, 400, 16)
        call = AttentionCall(x, x, x, None, Geometry(4, 128, 8), 0.3, needs_grad=False)
        lowering = choose("cpu", Role.PROMPT, call, Wish(ranks=Ranks.of(mesh)))
        assert isinstance(lowering, ContextParallel)
        assert lowering.inductor_options(call) == {"epilogue_fusion": False}
        call = AttentionCall(x, x, x, None, Geometry(0, 0, ALL_ROWS), 0.3, needs_grad=False)
        assert lowering.inductor_options(call) == {}
