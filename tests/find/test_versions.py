"""Tensors that are written before, between and after attention calls, through any view and by any operator.

The window is longer than the prompt, so that sparse and dense are the same: the compiled model equals eager.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.layers import Call
from tmx_compile import Report, TriangleMixConfig, rewrite, tmx_backend
from tmx_compile.graph.effects import Effects
from tmx_compile.report import Reason

N, ROOM = 150, 400
CONFIG = TriangleMixConfig(triangle_layer_indices=[0, 1], sliding_window_size=4000, min_seq_len=100)


@torch.library.custom_op("tmx_versions::shift", mutates_args={"tensor"})
def shift(by: float, tensor: torch.Tensor) -> None:
    tensor.add_(by)


@torch.library.custom_op("tmx_versions::show", mutates_args={"mask"})
def show(key: int, mask: torch.Tensor) -> None:
    mask[:, key] = True


shift.register_fake(lambda by, tensor: None)
show.register_fake(lambda key, mask: None)


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(map(Call, layers))

    def forward(self, x, *rest):
        for layer in self.layers:
            x = layer(x, *rest)
        return x


@pytest.fixture
def eager(monkeypatch):
    """The rewritten graph runs as it is."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **kwargs: gm)


def check(model, *args, decisions, calls=1):
    """Compiled and eager agree in results and in what they leave in their arguments, call after call."""
    torch._dynamo.reset()
    report = Report()
    mine, theirs = [x.clone() for x in args], [x.clone() for x in args]
    compiled = torch.compile(model, backend=tmx_backend(CONFIG, lowering="operator", report=report))
    with torch.no_grad():
        for _ in range(calls):
            torch.testing.assert_close(compiled(*mine), model(*theirs), atol=2e-5, rtol=1e-5)
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b)
    assert [site.reason or site.decision for site in report] == decisions
    return report


def causal():
    return torch.ones(N, N, dtype=torch.bool).tril()


