"""SDPA as operators: in exported programs, in AOT-traced graphs, and the kernels of other devices on fake tensors."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from tests.support.layers import Call
from tmx_compile.find import find_attention
from tmx_compile.find.aten import ATEN_TARGETS
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.storages import Storages
from tmx_compile.proof.conclude import Proof
from tmx_compile.proof.prove import Prover
from tmx_compile.report import Reason, Rejected

aten = torch.ops.aten
sdpa = F.scaled_dot_product_attention
B, H, KV, N, D = 2, 4, 2, 40, 16


def tensors(kv_heads=KV):
    return tuple(torch.randn(B, heads, N, D) for heads in (H, kv_heads, kv_heads))


def exported(call, *args, strict=False, dynamic=False):
    """The graph as torch.export leaves it, and after decomposition."""
    length = torch.export.Dim("n", min=8, max=2048)
    shapes = ((*({2: length} for _ in args),),) if dynamic else None
    program = torch.export.export(Call(call), args, strict=strict, dynamic_shapes=shapes)
    return program.graph_module, program.run_decompositions({}).graph_module


def only_site(gm):
    (found,) = find_attention(gm)
    assert isinstance(found, AttentionSite), found
    return found


def proof_of(gm):
    site = only_site(gm)
    return Prover.of(site.fake("query"), Storages(gm.graph)).prove(site)


# Exported programs ---------------------------------------------------------------------------------------------------


def repeated(x):
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, H // KV, length, dim).reshape(batch, H, length, dim)


REPEATS = {"expand": repeated, "repeat_interleave": lambda x: x.repeat_interleave(H // KV, 1)}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("repeat", REPEATS)
def test_repeated_keys_in_exported_programs(repeat, strict, dynamic):
    def call(q, k, v):
        return sdpa(q, REPEATS[repeat](k), REPEATS[repeat](v), is_causal=True, scale=0.3)

    for gm in exported(call, *tensors(), strict=strict, dynamic=dynamic):
        site = only_site(gm)
        assert [x.node.name for x in (site.query, site.key, site.value)] == ["args_0", "args_1", "args_2"]
        assert (site.masks, site.is_causal, site.scale, site.form) == ((), True, 0.3, "sdpa")


def positions(q):
    return torch.arange(q.shape[2], device=q.device)


def packed(q):
    """Hugging Face's mask of packed sequences, which plain positions make constant."""
    p = positions(q)[None]
    numbers = (torch.diff(p, prepend=p[:, :1] - 1) != 1).cumsum(-1)
    rows = torch.arange(q.shape[2])[:, None]
    same = numbers[:, rows] == numbers[:, rows.T]
    return (same & (rows >= rows.T))[:, None]


