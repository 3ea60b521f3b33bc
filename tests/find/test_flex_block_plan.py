"""FlexAttention: the check of its block plan."""

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from tests.support.flex_calls import CONFIG, attend, block_mask, causal, check, tensors, triangle
from tests.support.layers import Call, OneLayer
from tmx_compile import tmx_backend
from tmx_compile.graph.nodes import INSERTED
from tmx_compile.operator import OPERATOR


def without(mask, row_block, key_block):
    """The same block mask, one block dropped from its plan."""
    counts, indices = mask.kv_num_blocks.clone(), mask.kv_indices.clone()
    full_counts, full_indices = mask.full_kv_num_blocks.clone(), mask.full_kv_indices.clone()
    for number, listed in ((counts, indices), (full_counts, full_indices)):
        count = int(number[0, 0, row_block])
        kept = [x for x in listed[0, 0, row_block, :count].tolist() if x != key_block]
        number[0, 0, row_block] = len(kept)
        listed[0, 0, row_block, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask.mask_mod,
        seq_lengths=mask.seq_lengths,
    )


def check_dropped(*dropped):
    """The honest plan gives the numbers; the same graph refuses the plan without one block. Returns the report."""
    q, k, v = tensors()
    honest = block_mask(causal, BLOCK_SIZE=32)
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    compiled = torch.compile(OneLayer(attend), backend=backend, dynamic=False)
    check(compiled(q, k, v, honest), q, k, v)
    with pytest.raises(RuntimeError, match="does not list the blocks"):
        compiled(q, k, v, without(honest, *dropped))
    return backend.report


@pytest.mark.parametrize("dropped", [(1, 0), (2, 2)])
def test_a_plan_that_leaves_out_blocks_fails_loudly(dropped, eager):
    """Block-sparse attention, with a mask_mod that does not tell: its kernel reads fewer blocks than the mask has."""
    assert check_dropped(*dropped).graphs == 1


def test_a_plan_for_another_mask_fails_loudly(eager):
    """Blocks of a bidirectional mask count as attended as a whole, whatever the mask_mod says."""
    mask = block_mask(lambda b, h, row, key: row > -1, BLOCK_SIZE=32)
    mask.mask_mod = causal
    with pytest.raises(RuntimeError, match="does not list the blocks"):
        triangle(attend, (*tensors(), mask))


def test_the_check_survives_inductor():
    check_dropped(1, 0)


def test_layers_that_share_a_block_mask_share_the_check(eager):
    config = CONFIG.replace(triangle_layer_indices=[0, 1, 2])

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Call(attend) for _ in range(3)])

        def forward(self, q, k, v, mask):
            for layer in self.layers:
                q = q + layer(q, k, v, mask)
            return q

    torch.compile(Three(), backend=tmx_backend(config, lowering="operator", strict=True))(
        *tensors(), block_mask(causal)
    )
    nodes = [node for node in eager[-1].graph.nodes if node.meta.get(INSERTED)]
    assert sum(node.target is torch._assert_async for node in nodes) == 1
    assert sum(node.target is OPERATOR for node in nodes) == 3
