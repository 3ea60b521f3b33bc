"""The CUDA emission of ``flex`` without a GPU: its plans by brute force, its graph in eager mode, its refusals."""

import math
from dataclasses import replace

import pytest
import torch
from flex_eager import CudaFlexInEager, as_read, flex_eager
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import Case, LoweringBackend, OneCall, attended, oracle
from test_conformance import CASES, check
from test_random import cases
from torch._higher_order_ops.flex_attention import flex_attention
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode

from tmx_compile.graph.nodes import INSERTED, fake_mode_of, op_name, tensor_of
from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.flex import cuda as flex_cuda
from tmx_compile.lowering.flex.call import KeyBlocks
from tmx_compile.lowering.flex.plan import Tiles, last_plan, streaming_plan
from tmx_compile.lowering.table import FLEX
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator import OPERATOR
from tmx_compile.passes.lower import Lowerer
from tmx_compile.report import Accepted, Rejected

IN_EAGER = CudaFlexInEager()


def called(node):
    """The bare name of what a node calls."""
    return op_name(node).rpartition(".")[2]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dim >= 16])
def test_conformance(name):
    case = CASES[name]
    check(case, torch.compile(OneCall(*case.one_call), backend=LoweringBackend(IN_EAGER, False), dynamic=False))


# Where every row is a last row, and where a sequence ends before or starts after some of the rows.
EDGES = {
    "padding, all last rows": Case(60, 60, 4, 5, 500, batch=3, valid=((0, 60), (20, 45), (0, 1))),
    "padding, all last rows, more keys": Case(60, 200, 4, 5, 500, batch=3, valid=((0, 200), (160, 190), (0, 100))),
    "sequences end before the rows": Case(60, 200, 4, 5, 30, batch=3, valid=((0, 200), (3, 141), (0, 100))),
    "sequences end early in the rows": Case(60, 200, 4, 5, 30, batch=3, valid=((0, 150), (145, 150), (30, 142))),
    "heads do not fill a block": Case(300, 300, 4, 5, 30, heads=10, kv_heads=2),
    "one key head": Case(300, 300, 4, 5, 3, heads=7),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    case = EDGES[name]
    check(case, torch.compile(OneCall(*case.one_call), backend=LoweringBackend(IN_EAGER, False), dynamic=False))


@given(cases())
@settings(max_examples=25, deadline=None)
def test_random_problems(case):
    torch._dynamo.reset()
    case = replace(case, dim=16, v_dim=case.v_dim and 17, dtype=torch.float32)
    check(case, torch.compile(OneCall(*case.one_call), backend=LoweringBackend(IN_EAGER, False), dynamic=False))


@pytest.mark.parametrize("valid", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("geometry", [(4, 32, 16), (70, 300, 100), (0, 0, 0)], ids=str)
def test_one_graph_serves_every_length(geometry, valid):
    backend = LoweringBackend(IN_EAGER, inductor=False)
    compiled = torch.compile(OneCall(geometry, 0.25), backend=backend)
    for n in (300, 61, 450, 64):
        ranges = ((n // 3, n), (0, n - n // 4)) if valid else None
        check(Case(n, n, *geometry, batch=2, heads=4, kv_heads=2, valid=ranges), compiled, dynamic=True)
    assert backend.compiles == 1


def test_one_graph_serves_rows_keys_and_batches():
    """All three dynamic, the rows fewer than the keys and sometimes than the last rows, with padding."""
    backend = LoweringBackend(IN_EAGER, inductor=False)
    compiled = torch.compile(OneCall((4, 32, 16), 16**-0.5, 90), backend=backend)
    for q_len, kv_len, batch in ((100, 300, 2), (9, 131, 4), (128, 400, 3)):
        valid = tuple((10 * b, kv_len - 7 * b) for b in range(batch))
        case = Case(q_len, kv_len, 4, 32, 16, batch=batch, heads=2, valid=valid, holes=True, reach=90)
        *qkv, key_mask = case.tensors()
        for x in (*qkv, key_mask):
            torch._dynamo.mark_dynamic(x, 0)
        for x, dim in ((qkv[0], 2), (qkv[1], 2), (qkv[2], 2), (key_mask, 1)):
            torch._dynamo.mark_dynamic(x, dim)
        with torch.no_grad():
            out = compiled(*qkv, key_mask)
        want, _ = oracle(*qkv, key_mask, *case.arguments)
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    assert backend.compiles == 1


tiles = st.builds(Tiles, st.sampled_from([4, 8, 16]), st.sampled_from([2, 4, 8]), st.just(4), st.just(3))


def read(plan, sequence, block):
    """The partial and the full key blocks of a block of rows."""
    line = min(sequence, plan.counts.shape[0] - 1)
    found = []
    for counts, indices in ((plan.counts, plan.indices), (plan.full_counts, plan.full_indices)):
        if counts is None:
            found.append([])
            continue
        assert counts.dtype == indices.dtype == torch.int32
        assert counts.is_contiguous()
        assert indices.is_contiguous()
        count = int(counts[line, 0, block])
        assert count <= indices.shape[-1]
        found.append(indices[line, 0, block, :count].tolist())
    return found


def hold(partial, full, pairs, keys, spare):
    """Every attended pair lies in exactly one listed block, full blocks are attended whole, and few are idle."""
    listed = partial + full
    assert len(listed) == len(set(listed)), "a block listed twice would count its keys twice"
    assert all(0 <= block * keys < pairs.shape[1] for block in listed)
    touched = {int(key) // keys for key in pairs.any(0).nonzero()}
    assert touched <= set(listed)
    for block in full:
        part = pairs[:, block * keys : (block + 1) * keys]
        assert part.shape[1] == keys
        assert part.all()
    assert len(set(listed) - touched) <= spare


# Sinks, window and rows each touch as many blocks as so many tokens can.
WIDEST = Case(20, 41, 6, 6, 0, valid=((3, 41),))


@given(cases(), tiles)
@example(WIDEST, Tiles(4, 4, 4, 3))
@settings(max_examples=100, deadline=None)
def test_the_streaming_plan_against_brute_force(case, tiles):
    query, _, _, key_mask = case.tensors()
    geometry = case.mask.within_reach().bounded(case.kv_len)
    where = rows.extent(key_mask, case.kv_len)
    padded = key_mask is not None
    plan = streaming_plan(query, case.q_len, case.kv_len, where, padded, geometry, tiles)
    mask = attended(case.q_len, case.kv_len, key_mask, geometry.sink, geometry.window, 0, case.reach)
    for b in range(mask.shape[0]):
        for block in range(-(-case.q_len // tiles.rows)):
            pairs = mask[b, block * tiles.rows : (block + 1) * tiles.rows]
            # Padded keys in the middle may empty a listed block; a reach that ends in a sink's block may, once.
            spare = case.kv_len if case.holes else int(case.reach is not None)
            hold(*read(plan, b, block), pairs, tiles.keys, spare)


@given(cases(), tiles, st.sampled_from([1, 2, 8]), st.integers(1, 2))
@settings(max_examples=100, deadline=None)
def test_the_plan_of_the_last_rows_against_brute_force(case, tiles, copies, blocks):
    """Together the copies cover every attended pair, none of it twice."""
    query, key, _, key_mask = case.tensors()
    last = min(max(case.last, 1), case.q_len)
    where = rows.extent(key_mask, case.kv_len)
    padded = key_mask is not None
    first, final = flex_cuda._span(query, key, where, last, padded=padded)
    plan = last_plan(query, case.kv_len, where, padded, first, final, case.reach, copies, blocks, tiles)
    assert plan.counts.shape[2] == copies * blocks
    end = [case.kv_len] * case.batch if where.end is case.kv_len else where.end.flatten().tolist()
    mask = attended(case.q_len, case.kv_len, key_mask, 0, 0, last, case.reach)
    for b in range(mask.shape[0]):
        positions = torch.arange(case.q_len) + case.kv_len - case.q_len
        # Without rows of its own, as where the sequence ends before the first row, a sequence has empty lists.
        pairs = mask[b, (positions >= end[b] - last) & (positions < end[b])]
        for block in range(blocks):
            parts = [read(plan, b, copy * blocks + block) for copy in range(copies)]
            longest = max(len(partial) + len(full) for partial, full in parts)
            merged = [[listed for part in parts for listed in part[kind]] for kind in (0, 1)]
            hold(*merged, pairs, tiles.keys, case.kv_len if case.holes or case.reach is not None else 0)
            assert longest <= -(-sum(map(len, merged)) // copies), "the parts are to be even"


@pytest.mark.parametrize(
    ("geometry", "full"), [((4, 32, 64), False), ((8, 512, 128), True), ((64, 1024, 128), True)], ids=str
)
def test_plans_are_small(geometry, full):
    """At 131,072 tokens: the streaming plan, and the plan of the last rows over all keys."""
    n, where = 131072, rows.Extent(0, 131072)
    like = torch.empty(1, 32, 1, 128)
    _, window, last = geometry
    stream = streaming_plan(
        like, n, n, where, False, Geometry(*geometry), flex_cuda.stream_tiles(torch.bfloat16, 128, window)
    )
    count = 4 * last
    tiles = flex_cuda.last_tiles(torch.bfloat16, 128, count)
    first = torch.full((1, 1, 1, 1), n - last)
    final = last_plan(like, n, where, False, first, first * 0 + n - 1, None, 16, count // tiles.rows, tiles)
    assert (stream.full_counts is not None) == full
    if full:
        # In the middle of the prompt, masks are computed for the edges of the window and the sinks only.
        assert stream.counts[0, 0, 512] <= 6
        assert stream.full_counts[0, 0, 512] == (window + 1 - tiles.rows) // tiles.keys
    assert (final.counts + final.full_counts).max() == n // tiles.keys // 16
    # Bytes a token, where a token of one head has 256.
    for plan in (stream, final):
        held = [x for x in vars(plan).values() if isinstance(x, torch.Tensor)]
        assert sum(x.untyped_storage().nbytes() for x in held) <= 4 * n


def lowered(shapes, geometry, reach=None, mask=None, dtype=torch.bfloat16):
    """The nodes of the CUDA emission for one call, on fake tensors of any size."""
    seen = []

    def backend(gm, inputs):
        (node,) = [n for n in gm.graph.nodes if n.target in (OPERATOR, torch.ops.tmx.triangle_attention)]
        node.target = OPERATOR
        fakes = [None if a is None else tensor_of(a) for a in node.args[:4]]
        call = AttentionCall(*fakes, Geometry(*node.args[4:7], *node.args[8:]), node.args[7], False)
        assert flex_cuda.supports(call) == Accepted()
        Lowerer(gm, fake_mode_of(gm)).lower(node, call, IN_EAGER)
        seen.append(gm)
        return lambda *_: (torch.empty(0),)

    with torch.no_grad():
        qkv = [torch.empty(1, dtype=dtype).expand(shape) for shape in shapes]
        key_mask = None if mask is None else torch.empty(1, dtype=torch.bool).expand(mask)
        torch.compile(OneCall(geometry, 0.1, reach), backend=backend, dynamic=False)(*qkv, key_mask)
    return seen[0]


def test_nothing_grows_with_the_square_of_the_length():
    """At 131,072 tokens no node but the result is a fifth as large as the result, last rows included."""
    n = 131072
    for geometry, mask in (((4, 32, 64), None), ((8, 512, 128), None), ((8, 512, 128), (1, n))):
        gm = lowered([(1, 32, n, 128), (1, 8, n, 128), (1, 8, n, 128)], geometry, mask=mask)
        out = 32 * n * 128
        sizes = {}
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if node.meta.get(INSERTED) and isinstance(value, torch.Tensor):
                sizes[node.name] = value.numel()
        results = [name for name, size in sizes.items() if size == out]
        assert len(results) == 2, "the streaming rows, and the last rows written over them"
        assert max(size for name, size in sizes.items() if name not in results) < out / 5


def test_heads_of_a_group_share_their_keys():
    """The last rows of four query heads are rows of one head, 16 times over: 256 programs of 128 rows."""
    gm = lowered([(1, 32, 5000, 128), (1, 8, 5000, 128), (1, 8, 5000, 128)], (4, 32, 64))
    calls = [node for node in gm.graph.nodes if node.target is flex_eager]
    assert [tuple(tensor_of(node.args[0]).shape) for node in calls] == [(1, 32, 5000, 128), (1, 8, 4096, 128)]
    assert [node.args[6]["OUTPUT_LOGSUMEXP"] for node in calls] == [False, True]
    assert [tuple(tensor_of(node.args[1]).shape[:2]) for node in calls] == [(1, 8), (1, 8)]


class Layers(torch.nn.Module):
    """The operator ``count`` times, each on what the one before it gave."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x, key_mask):
        for _ in range(self.count):
            x = x + torch.ops.tmx.triangle_attention(x, x[:, :2] * 0.5, x[:, 2:] + 1, key_mask, 4, 16, 8, 0.25)[0]
        return x


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_layers_share_their_plans(padded):
    made = {}
    x = torch.randn(2, 4, 150, 16)
    key_mask = torch.arange(150) >= torch.tensor([[40], [0]]) if padded else None
    for count in (1, 3):
        backend = LoweringBackend(IN_EAGER, inductor=False)

        def keep(gm, inputs, count=count, backend=backend):
            run = backend(gm, inputs)
            made[count] = [called(node) for node in gm.graph.nodes if node.meta.get(INSERTED)]
            return run

        with torch.no_grad():
            out = torch.compile(Layers(count), backend=keep, dynamic=False)(x, key_mask)
        want = x.double()
        for _ in range(count):
            want = want + oracle(want, want[:, :2] * 0.5, want[:, 2:] + 1, key_mask, 4, 16, 8, 0.25)[0]
        torch.testing.assert_close(out.double(), want, atol=1e-4, rtol=0)
    assert made[3].count("flex_eager") == 3 * made[1].count("flex_eager") == 6
    for name in ("arange", "rshift", "minimum", "maximum"):
        assert made[3].count(name) == made[1].count(name) > 0


def test_all_rows_are_last_rows():
    """Then there is one call, and nothing to join."""
    names = [called(n) for n in lowered([(1, 2, 70, 16), (1, 1, 70, 16), (1, 1, 70, 16)], (2, 3, 500)).graph.nodes]
    assert "index_put" not in names
    assert names.count("flex_eager") == 1


def test_far_keys_are_copied_together():
    """The template computes a key's offset within its head in 32 bits."""
    with FakeTensorMode():

        def keys(tokens, heads):
            return torch.empty(1, tokens, heads, 128, dtype=torch.bfloat16).transpose(1, 2)[:, :8]

        for x, copied in ((keys(200_000, 96), True), (keys(100_000, 96), False), (keys(2_000_000, 8), False)):
            assert flex_cuda._close_keys(x).is_contiguous() == copied


@torch.library.custom_op("tmx_test::realized", mutates_args=())
def realized(x: torch.Tensor) -> torch.Tensor:
    """Stands for a template: its result is a buffer of its own."""
    return x * 2


@realized.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_the_last_rows_are_written_in_place(padded):
    """Inductor turns the functional ``index_put`` into one that allocates and writes nothing but the last rows."""

    def join(x, final):
        row = torch.arange(20) + x.shape[2] - 20
        out = torch.ops.tmx_test.realized(x)
        if padded:
            sequence = torch.arange(2)[:, None]
            return torch.ops.aten.index_put(out, [sequence, None, row + sequence - 1], final.transpose(1, 2))
        return torch.ops.aten.index_put(out, [None, None, row], final)

    x, final = torch.randn(2, 4, 300, 16), torch.randn(2, 4, 20, 16)
    torch._dynamo.mark_dynamic(x, 2)
    with torch.no_grad():
        out, (code,) = run_and_get_code(torch.compile(join), x, final)
    torch.testing.assert_close(out, join(x, final))
    assert "tmx_test.realized" in code
    assert "= empty_strided_cpu(" not in code


def call_of(q=(1, 4, 300, 64), k=(1, 2, 300, 64), v=None, geometry=(4, 32, 16), dtype=torch.bfloat16, grad=False):
    with FakeTensorMode():
        q, k, v = (torch.empty(shape, dtype=dtype, device="cuda") for shape in (q, k, v or k))
    return AttentionCall(q, k, v, None, Geometry(*geometry), 0.125, grad)


def test_cuda_calls_are_taken_and_need_no_settings():
    call = call_of()
    assert FLEX.supports(call) == Accepted()
    assert FLEX.inductor_options(call) == {}
    on_cpu = AttentionCall(*(torch.empty(1, 2, 9, 16) for _ in range(3)), None, Geometry(4, 32, 16), 0.25, False)
    assert FLEX.inductor_options(on_cpu) == {"epilogue_fusion": False}


LARGE = (1, 2, 200_000, 64)
REFUSALS = {
    "forward only": call_of(grad=True),
    "torch.float64 is not float32, bfloat16 or float16": call_of(dtype=torch.float64),
    "head dim 8 is not from 16 to 256, the sizes its CUDA template takes": call_of((1, 4, 9, 8), (1, 2, 9, 8)),
    "head dim 257 is not from 16 to 256, the sizes its CUDA template takes": call_of((1, 4, 9, 257), (1, 2, 9, 257)),
    "value dim 15 is not from 16 to 256, the sizes its CUDA template takes": call_of(v=(1, 2, 300, 15)),
    "an empty tensor": call_of((1, 4, 0, 64), (1, 2, 0, 64)),
    "window=70000 is more than 65536": call_of(LARGE, LARGE, geometry=(4, 70_000, 16)),
    "sink=70000 is more than 65536": call_of(LARGE, LARGE, geometry=(70_000, 32, 16)),
    "last=5000 is more than 4096": call_of(LARGE, LARGE, geometry=(4, 32, 5000)),
}


@pytest.mark.parametrize("detail", REFUSALS)
def test_refusals(detail):
    answer = FLEX.supports(REFUSALS[detail])
    assert isinstance(answer, Rejected)
    assert answer.detail == f"flex: {detail}"


def test_refusal_of_dynamic_heads():
    answers = []

    def backend(gm, inputs):
        (node,) = [n for n in gm.graph.nodes if n.target in (OPERATOR, torch.ops.tmx.triangle_attention)]
        fakes = [tensor_of(a) for a in node.args[:3]]
        answers.append(flex_cuda.supports(AttentionCall(*fakes, None, Geometry(*node.args[4:7]), node.args[7], False)))
        return gm.forward

    qkv = [torch.randn(1, 6, 40, 16) for _ in range(3)]
    for x in qkv:
        torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        torch.compile(OneCall((4, 8, 3), 0.25), backend=backend)(*qkv, None)
    assert answers[0].detail == "flex: a dynamic number of heads or head dim"


def test_refusal_of_other_devices():
    with FakeTensorMode():
        qkv = [torch.empty(1, 2, 9, 16, device="meta") for _ in range(3)]
    answer = FLEX.supports(AttentionCall(*qkv, None, Geometry(4, 32, 16), 0.25, False))
    assert answer.detail == "flex: written for cpu and cuda, got meta"


# The stand-in itself.


def everything(n, block):
    """A plan that lists all blocks."""
    blocks = -(-n // block)
    counts = torch.full((1, 1, blocks), blocks, dtype=torch.int32)
    return counts, torch.arange(blocks, dtype=torch.int32).expand(1, 1, blocks, blocks).contiguous()


def run_stand_in(counts, indices, full_counts=None, full_indices=None, block=16):
    from torch.nn.attention.flex_attention import BlockMask

    q, k, v = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    plan = BlockMask.from_kv_blocks(*everything(40, block), BLOCK_SIZE=block, compute_q_blocks=False).as_tuple()
    lists = (counts, indices, full_counts, full_indices)

    def causal(b, h, row, key):
        return key <= row

    block_mask = (40, 40, *lists, *plan[6:-3], block, block, causal)
    options = {"FORCE_USE_FLEX_ATTENTION": True, "OUTPUT_LOGSUMEXP": True, "BLOCK_M": block, "BLOCK_N": block}
    arguments = (q, k, v, lambda score, *_: score, block_mask, 0.25, options)
    return flex_eager(*arguments)[:2], arguments


def test_the_stand_in_agrees_with_torch():
    """Also on the base of the log-sum-exp, 2, which the public function converts."""
    (out, lse), arguments = run_stand_in(*everything(40, 16))
    want, want_lse, _ = flex_attention(*arguments)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    q, k = arguments[0], arguments[1].repeat_interleave(2, 1)
    scores = (q @ k.transpose(2, 3) * 0.25).masked_fill(~torch.ones(40, 40).tril().bool(), float("-inf"))
    torch.testing.assert_close(lse * math.log(2), torch.logsumexp(scores, -1))


@pytest.mark.parametrize("fault", ["twice", "out of range", "negative", "too many", "full as well", "narrow"])
def test_the_stand_in_is_strict(fault):
    counts, indices = everything(40, 16)
    full = (None, None)
    message = ""
    if fault == "twice":
        indices[0, 0, 1, 2], message = 0, "twice"
    elif fault == "out of range":
        indices[0, 0, 1, 2], message = 3, "block 3 of 3"
    elif fault == "negative":
        indices[0, 0, 1, 2], message = -1, "block -1 of 3"
    elif fault == "too many":
        counts[0, 0, 1], message = 4, "4 blocks in a row of 3"
    elif fault == "full as well":
        full = (torch.ones_like(counts), indices.clone())
        message = "twice"
    elif fault == "narrow":
        # As wide in its strides as before, but two columns.
        counts, indices, message = counts.clone(), indices[..., :2], "3 blocks in a row of 2"
    with pytest.raises(AssertionError, match=message):
        run_stand_in(counts, indices, *full)


def test_the_stand_in_reads_plans_as_the_template_does():
    """The stride of a dimension of size 1 matters: 0 there reads the first sequence's plan for all."""
    case = CASES["left padding"]
    *qkv, key_mask = case.tensors()
    where = rows.extent(key_mask, case.kv_len)
    tile = Tiles(64, 64, 4, 3)
    plan = streaming_plan(qkv[0], 200, 200, where, True, Geometry(4, 20, 0), tile)
    flat = KeyBlocks(64, 64, torch.as_strided(plan.counts, plan.counts.shape, (plan.counts.stride(0), 0, 1)), None)
    assert [as_read(plan.counts, b, 0, 0) for b in range(3)] == plan.counts[:, 0, 0].tolist()
    assert len({as_read(flat.counts, b, 0, 0) for b in range(3)}) == 1
    assert len(set(plan.counts[:, 0, 0].tolist())) > 1