CAUSAL = {
    "comparison": lambda q: positions(q)[None, :] <= positions(q)[:, None],
    "tril": lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(),
    "slice of a larger one": lambda q: torch.ones(4096, 4096, dtype=torch.bool).tril()[: q.shape[2], : q.shape[2]],
    "select and slice": lambda q: (
        (torch.arange(4096).expand(3, 4096)[-1] + 7)[: q.shape[2]][None] <= positions(q)[:, None] + 7
    ),
    "select of the last dimension": lambda q: (
        positions(q)[:, None, None] >= positions(q)[None, :, None] + torch.arange(3)
    )[..., 0],
    "index": lambda q: (positions(q)[:, None] >= positions(q))[positions(q)],
    "gathered keys": lambda q: (positions(q)[:, None] >= positions(q))[:, positions(q)],
    "additive": lambda q: torch.where(positions(q)[:, None] >= positions(q), 0.0, -math.inf),
    "scalar tensor": lambda q: torch.where(
        positions(q)[:, None] >= positions(q), torch.scalar_tensor(0.0), torch.scalar_tensor(-math.inf)
    ),
    "masked_fill": lambda q: torch.zeros(q.shape[2], q.shape[2]).masked_fill(
        positions(q)[:, None] < positions(q), torch.finfo(torch.float32).min
    ),
    "triu of -inf": lambda q: torch.full((q.shape[2], q.shape[2]), -math.inf).triu(1),
    "cast twice": lambda q: (positions(q)[:, None] >= positions(q)).to(torch.int64).to(torch.bool),
    "packed": packed,
    "cat": lambda q: torch.cat([positions(q)[:1] - 1, positions(q)])[None, :-1] < positions(q)[:, None],
}
NOT_CAUSAL = {
    "one key more": lambda q: positions(q)[None, :] <= positions(q)[:, None] + 1,
    "select and slice": lambda q: (
        (torch.arange(4096).expand(3, 4096)[-1] + 6)[: q.shape[2]][None] <= positions(q)[:, None] + 7
    ),
    "slice from 1": lambda q: torch.arange(4096)[1 : q.shape[2] + 1][None] <= positions(q)[:, None] + 2,
    "cat": lambda q: torch.cat([positions(q)[:1] - 1, positions(q)])[None, :-1] <= positions(q)[:, None],
    "column of 0": lambda q: (positions(q)[:, None] >= positions(q)) | (positions(q)[:, None].select(0, 0) == 0),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_masks_are_read(name):
    def call(q):
        return sdpa(q, q, q, attn_mask=CAUSAL[name](q))

    q = tensors()[0]
    for gm in exported(call, q, dynamic=True):
        assert proof_of(gm) == Proof()
    mask = CAUSAL[name](q)
    allowed = mask if mask.dtype == torch.bool else mask == 0
    assert torch.equal(allowed.broadcast_to(N, N) if allowed.dim() == 2 else allowed[0, 0], torch.ones(N, N).tril() > 0)


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_masks_that_are_not_causal_are_refused(name):
    def call(q):
        return sdpa(q, q, q, attn_mask=NOT_CAUSAL[name](q))

    for gm in exported(call, tensors()[0], dynamic=True):
        proof = proof_of(gm)
        assert isinstance(proof, Rejected)
        assert proof.reason in (Reason.NOT_CAUSAL, Reason.MASK_UNKNOWN)


def test_a_cat_that_does_not_continue_its_line_is_not_read():
    """[0, 0, 1, 2, ...]: read as the line it would be for [-1, 0, 1, ...], this mask would be causal."""

    def call(q):
        keys = torch.cat([positions(q)[:1], positions(q)])[None, :-1]
        return sdpa(q, q, q, attn_mask=keys < positions(q)[:, None])

    assert all(isinstance(proof_of(gm), Rejected) for gm in exported(call, tensors()[0]))


def test_padding_is_read():
    def call(q, padding):
        mask = (positions(q)[:, None] >= positions(q)) & padding[:, None, None, :].to(torch.bool)
        return sdpa(q, q, q, attn_mask=mask)

    for gm in exported(call, tensors()[0], torch.ones(B, N, dtype=torch.int64)):
        proof = proof_of(gm)
        assert isinstance(proof, Proof)
        assert len(proof.valid) == 1


# Graphs that are already operators -----------------------------------------------------------------------------------


def traced(call, *args):
    with torch.no_grad():
        return make_fx(call)(*args)


def test_the_cpu_kernel_in_a_traced_graph():
    q, k, v = tensors()
    gm = traced(lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.3, enable_gqa=True), q, k, v)
    site = only_site(gm)
    assert site.node.target is operator.getitem
    assert site.node.args[0].target is aten._scaled_dot_product_flash_attention_for_cpu.default
    assert (site.form, site.is_causal, site.scale, site.masks) == ("aten", True, 0.3, ())
    assert [tuple(x.fake.shape) for x in (site.query, site.key, site.value)] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("name", CAUSAL)
def test_masks_of_the_cpu_kernel(name):
    """The kernel's mask is additive: SDPA has made it one."""
    gm = traced(lambda q: sdpa(q, q, q, attn_mask=CAUSAL[name](q)), tensors()[0])
    assert only_site(gm).masks[0].how == "add"
    assert proof_of(gm) == Proof()


def test_inductor_decompositions_are_read():
    """``arange`` becomes ``iota``, ``tril`` a comparison, ``diff`` a concatenation."""
    from torch._inductor.decomposition import select_decomp_table

    for name in ("comparison", "tril", "packed"):
        build = CAUSAL[name]
        with torch.no_grad():
            gm = make_fx(Call(lambda q, build=build: sdpa(q, q, q, attn_mask=build(q))), select_decomp_table())(
                tensors()[0]
            )
        assert proof_of(gm) == Proof(), name


