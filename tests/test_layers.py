"""A model that is handed over: its layers are known in any graph, and what runs outside every graph is told."""

import copy
import io
import types
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from tests.support.models import masked_oracle, tiny_qwen3
from tmx_compile import StrictModeError, TriangleMixConfig, tmx_backend
from tmx_compile.layers import attention_layers

LAYERS = 10  # More than Dynamo compiles of one function before it gives up.
CONFIG = TriangleMixConfig(
    triangle_layer_indices=[2, 5, 6, 9], num_sink_tokens=4, sliding_window_size=32, num_last_tokens=16, min_seq_len=128
)
DENSE = tuple(sorted(set(range(LAYERS)) - set(CONFIG.layers())))


@pytest.fixture(autouse=True)
def _as_it_is(request):
    """Graphs run as they are, but for one test: Inductor is not the matter."""
    if "inductor" not in request.node.name:
        request.getfixturevalue("eager")


@pytest.fixture
def ids():
    return torch.randint(0, 128, (1, 300))


def qwen3():
    return tiny_qwen3(layers=LAYERS, initializer_range=0.2)


def compiled(model, by_layer, backend):
    for module in model.model.layers if by_layer else [model]:
        module.compile(backend=backend)
    return model


def assert_oracle(model, ids, out, config=CONFIG):
    torch.testing.assert_close(out.detach().double(), masked_oracle(model, config, ids), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("through", "count"), [("as they are", 30), ("inductor", LAYERS)])
def test_layers_compiled_one_by_one_are_two_graphs(ids, through, count):
    model = tiny_qwen3(layers=count, initializer_range=0.2)
    plain = copy.deepcopy(model)
    backend = tmx_backend(CONFIG, model=model, strict=True)
    with torch.no_grad():
        out = compiled(model, True, backend)(ids, use_cache=False).logits
    assert backend.report.graphs == 2
    assert [(site.layers, site.decision) for site in backend.report] == [
        (tuple(sorted(set(range(count)) - set(CONFIG.layers()))), "dense"),
        (CONFIG.layers(), "triangle"),
    ]
    assert "2,5-6,9" in str(backend.report)
    assert_oracle(plain, ids, out)


def test_without_the_model_they_stay_dense_and_say_so(ids):
    model = qwen3()
    backend = tmx_backend(CONFIG)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"self_attn.*LAYER_UNKNOWN.*model=model") as told:
        compiled(model, True, backend)(ids, use_cache=False)
    assert len([w for w in told if "went sparse" in str(w.message)]) == 1
    assert not backend.report.triangle()


@pytest.mark.parametrize("copies", ["as it is", "deepcopy"])
def test_a_whole_model_keeps_its_paths(ids, copies):
    model = qwen3()
    plain = copy.deepcopy(model)
    backend = tmx_backend(CONFIG, model=model)
    if copies == "deepcopy":
        model = copy.deepcopy(model)
    with torch.no_grad():
        out = compiled(model, False, backend)(ids).logits
    assert [site.layer for site in backend.report] == list(range(LAYERS))
    assert [site.layer for site in backend.report.triangle()] == list(CONFIG.layers())
    assert_oracle(plain, ids, out)


def test_a_hook_that_breaks_the_graph(ids):
    """The mask comes from another graph: what it is takes a word of the user's."""
    model = qwen3()
    plain = copy.deepcopy(model)
    backend = tmx_backend(CONFIG, model=model, assume_causal=True)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(torch._dynamo.disable(lambda module, args: None))
    with torch.no_grad():
        out = compiled(model, False, backend)(ids, use_cache=False).logits
    assert {site.layers for site in backend.report.triangle()} == {CONFIG.layers()}
    assert_oracle(plain, ids, out)


def test_gradients_through_checkpoints(ids):
    model = qwen3().train()
    other = copy.deepcopy(model)
    compiled(other, False, tmx_backend(CONFIG))
    model.model.gradient_checkpointing = other.model.gradient_checkpointing = True
    backend = tmx_backend(CONFIG, model=model)
    compiled(model, True, backend)
    grads = []
    for each in (model, other):
        each.gradient_checkpointing_enable()
        each(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in each.parameters()]))
    assert {site.layers for site in backend.report.triangle()} == {CONFIG.layers()}
    torch.testing.assert_close(*grads, rtol=2e-4, atol=2e-4)


def test_the_last_backend_that_got_the_model_has_it(ids):
    model = qwen3()
    plain = copy.deepcopy(model)
    first = tmx_backend(CONFIG, model=model)
    config = CONFIG.replace(triangle_layer_indices=[0])
    second = tmx_backend(config, model=model)
    with torch.no_grad():
        out = compiled(model, True, second)(ids, use_cache=False).logits
    assert [site.layers for site in second.report.triangle()] == [(0,)]
    assert_oracle(plain, ids, out, config)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.warns(UserWarning, match="handed to another backend since"):
        compiled(model, True, first)(ids, use_cache=False)
    assert not first.report.triangle()


