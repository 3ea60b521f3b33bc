"""Attention written out in graphs of aten calls: exported, exported and decomposed, and traced by ``make_fx``."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from tests.support.eager_forms import CONFIG, FORMS, SCALE, N, causal, tensors
from tests.support.graphs import squares
from tests.support.layers import OneLayer
from tests.support.oracle import oracle
from tmx_compile.find import find_attention
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.layer import LayerPath
from tmx_compile.graph.nodes import value_of
from tmx_compile.graph.storages import Storages
from tmx_compile.passes.choose import choose
from tmx_compile.passes.plan import Plan, SitePlan, Triangle
from tmx_compile.passes.substitute import substitute
from tmx_compile.proof.conclude import Proof
from tmx_compile.proof.prove import Prover
from tmx_compile.report import Reason
from tmx_compile.request import PROGRAM, Request


def exported(call, args, decompose=False):
    """An exported program's graph and all of its inputs."""
    program = torch.export.export(OneLayer(call), tuple(args))
    program = program.run_decompositions() if decompose else program
    held, given = dict(program.state_dict) | dict(program.constants), iter(args)
    inputs = [held[s.target] if s.target else next(given) for s in program.graph_signature.input_specs]
    return program.graph_module, inputs


AOT = {
    "export": exported,
    "decomposed": lambda call, args: exported(call, args, decompose=True),
    "make_fx": lambda call, args: (make_fx(call, tracing_mode="fake")(*args), args),
}
# Decompositions leave constants that were tensors as inputs of the graph.
UNREADABLE = {
    ("decomposed", "where as a method"): Reason.MASK_UNKNOWN,
    ("decomposed", "scaled by the root of a tensor"): Reason.SCALE,
}


def substituted(gm, inputs):
    """The result of a graph whose one site is replaced by the operator."""
    (site,) = find_attention(gm)
    assert isinstance(site, AttentionSite), site
    storages = Storages(gm.graph)
    proof = Prover.of(site.fake("query"), storages).prove(site)
    assert isinstance(proof, Proof), proof
    item = SitePlan(site.node, LayerPath("", 0), True, Triangle(CONFIG.geometry), site=site, proof=proof)
    plan = Plan(gm, Request(CONFIG, lowering="operator"), PROGRAM, storages=storages, sites=(item,))
    node = substitute(choose(plan)).sites[0].operator
    assert squares(gm, N) == []
    out = gm(*inputs)
    return (out[0] if isinstance(out, (tuple, list)) else out), value_of(node.args[1]).shape[1]


# Exporting takes a second each: what differs from ``make_fx`` are assertions, constants and what stays composite.
EXPORTED = [
    "where as a method",
    "scaled by the root of a tensor",
    "modules and a buffer",
    "where, then add",
    "hugging face",
    "grouped by einsum",
    "baddbmm with a mask",
    "in place as statements",
]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("make_fx", name) for name in FORMS if name != "modules and a buffer"]
    + [(kind, name) for kind in ("export", "decomposed") for name in EXPORTED],
)
def test_forms_in_aten_graphs(kind, name):
    call, kv_heads = FORMS[name]
    q, k, v = tensors(kv_heads)
    gm, inputs = AOT[kind](call, (q, k, v))
    if (kind, name) in UNREADABLE:
        (answer,) = find_attention(gm)
        assert answer.reason is UNREADABLE[kind, name]
        return
    out, heads = substituted(gm, inputs)
    want, _ = oracle(q, k, v, None, *CONFIG.geometry.counts, SCALE)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    assert heads == kv_heads


@pytest.mark.parametrize("masked_by", ["is_causal", "a mask"])
def test_decomposed_sdpa(masked_by):
    """SDPA is written out too once it is decomposed; zeros for rows without a key are part of it."""

    def call(q, k, v):
        given = {"is_causal": True} if masked_by == "is_causal" else {"attn_mask": causal(q)}
        return F.scaled_dot_product_attention(q, k, v, **given)

    args = tensors()
    gm, inputs = exported(call, args, decompose=True)
    (site,) = find_attention(gm)
    assert (site.form, site.scale) == ("eager", pytest.approx(SCALE))
    out, _ = substituted(gm, inputs)
    want, _ = oracle(*args, None, *CONFIG.geometry.counts, SCALE)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