# What the schemas say: everything by name, with values that no default has.
KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": dict(attn_mask="mask"),
    "_scaled_dot_product_flash_attention": dict(return_debug_mask=False),
    "_scaled_dot_product_efficient_attention": dict(attn_bias="mask", compute_log_sumexp=False),
    "_scaled_dot_product_cudnn_attention": dict(attn_bias="mask", compute_log_sumexp=True),
    "_scaled_dot_product_fused_attention_overrideable": dict(attn_bias="mask"),
    "_scaled_dot_product_attention_math": dict(attn_mask="mask"),
}


def kernel_graph(name, *, positional=False, aligned=True, read=(0,), **changes):
    """A graph of fake CUDA tensors that calls a kernel, with a causal bias where it takes one."""
    target = getattr(aten, name).default
    length = N if aligned else N - 3
    graph = Graph()
    mode = FakeTensorMode()

    def record(node, value):
        node.meta["val"] = value
        return node

    def call(target, *args, **kwargs):
        node = graph.call_function(target, args, kwargs)
        values, keywords = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode, torch.no_grad():
            return record(node, target(*values, **keywords))

    with mode:
        qkv = [record(graph.placeholder(x), torch.empty(B, H, length, D, device="cuda")) for x in "qkv"]
    arguments = dict(zip(("query", "key", "value"), qkv, strict=True)) | {"scale": 0.3} | KERNELS[name] | changes
    if "mask" in arguments.values():
        full = call(aten.full.default, [length, length], -math.inf, device="cuda")
        mask = call(aten.triu.default, full, 1)
        if not aligned:
            mask = call(aten.slice.Tensor, call(aten.constant_pad_nd.default, mask, [0, 3], 0.0), 1, 0, length)
        mask = call(aten.expand.default, mask, [B, H, length, length])
        arguments = {key: mask if value == "mask" else value for key, value in arguments.items()}
    else:
        arguments["is_causal"] = True
    args = []
    for formal in target._schema.arguments if positional else ():
        if not formal.kwarg_only:
            args.append(arguments.pop(formal.name, formal.default_value))
    node = call(target, *args, **arguments)
    graph.output([call(operator.getitem, node, index) for index in read])
    return GraphModule({}, graph)


def test_every_kernel_is_tried():
    assert {getattr(aten, name).default for name in KERNELS} == ATEN_TARGETS


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "padded bias"])
@pytest.mark.parametrize("positional", [True, False], ids=["positions", "keywords"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_other_devices(name, positional, aligned):
    gm = kernel_graph(name, positional=positional, aligned=aligned)
    site = only_site(gm)
    assert [x.node.name for x in (site.query, site.key, site.value)] == ["q", "k", "v"]
    assert (site.scale, site.form, site.node.target) == (0.3, "aten", operator.getitem)
    assert bool(site.masks) != site.is_causal
    assert proof_of(gm) == Proof()


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_with_dropout_are_refused(name):
    (found,) = find_attention(kernel_graph(name, dropout_p=0.5))
    assert isinstance(found, Rejected)
    assert found.reason is Reason.DROPOUT


@pytest.mark.parametrize("name", KERNELS)
def test_a_result_that_is_more_than_the_attention_is_refused(name):
    """The log-sum-exp goes to a backward pass, which would differentiate another function."""
    (found,) = find_attention(kernel_graph(name, read=(0, 1)))
    assert isinstance(found, Rejected)
    assert found.reason is Reason.FORM
    (found,) = find_attention(kernel_graph(name, read=(0, 0)))
    assert isinstance(found, Rejected)
    assert "2 times" in found.detail


def test_a_dropout_mask_is_refused():
    gm = kernel_graph("_scaled_dot_product_attention_math")
    (call,) = (n for n in gm.graph.nodes if n.target in ATEN_TARGETS)
    call.kwargs = dict(call.kwargs) | {"dropout_mask": call.kwargs["attn_mask"]}
    (found,) = find_attention(gm)
    assert isinstance(found, Rejected)
    assert found.reason is Reason.DROPOUT


def test_the_whole_tuple_as_a_result_is_refused():
    gm = kernel_graph("_scaled_dot_product_efficient_attention")
    (call,) = (n for n in gm.graph.nodes if n.target in ATEN_TARGETS)
    gm.graph.output_node().args = ([call],)
    (found,) = find_attention(gm)
    assert isinstance(found, Rejected)
    assert found.reason is Reason.FORM