def test_another_stack_in_the_graph_stays_dense(ids):
    """Its numbers are those of the decoder's layers, and it was not handed over."""
    both = nn.ModuleDict({"text": Pairs(), "decoder": Pairs()})

    def run(x):
        return both["decoder"](both["text"](x))

    backend = tmx_backend(CONFIG.replace(triangle_layer_indices=[1]), model=both["decoder"], strict=True)
    with torch.no_grad():
        torch.compile(run, backend=backend)(torch.randn(1, 300, 64))
    assert [site.decision for site in backend.report] == ["dense"] * 3 + ["dense", "triangle", "dense"]
    assert "not in the model" in backend.report.sites[1].detail


def test_uncompiled_calls_that_are_meant(ids):
    model = qwen3()
    backend = tmx_backend(CONFIG, model=model, strict=True)
    call = torch.compile(model, backend=backend)
    with torch.no_grad():
        sparse = call(ids).logits
        with pytest.raises(StrictModeError, match="allow_uncompiled"):
            model(ids)
        backend.allow_uncompiled()
        dense = model(ids).logits
        torch.testing.assert_close(call(ids).logits, sparse)
    assert backend.report.graphs == 1
    assert (dense - sparse).abs().max() > 1e-3


def test_a_model_from_a_file_is_handed_over_again(ids):
    """Its marks stayed behind: the backend of the first does not know it, and says so."""
    model = qwen3()
    first = tmx_backend(CONFIG, model=model)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    with torch.no_grad(), pytest.warns(UserWarning, match="not in the model that was handed over"):
        compiled(loaded, False, first)(ids)
    torch._dynamo.reset()
    second = tmx_backend(CONFIG, model=loaded, strict=True)
    with torch.no_grad():
        out = compiled(loaded, False, second)(ids).logits
    assert_oracle(model, ids, out)


def test_a_forward_that_was_replaced_since_is_marked_again(ids):
    """accelerate puts its hook's forward over the module's, and leaves the class's own there when it goes."""
    model = qwen3()
    plain = copy.deepcopy(model)
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, ModelHook())
    tmx_backend(CONFIG, model=model)
    for layer in model.model.layers:
        remove_hook_from_module(layer.self_attn)
    backend = tmx_backend(CONFIG, model=model, strict=True)
    with torch.no_grad():
        out = compiled(model, True, backend)(ids, use_cache=False).logits
    assert [site.layers for site in backend.report] == [DENSE, CONFIG.layers()]
    assert_oracle(plain, ids, out)


def test_a_forward_under_ours_is_kept(ids):
    model = qwen3()
    plain = copy.deepcopy(model)
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, ModelHook())
    backend = tmx_backend(CONFIG, model=model)
    with torch.no_grad():
        out = compiled(model, False, backend)(ids).logits
    assert [site.layer for site in backend.report.triangle()] == list(CONFIG.layers())
    assert_oracle(plain, ids, out)


def test_one_cause_is_told_once(ids):
    """A graph for each layer, and the same reason in all of them."""

    class Biased(Pairs):
        def forward(self, x):
            for attention, _ in self.layers:
                x = x + attention(x)
                torch._dynamo.graph_break()
            return x

    model = Biased()
    for attention, _ in model.layers:
        attention.bias = nn.Parameter(torch.randn(300, 300))
        attention.forward = types.MethodType(_with_a_bias, attention)
    backend = tmx_backend(CONFIG.replace(triangle_layer_indices=[0, 1, 2]), model=model)
    with torch.no_grad(), pytest.warns(UserWarning, match="went sparse") as told:
        torch.compile(model, backend=backend)(torch.randn(1, 300, 64))
    assert len([warning for warning in told if "went sparse" in str(warning.message)]) == 1


def _with_a_bias(self, x):
    q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("shape", [(300, 1, 64), (1, 300, 64)], ids=str)
def test_tokens_in_any_dimension_are_told(shape):
    model = Pairs()
    backend = tmx_backend(CONFIG.replace(triangle_layer_indices=[1]), model=model)
    with torch.no_grad(), pytest.warns(UserWarning, match="on 300 tokens"):
        model(torch.randn(shape))
    assert backend.report.uncompiled == 1


def test_a_body_that_layers_share_is_placed_by_its_calls(ids, monkeypatch):
    model = qwen3()
    plain = copy.deepcopy(model)
    backend = tmx_backend(CONFIG, model=model)
    forward = torch.compiler.nested_compile_region(Qwen3DecoderLayer.forward)
    monkeypatch.setattr(Qwen3DecoderLayer, "forward", forward)
    with torch.no_grad():
        out = compiled(model, False, backend)(ids, use_cache=False).logits
    assert [site.layer for site in backend.report.triangle()] == list(CONFIG.layers())
    assert_oracle(plain, ids, out)