WRITES = {
    "item": lambda m: m.__setitem__((slice(None), 140), True),
    "data": lambda m: m.data.__setitem__((slice(None), 140), True),
    "T": lambda m: m.T.__setitem__(140, True),
    "mT": lambda m: m.mT.__setitem__(140, True),
    "ravel": lambda m: m.ravel().__setitem__(slice(140, 145), True),
    "swapdims": lambda m: m.swapdims(0, 1).__setitem__(140, True),
    "movedim": lambda m: m.movedim(0, 1).__setitem__(140, True),
    "atleast_3d": lambda m: torch.atleast_3d(m).__setitem__(10, True),
    "tensor_split": lambda m: m.tensor_split(2)[0].__setitem__((slice(None), 140), True),
    "hsplit": lambda m: m.hsplit([75])[1].fill_(True),
    "diagonal": lambda m: m.diagonal(3).fill_(True),
    "unfold": lambda m: m.unfold(0, 2, 2)[0].fill_(True),
    "as_strided": lambda m: m.as_strided((3,), (1,), 140).fill_(True),
    "view_as_real": lambda m: m.view(torch.uint8)[:, 140].fill_(1),
    "custom operator": lambda m: show(140, m),
    "out": lambda m: torch.logical_not(torch.zeros(N, N, dtype=torch.bool), out=m),
    "foreach": lambda m: torch._foreach_copy_([m], [torch.ones(N, N, dtype=torch.bool)]),
    "index_put": lambda m: m.index_put_((torch.tensor([3]), torch.tensor([140])), torch.tensor(True)),
    "scatter": lambda m: m.scatter_(1, torch.full((N, 1), 140), True),
    "copy into a slice": lambda m: m[:, 140:142].copy_(torch.ones(N, 2, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_mask_that_is_written_after_it_was_built(name, eager):
    def attend(x):
        mask = causal()
        WRITES[name](mask)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    check(Stack(attend), torch.randn(1, 2, N, 8), decisions=[Reason.WRITTEN_IN_PLACE.name])


@pytest.mark.parametrize("name", WRITES)
def test_a_mask_that_is_written_between_two_layers(name, eager):
    """The first layer is proven, and the proof is not the second one's."""

    class Model(Stack):
        def forward(self, x):
            mask = causal()
            x = self.layers[0](x, mask)
            WRITES[name](mask)
            return self.layers[1](x, mask) + 0.5 * x

    def attend(x, mask):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    decisions = ["triangle", Reason.WRITTEN_IN_PLACE.name]
    check(Model(attend, attend), torch.randn(1, 2, N, 8), decisions=decisions)


REWRITTEN = {
    "tril_": lambda: torch.ones(N, N, dtype=torch.bool).tril_(),
    "statement": lambda: _after(torch.ones(N, N, dtype=torch.bool), lambda m: m.tril_()),
    "logical_not_": lambda: _after(torch.ones(N, N, dtype=torch.bool).triu(1), lambda m: m.logical_not_()),
    "two": lambda: _after(_after(torch.ones(N, N), lambda m: m.mul_(-1e9)), lambda m: m.triu_(1)),
    "&=": lambda: _after(torch.ones(N, N, dtype=torch.bool), lambda m: m.__iand__(causal())),
}


def _after(tensor, write):
    write(tensor)
    return tensor


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_mask_that_an_operator_computes_in_place_is_read(name, eager):
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=REWRITTEN[name]())

    check(Stack(attend), torch.randn(1, 2, N, 8), decisions=["triangle"])


QUERY_WRITES = {
    "mul_": lambda q: q.mul_(3),
    "silu": lambda q: F.silu(q, inplace=True),
    "data": lambda q: q.data.mul_(3),
    "mT": lambda q: q.mT.mul_(3),
    "foreach": lambda q: torch._foreach_mul_([q], 3.0),
    "out": lambda q: torch.mul(q, 3.0, out=q),
    "custom operator": lambda q: shift(3.0, q),
}


@pytest.mark.parametrize("name", QUERY_WRITES)
def test_a_scaled_query_is_read_before_it_is_written(name, eager):
    """Seen through the scale, the query is saved in time."""

    def attend(x):
        query = x + 1
        scaled = query * 0.25
        QUERY_WRITES[name](query)
        scores = (scaled @ x.mT).masked_fill(~causal(), -math.inf)
        return scores.softmax(-1) @ x + query.mean()

    check(Stack(attend), torch.randn(1, 2, N, 8), decisions=["triangle"])


@pytest.mark.parametrize("name", QUERY_WRITES)
def test_scores_of_a_query_that_is_written_afterwards(name, eager):
    def attend(x):
        query = x * 1.5
        scores = query @ x.mT
        QUERY_WRITES[name](query)
        return scores.masked_fill(~causal(), -math.inf).softmax(-1) @ x + query.mean()

    check(Stack(attend), torch.randn(1, 2, N, 8), decisions=["triangle"])


def test_scores_that_another_view_writes_stay_dense(eager):
    def attend(x):
        scores = x @ x.mT
        scores.mT.mul_(2)
        return scores.masked_fill(~causal(), -math.inf).softmax(-1) @ x

    check(Stack(attend), torch.randn(1, 2, N, 8), decisions=[Reason.WEIGHTS_USED.name])


def test_a_write_into_scores_that_nothing_reads_stays_dense(eager):
    def attend(x):
        scores = (x @ x.mT).masked_fill(~causal(), -1e9)
        F.relu(scores, inplace=True)
        return scores.softmax(-1) @ x

    report = check(Stack(attend), torch.randn(1, 2, N, 8), decisions=[Reason.WRITTEN_IN_PLACE.name])
    assert report.triangle() == []


@pytest.mark.parametrize("how", ["repeat_interleave", "expand"])
def test_repeated_keys_are_those_of_before_the_cache_was_written(how, eager):
    def attend(x, cache):
        if how == "expand":
            keys = cache[:, :, None].expand(1, 2, 2, N, 8).reshape(1, 4, N, 8)
        else:
            keys = cache.repeat_interleave(2, dim=1)
        cache.copy_(torch.roll(cache, -1, 2))
        return F.scaled_dot_product_attention(x, keys, keys, is_causal=True)

    check(Stack(attend), torch.randn(1, 4, N, 8), torch.randn(1, 2, N, 8), decisions=["triangle"], calls=2)


def test_an_operand_that_is_written_between_the_two_products_stays_dense(eager):
    """Its two readers see two tensors."""

    def attend(x):
        key = x * 1.0
        scores = (x @ key.mT).masked_fill(~causal(), -math.inf)
        key.add_(1)
        return scores.softmax(-1) @ key

    check(Stack(attend), torch.randn(1, 2, N, 8), decisions=[Reason.WRITTEN_IN_PLACE.name])


@pytest.mark.parametrize("late", [False, True], ids=["after", "before"])
def test_a_position_that_the_call_raises(late, eager):
    class Model(Stack):
        def forward(self, x, keys, position):
            if late:
                position.data.add_(7)
            mask = torch.arange(ROOM)[None] <= (position + torch.arange(N))[:, None]
            out = self.layers[0](x, keys, mask)
            if not late:
                position.add_(N)
            return out

    def attend(x, keys, mask):
        return F.scaled_dot_product_attention(x, keys, keys, attn_mask=mask)

    args = torch.randn(1, 2, N, 8), torch.randn(1, 2, ROOM, 8), torch.tensor(20)
    check(Model(attend), *args, decisions=["triangle"], calls=2)


def test_lengths_that_are_written_after_the_call_are_saved_before_it(eager):
    class Model(Stack):
        def forward(self, x, lengths):
            key = torch.arange(N)
            mask = (key[None] <= key[:, None]) & (key < lengths[:, None])[:, None, None]
            x = self.layers[0](x, mask)
            torch._foreach_add_([lengths], -1)
            return self.layers[1](x, mask)

    def attend(x, mask):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    args = torch.randn(2, 2, N, 8), torch.tensor([N, N - 20])
    check(Model(attend, attend), *args, decisions=["triangle", "triangle"], calls=3)


@pytest.mark.parametrize("write", [lambda m: m.t_(), lambda m: m.transpose_(0, 1)])
def test_a_mask_that_gets_another_layout(write, eager):
    def attend(x):
        mask = torch.ones(N, N, dtype=torch.bool).triu()
        write(mask)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    check(Stack(attend), torch.randn(1, 2, N, 8), decisions=[Reason.WRITTEN_IN_PLACE.name])


class State(nn.Module):
    """A cache whose position and keys are buffers that the call itself changes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Call(self.attend)])
        self.register_buffer("position", torch.zeros((), dtype=torch.long))
        self.register_buffer("keys", torch.zeros(1, 2, ROOM, 8))
        self.register_buffer("lengths", torch.tensor([ROOM]))

    @staticmethod
    def attend(x, keys, mask):
        return F.scaled_dot_product_attention(x, keys, keys, attn_mask=mask)

    def forward(self, x):
        rows = self.position + torch.arange(x.shape[2])
        self.keys.index_copy_(2, rows, x)
        key = torch.arange(ROOM)
        mask = (key[None] <= rows[:, None]) & (key < self.lengths)
        out = self.layers[0](x, self.keys, mask)
        self.position.add_(x.shape[2])
        return out


def test_buffers_that_change_between_calls_are_data(eager):
    mine, theirs, report = State(), State(), Report()
    compiled = torch.compile(mine, backend=tmx_backend(CONFIG, lowering="operator", report=report))
    with torch.no_grad():
        for lengths in (ROOM, ROOM - 5):
            x = torch.randn(1, 2, N, 8)
            for model in (mine, theirs):
                model.lengths.fill_(lengths)
            torch.testing.assert_close(compiled(x), theirs(x), atol=2e-5, rtol=1e-5)
        assert mine.position == theirs.position
    assert [site.decision for site in report] == ["triangle"]


def test_writes_in_an_exported_program():
    class Model(Stack):
        def forward(self, x, keys, position):
            mask = torch.arange(ROOM)[None] <= (position + torch.arange(N))[:, None]
            out = self.layers[0](x, keys, mask)
            position.add_(N)
            keys.mT.mul_(2)
            return out

    def attend(x, keys, mask):
        return F.scaled_dot_product_attention(x, keys, keys, attn_mask=mask)

    model = Model(attend)
    args = torch.randn(1, 2, N, 8), torch.randn(1, 2, ROOM, 8), torch.tensor(5)
    with torch.no_grad():
        program = torch.export.export(model, args, strict=False)
        for each in (program, program.run_decompositions({})):
            done, report = rewrite(each, CONFIG, lowering="operator")
            assert [site.decision for site in report] == ["triangle"]
            mine, theirs = [x.clone() for x in args], [x.clone() for x in args]
            torch.testing.assert_close(done.module()(*mine), model(*theirs), atol=2e-5, rtol=1e-5)
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b)


def effect_of(call, *values):
    """The effect of the one call that ``call`` makes of its arguments."""
    graph = torch.fx.Graph()
    nodes = []
    with torch._subclasses.FakeTensorMode() as mode:
        for i, value in enumerate(values):
            nodes.append(graph.placeholder(f"x{i}"))
            nodes[-1].meta["example_value"] = mode.from_tensor(value)
    effect = Effects().of(call(graph, *nodes))
    return set(effect.writes), set(effect.shares), set(effect.reshapes)


def method(name, *rest):
    return lambda graph, *nodes: graph.call_method(name, (*nodes, *rest))


def function(target, *rest, **keywords):
    return lambda graph, *nodes: graph.call_function(target, (*nodes, *rest), keywords)


def raising(x):
    raise RuntimeError("not on fakes")


EFFECTS = {
    "add": (method("add", 1), (set(), set(), set())),
    "add_": (method("add_", 1), ({0}, {0}, set())),
    "view": (method("view", -1), (set(), {0}, set())),
    "t_": (method("t_"), ({0}, {0}, {0})),
    "contiguous": (method("contiguous"), (set(), {0}, set())),
    "clone": (method("clone"), (set(), set(), set())),
    "dropout outside of training": (function(F.dropout, 0.5, False), (set(), {0}, set())),
    "unknown": (function(raising), ({0}, {0}, {0})),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_effects(name):
    call, want = EFFECTS[name]
    assert effect_of(call, torch.randn(4, 5)) == want


def test_effects_of_two_tensors():
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    assert effect_of(lambda graph, x: graph.call_function(shift._opoverload, (1.0, x)), a) == ({0}, set(), set())
    assert effect_of(lambda graph, x, y: graph.call_function(torch.add, (x, 1), {"out": y}), a, b) == ({1}, {1}, set())
    assert effect_of(method("copy_"), a, b) == ({0}, {0}, set())
    assert effect_of(method("set_"), a, b)[2] == {0}
