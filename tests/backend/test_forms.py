"""Every form of a graph that is compiled, and explain, come to the same decision: from the same constants, watched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.layers import CONFIG, N, OneLayer, Stack, causal, random
from tmx_compile import LoweringError, TriangleMixConfig, explain, prefill, rewrite, tmx_backend
from tmx_compile import backend as api
from tmx_compile.graph.nodes import value_of

ONE = TriangleMixConfig(
    triangle_layer_indices=[0], num_sink_tokens=4, sliding_window_size=16, num_last_tokens=8, min_seq_len=100
)


class Buffered(nn.Module):
    """A causal mask in a buffer, as older models keep it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attend()])
        self.register_buffer("causal", torch.ones(400, 400, dtype=torch.bool).tril())

    def forward(self, x):
        return self.layers[0](x, self.causal[: x.shape[2], : x.shape[2]])


class Attend(nn.Module):
    def forward(self, x, mask):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.fixture
def range_refused(monkeypatch):
    """The first compilation for a fixed range needs a guard that does not hold in it."""
    settle, asked = api.RangeGuards.settle, []

    def refusing(self):
        asked.append(self)
        return "Ne(s0, 128)" if len(asked) == 1 else settle(self)

    monkeypatch.setattr(api.RangeGuards, "settle", refusing)


@pytest.mark.parametrize("least", [50, 120], ids=["both sides", "long side"])
def test_the_second_form_for_a_range_is_sparse_and_watched(least, range_refused, eager):
    def input_of(n):
        x = random(1, 2, n, 16)
        torch._dynamo.mark_dynamic(x, 2, min=least, max=390)
        return x

    model, backend = Buffered(), tmx_backend(ONE)
    compiled = torch.compile(model, backend=backend)
    compiled(input_of(N))
    assert [(site.decision, site.lowering) for site in backend.report] == [("triangle", "operator")]
    compiled(input_of(200))
    assert backend.report.graphs == 1
    model.causal[:, 3] = True
    x = input_of(N)
    with pytest.warns(UserWarning, match=r"causal.* has changed"):
        torch.testing.assert_close(compiled(x), model(x))
    if least <= ONE.min_seq_len:
        # The form for short prompts reads the buffer as it is.
        x = input_of(60)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("most", "graphs"), [(200, 1), (60, 2)], ids=["held by every short one", "not by all"])
def test_a_long_prompt_is_bound_by_what_the_short_form_asks_only_where_short_ones_differ(
    most, graphs, power, eager, monkeypatch
):
    """Inductor asks on a GPU whether the elements of a tensor, of N x N say, can be counted in 32 bits."""
    compile_ = api.Inductor.compile

    def asking(self, gm, example_inputs, needed=None):
        if not any("tmx" in str(node.target) for node in gm.graph.nodes):
            x = next(
                v for node in gm.graph.find_nodes(op="placeholder") if isinstance(v := value_of(node), torch.Tensor)
            )
            asked.append(bool(x.shape[2] ** power <= most**power))
        return compile_(self, gm, example_inputs, needed)

    asked = []
    monkeypatch.setattr(api.Inductor, "compile", asking)
    compiled = torch.compile(OneLayer(causal), backend=tmx_backend(ONE, lowering="operator"))
    for n in (150, 300, 90, 390) if graphs == 1 else (50, 55, 80):
        x = random(1, 2, n, 16)
        torch._dynamo.mark_dynamic(x, 2)
        compiled(x)
    assert asked == [True, False][:graphs]


def test_a_row_of_a_prompt_reads_a_buffer_as_it_is(eager):
    """The proof of one row does without the values of a mask over keys, in its form as in decode steps."""

    class Row(nn.Module):
        def forward(self, x, past, shown):
            keys = torch.cat([past, x], 2)
            return F.scaled_dot_product_attention(x, keys, keys, attn_mask=shown[:, :, :1, : keys.shape[2]])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Row()])
            self.register_buffer("shown", torch.ones(1, 1, 1, 400, dtype=torch.bool))

        def forward(self, x, past):
            return self.layers[0](x, past, self.shown)

    model = Model()
    compiled = torch.compile(model, backend=tmx_backend(ONE, chunked_prefill=True))
    x, past = random(1, 2, 1, 16), random(1, 2, N, 16)
    dense = model(x, past)
    torch.testing.assert_close(compiled(x, past), dense)
    with prefill(total_tokens=300):
        sparse = compiled(x, past)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    model.shown[..., 3] = False
    with prefill(total_tokens=300):
        got = compiled(x, past)
    torch._dynamo.reset()
    anew = torch.compile(model, backend=tmx_backend(ONE, chunked_prefill=True))
    with prefill(total_tokens=300):
        torch.testing.assert_close(got, anew(x, past))
    assert not torch.allclose(got, sparse, atol=1e-3)
    torch.testing.assert_close(compiled(x, past), model(x, past))


# explain -------------------------------------------------------------------------------------------------------------


def decided(report):
    return [(site.decision, site.reason, site.lowering) for site in report]


def test_explain_follows_the_device(monkeypatch):
    """As on a machine with an NPU: what torchair would get, not Inductor."""
    model, x = Stack(), random(1, 2, N, 16, dtype=torch.float16)
    assert decided(explain(model, x, config=CONFIG))[1] == ("triangle", "", "blocked")
    monkeypatch.setattr(api.torchair, "on_npu", lambda gm, example_inputs: True)
    site = explain(model, x, config=CONFIG).sites[1]
    assert (site.decision, site.reason) == ("dense", "NO_LOWERING")
    assert "torch_npu is not imported" in site.detail
    assert decided(explain(model, x, config=CONFIG, target="inductor"))[1] == ("triangle", "", "blocked")
    with pytest.raises(Exception, match="neither streaming decode nor chunked prefill"):
        explain(model, x, config=CONFIG, chunked_prefill=True)


def test_explain_takes_a_target_as_the_backend_does():
    x = random(1, 2, N, 16)
    with pytest.raises(ValueError, match="target must be one of"):
        explain(Stack(), x, config=CONFIG, target="tpu")
    with pytest.raises(ImportError, match=r"pip install 'tmx-compile\[npu\]'"):
        explain(Stack(), x, config=CONFIG, target="ascend")
    with pytest.raises(Exception, match="is for NPUs") as error:
        explain(Stack(), x, config=CONFIG, lowering="ascend")
    assert isinstance(getattr(error.value, "inner_exception", error.value), LoweringError)


@pytest.mark.parametrize("options", [{}, {"chunked_prefill": True}, {"decode": "streaming"}, {"lowering": "operator"}])
@pytest.mark.filterwarnings("ignore:streaming decode")
def test_explain_tells_what_the_backend_does(options, eager):
    x = random(1, 2, N, 16)
    backend = tmx_backend(CONFIG, **options)
    torch.compile(Stack(), backend=backend, dynamic=False)(x)
    assert explain(Stack(), x, config=CONFIG, **options).to_dicts() == backend.report.to_dicts()


def test_an_input_named_as_a_builtin_keeps_its_name():
    """``nn.Sequential`` calls its input ``input``, and an exported program's signature goes by the name."""
    program = torch.export.export(nn.Sequential(*Stack().layers), (random(1, 2, N, 16),))
    done, report = rewrite(program, CONFIG)
    assert [site.decision for site in report] == ["dense", "triangle"]
    assert done.module()(random(1, 2, N, 16)).shape == (1, 2, N, 16)