def test_what_runs_uncompiled_is_told_once(ids):
    model = qwen3()
    backend = tmx_backend(CONFIG, model=model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids[:, :128])
    assert not backend.report.uncompiled
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="layer 2 ran uncompiled, dense, on 300 tokens.*nothing") as told,
    ):
        model(ids)
    assert len(told) == 1
    assert backend.report.uncompiled == 4
    assert "layer 2 ran uncompiled" in str(backend.report)


def test_a_stance_that_skips_compilation_is_told(ids):
    model = qwen3()
    backend = tmx_backend(CONFIG, model=model)
    compiled(model, False, backend)
    with torch.no_grad():
        model(ids)
        with (
            torch.compiler.set_stance("eager_on_recompile"),
            pytest.warns(UserWarning, match="ran uncompiled.*1 graphs compiled; a graph break"),
        ):
            model(ids[:, :250])
    assert backend.report.uncompiled == 4


def test_strict_raises_where_it_runs_uncompiled(ids):
    model = qwen3()
    tmx_backend(CONFIG, model=model, strict=True)
    with torch.no_grad(), pytest.raises(StrictModeError, match="layer 2 ran uncompiled"):
        model(ids)


def test_a_copied_backend_fills_the_report_of_the_first(ids):
    backend = tmx_backend(CONFIG)
    with torch.no_grad():
        compiled(qwen3(), False, copy.deepcopy(backend))(ids)
    assert backend.report.graphs == 1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Pairs(nn.Module):
    """Layers that are lists of two, as in x-transformers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Attention(), nn.Linear(64, 64)]) for _ in range(3))

    def forward(self, x):
        for attention, feed_forward in self.layers:
            x = x + attention(x)
            x = x + feed_forward(x)
        return x


def test_pairs_compiled_one_by_one():
    model = Pairs()
    backend = tmx_backend(CONFIG.replace(triangle_layer_indices=[1, 2]), model=model)
    for attention, _ in model.layers:
        attention.compile(backend=backend)
    with torch.no_grad():
        model(torch.randn(1, 300, 64))
    assert [site.layers for site in backend.report] == [(0,), (1, 2)]


def broken(model):
    """Of every layer's attention the graph breaks before, between and behind the products."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.forward = torch._dynamo.disable(layer.self_attn.q_proj.forward)
        layer.self_attn.o_proj.forward = torch._dynamo.disable(layer.self_attn.o_proj.forward)
    return model


def test_a_break_inside_attention(ids):
    """Pieces of attention modules are placed too, by two kinds of graphs."""
    model = qwen3()
    plain = copy.deepcopy(model)
    backend = tmx_backend(CONFIG, model=model, strict=True, assume_causal=True)
    with torch.no_grad():
        logits = compiled(broken(model), False, backend)(ids, use_cache=False).logits
    assert [(site.layers, site.decision) for site in backend.report] == [
        (DENSE, "dense"),
        (CONFIG.layers(), "triangle"),
    ]
    assert backend.report.uncompiled == 0
    assert_oracle(plain, ids, logits)
    # Of calls that no piece serves it is told, though others like them were sparse.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), pytest.raises(StrictModeError, match="uncompiled"):
        model(ids, use_cache=False)


def test_a_break_inside_attention_whose_mask_comes_from_another_graph_is_told(ids):
    model = broken(qwen3())
    backend = tmx_backend(CONFIG, model=model)
    with torch.no_grad(), pytest.warns(UserWarning, match="MASK_UNKNOWN") as told:
        compiled(model, False, backend)(ids, use_cache=False)
    # Once: they were compiled, and judged.
    assert (
        len([warning for warning in told if "dense" in str(warning.message) or "sparse" in str(warning.message)]) == 1
    )
    assert backend.report.uncompiled == 0


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=3)


def test_layers_of_real_models():
    llama = LlamaForCausalLM(LlamaConfig(**SMALL))
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=16, num_key_value_heads=1))
    for model in (llama, gemma):
        found = attention_layers(model)
        assert [(type(m).__name__.endswith("Attention"), n) for m, n in found.items()] == [
            (True, 0),
            (True, 1),
            (True, 2),
        ]


def test_what_cannot_be_handed_over():
    two = nn.ModuleDict({"left": Pairs(), "right": Pairs()})
    for model, message in (
        (nn.Linear(2, 2), "Linear has no attention module"),
        (two, r"more than one stack of layers, left\.layers, right\.layers"),
        (lambda x: x, "model must be a torch.nn.Module"),
        (Pairs(), r"config names layers \[5, 6, 9\], and the model has layers \[0, 1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tmx_backend(CONFIG, model=model)
