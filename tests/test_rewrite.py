"""``rewrite``: a graph in, a graph of the same kind out, right for every length that it takes."""

import subprocess
import sys

import pytest
import support
import torch
import torch.nn.functional as F
from layered import CONFIG, Layer, Stack, causal, expected, qkv, reasons
from support import masked_oracle, oracle, tiny_qwen3
from torch import nn
from torch.export import Dim
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from tmx_compile import (
    LoweringError,
    Reason,
    StrictModeError,
    TriangleMixConfig,
    TriangleMixInferenceConfig,
    VerificationError,
    rewrite,
)
from tmx_compile.graph.nodes import fake_mode_of, op_name, tensor_of
from tmx_compile.operator import ALL_ROWS, OPERATOR
from tmx_compile.passes import program as standalone

LOW, HIGH = CONFIG.min_seq_len + 1, 256
LENGTHS = (LOW, 128, 159, HIGH)
X = (2, 2, 150, 16)


def attended(q_len, kv_len, key_mask, sink, window, last, *rest):
    """``support.attended`` for whole tensors: its loops over cells would be most of the time of these tests."""
    assert not any(rest)
    valid = torch.ones(1, kv_len, dtype=torch.bool) if key_mask is None else key_mask
    key = torch.arange(kv_len)
    start = torch.where(valid, key, kv_len).amin(1)[:, None, None]
    end = torch.where(valid, key + 1, 0).amax(1)[:, None, None]
    row = (torch.arange(q_len) + kv_len - q_len)[None, :, None]
    final = (row >= end - last) & ((row < end) | (last >= ALL_ROWS))
    near = (key < start + sink) | (row - key <= window) | final
    return near & (key <= row) & valid[:, None]


@pytest.fixture(autouse=True)
def _fast_oracle(monkeypatch):
    monkeypatch.setattr(support, "attended", attended)


def test_the_fast_oracle_is_the_oracle(monkeypatch):
    monkeypatch.undo()
    for mask in (None, torch.rand(3, 29) < 0.7, torch.zeros(2, 29, dtype=torch.bool)):
        for geometry in ((0, 0, 0), (3, 5, 4), (40, 0, 1), (0, 2**31 - 1, 2), (0, 0, 2**31 - 1)):
            for q_len in (29, 11):
                fast = attended(q_len, 29, mask, *geometry)
                assert torch.equal(fast, support.attended(q_len, 29, mask, *geometry))


def with_padding(x, valid):
    position = torch.arange(x.shape[2], device=x.device)
    mask = (position[:, None] >= position).to(torch.bool) & valid[:, None, None, :]
    return F.scaled_dot_product_attention(*qkv(x), attn_mask=mask)


def projected(x):
    """As models do it: (B, N, H, D) in memory, and heads merged again by a view of attention's result."""
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(x))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    batch, heads, length, dim = out.shape
    merged = out.transpose(1, 2).contiguous().view(batch, length, heads * dim)
    return merged.unflatten(-1, (heads, dim)).transpose(1, 2)


def export(model, *args, low=LOW, high=HIGH, **settings):
    """A program with a dynamic length; args are (B, H, N, D) tensors and (B, N) masks."""
    length = Dim("n", min=low, max=high)
    shapes = tuple({2: length} if x.dim() == 4 else {1: length} for x in args)
    if isinstance(model, Stack):
        shapes = (shapes[0], shapes[1:]) if shapes[1:] else shapes
    return torch.export.export(model, args, dynamic_shapes=shapes, **settings)


def valid_keys(length):
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, :17] = False
    return valid


def padded_oracle(x, valid):
    """``Stack(with_padding)`` in float64; rows of padding are never looked at."""
    x = x.double()
    for index in range(2):
        geometry = CONFIG.geometry if index in CONFIG.layers() else (0, 0, 2**31 - 1)
        x = x + oracle(*qkv(x), valid, *geometry, x.shape[-1] ** -0.5)[0]
    return x


def close(got, want):
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


def names(graph, op):
    return [node.name for node in graph.nodes if node.op == op]


def outputs(graph):
    return [node.name for node in graph.output_node().all_input_nodes]


def only_operators(gm):
    return all(
        isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
        or getattr(node.target, "__module__", "") in ("_operator", "math", "torch")  # arithmetic of lengths
        for node in gm.graph.nodes
        if node.op == "call_function"
    ) and not any(node.op == "call_method" for node in gm.graph.nodes)


# Exported programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["auto", "operator"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_one_program_is_right_for_every_length(strict, lowering):
    program = export(Stack(), torch.randn(X), strict=strict)
    for before in (program, program.run_decompositions({})):
        after, report = rewrite(before, CONFIG, lowering=lowering, strict=True)
        assert [(s.path, s.layer, s.decision) for s in report] == [
            ("layers.0", 0, "dense"),
            ("layers.1", 1, "triangle"),
        ]
        assert report.sites[1].lowering == {"auto": "blocked"}.get(lowering, lowering)
        for length in LENGTHS:
            x = torch.randn(2, 2, length, 16)
            close(after.module()(x), expected(x, CONFIG))
        assert only_operators(after.graph_module)
        assert after.dialect == before.dialect


@pytest.mark.parametrize("no_grad", [False, True])
def test_padding_with_a_dynamic_length_and_batch(no_grad):
    length, batch = Dim("n", min=LOW, max=HIGH), Dim("b", min=1, max=9)
    x, shapes = torch.randn(X), ({0: batch, 2: length}, ({0: batch, 1: length},))
    program = torch.export.export(Stack(with_padding), (x, valid_keys(150)), dynamic_shapes=shapes)
    with torch.set_grad_enabled(not no_grad):
        after, report = rewrite(program, CONFIG, strict=True)
    assert [site.lowering for site in report] == ["sdpa", "blocked"]
    for n in LENGTHS:
        x, valid = torch.randn(2, 2, n, 16), valid_keys(n)
        got, want = after.module()(x, valid), padded_oracle(x, valid)
        close(got[valid[:, None].expand(-1, 2, -1)], want[valid[:, None].expand(-1, 2, -1)])
    # No (rows, keys) tensor is left in it, not even for a check of its dtype.
    sizes = [tensor_of(node).shape for node in after.graph.nodes if tensor_of(node) is not None]
    square = [
        shape for shape in sizes if len(shape) > 1 and isinstance(shape[-2], torch.SymInt) and shape[-1] == shape[-2]
    ]
    assert square == []


def test_the_program_that_goes_in_stays_as_it_is():
    model = Stack(with_padding)
    model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    model.head = nn.Linear(16, 16)
    stack_forward = model.forward

    def forward(x, *rest):
        model.steps.add_(1)
        return model.head(stack_forward(x, *rest)), x.shape[2]

    model.forward = forward
    x, valid = torch.randn(X), valid_keys(150)
    before = torch.export.export(
        model, (x, valid), dynamic_shapes=({2: (n := Dim("n", min=LOW, max=HIGH))}, ({1: n},)), strict=False
    )
    env = fake_mode_of(before.graph_module).shape_env
    kept = [str(before), dict(env.var_to_range), [g.expr for g in env.guards], dict(env.replacements), env.frozen]
    metas = [dict(node.meta) for node in before.graph.nodes]
    after, _ = rewrite(before, CONFIG, strict=True)
    assert kept == [str(before), env.var_to_range, [g.expr for g in env.guards], env.replacements, env.frozen]
    assert metas == [node.meta for node in before.graph.nodes]
    assert after is not before
    # What makes a program a program.
    assert after.graph_signature == before.graph_signature
    assert after.range_constraints == before.range_constraints
    assert [e.fqn for e in after.module_call_graph] == [e.fqn for e in before.module_call_graph]
    assert after.verifiers == before.verifiers
    assert after.state_dict is before.state_dict
    assert names(after.graph, "placeholder") == names(before.graph, "placeholder")
    assert outputs(after.graph) == outputs(before.graph)
    # It still counts its steps, in its own copy of the buffer, and still checks its inputs.
    module = after.module()
    (_, length), _ = module(x, valid), module(x, valid)
    assert (length, int(module.steps)) == (150, 2)
    with pytest.raises(Exception, match=r"n|size|<="):
        module(torch.randn(2, 2, HIGH + 1, 16), valid_keys(HIGH + 1))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), Attend()])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


class Attend(nn.Module):
    def forward(self, x):
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(x))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_result_of_the_program_keeps_its_name_and_its_layout():
    program = export(Named(), torch.randn(X))
    after, report = rewrite(program, CONFIG, strict=True)
    assert len(report.triangle()) == 1
    assert outputs(after.graph) == outputs(program.graph)
    assert after.graph_signature == program.graph_signature
    x = torch.randn(2, 2, 130, 16)
    out = after.module()(x)
    close(out, oracle(*qkv(x), None, *CONFIG.geometry, 0.25)[0])
    assert out.stride() == program.module()(x).stride()


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_view_that_relies_on_the_layout_of_the_result(decomposed):
    program = export(Stack(projected), torch.randn(X))
    program = program.run_decompositions({}) if decomposed else program
    after, report = rewrite(program, CONFIG, strict=True)
    assert len(report.triangle()) == 1
    for length in LENGTHS:
        x = torch.randn(2, 2, length, 16)
        close(after.module()(x), expected(x, CONFIG))


def test_a_rewritten_program_can_be_rewritten():
    """For another layer, say; and what was sparse before stays so."""
    first = TriangleMixConfig(triangle_layer_indices=[0], num_last_tokens=8, sliding_window_size=16, min_seq_len=100)
    program = export(Stack(), torch.randn(X))
    again, _ = rewrite(program, first, strict=True)
    after, report = rewrite(again, CONFIG, strict=True)
    assert len(report.triangle()) == 1
    assert after.graph_signature == program.graph_signature
    both = TriangleMixConfig(triangle_layer_indices=[0, 1], num_last_tokens=8, sliding_window_size=16, min_seq_len=100)
    assert first.geometry == both.geometry == CONFIG.geometry
    x = torch.randn(2, 2, 130, 16)
    close(after.module()(x), expected(x, both))


def test_names_of_an_earlier_rewriting_are_names_of_the_program():
    model = Named()
    model.layers[0] = Attend()
    first, second = (TriangleMixConfig(triangle_layer_indices=[i], min_seq_len=100) for i in (1, 0))
    program = export(model, torch.randn(X))
    once, _ = rewrite(program, first, strict=True)
    twice, report = rewrite(once, second, strict=True)
    assert len(report.triangle()) == 1
    assert outputs(twice.graph) == outputs(once.graph) == outputs(program.graph)


def test_flex_is_for_those_who_name_it():
    with torch.no_grad():
        program = export(Stack(), torch.randn(X))
        after, report = rewrite(program, CONFIG, lowering="flex", strict=True)
    assert report.sites[1].lowering == "flex"
    assert "epilogue_fusion=False" in report.notes[0]
    assert any("flex_attention" in str(node.target) for node in after.graph.nodes)
    for length in LENGTHS[:3]:
        x = torch.randn(2, 2, length, 16)
        with torch.no_grad():
            close(after.module()(x), expected(x, CONFIG))


def test_gradients_flow_through_a_rewritten_program():
    x = torch.randn(2, 2, 130, 16, requires_grad=True)
    after, _ = rewrite(export(Stack(), torch.randn(X, requires_grad=True)), CONFIG, strict=True)
    (got,) = torch.autograd.grad(after.module()(x).square().sum(), x)
    (want,) = torch.autograd.grad(expected(x, CONFIG).square().sum(), x)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


# Lengths -------------------------------------------------------------------------------------------------------------


def test_a_range_that_reaches_down_to_min_seq_len_stays_dense():
    """One graph has to be right for all of it, and nothing could choose."""
    exported = export(Stack(), torch.randn(X), low=CONFIG.min_seq_len)
    free = torch.export.export(Stack(), (torch.randn(X),), dynamic_shapes=({2: Dim.DYNAMIC},))
    for program in (exported, exported.run_decompositions({}), free):
        env = fake_mode_of(program.graph_module).shape_env
        guards, ranges = list(env.guards), dict(env.var_to_range)
        after, report = rewrite(program, CONFIG)
        assert reasons(report) == [Reason.NOT_SELECTED.name, Reason.NO_DISPATCH.name]
        assert (env.guards, env.var_to_range) == (guards, ranges)
        for length in (CONFIG.min_seq_len, HIGH):
            x = torch.randn(2, 2, length, 16)
            assert torch.equal(after.module()(x), program.module()(x))
        with pytest.raises(StrictModeError, match=Reason.NO_DISPATCH.value):
            rewrite(program, CONFIG, strict=True)


def test_a_range_without_an_end():
    length = Dim("n", min=LOW)
    program = torch.export.export(Stack(), (torch.randn(X),), dynamic_shapes=({2: length},))
    after, _ = rewrite(program, CONFIG, strict=True)
    x = torch.randn(2, 2, 519, 16)
    close(after.module()(x), expected(x, CONFIG))


def test_a_short_static_length_stays_dense():
    program = torch.export.export(Stack(), (torch.randn(1, 2, 100, 16),))
    _, report = rewrite(program, CONFIG)
    assert reasons(report) == [Reason.NOT_SELECTED.name, Reason.SHORT_PROMPT.name]


def test_what_cannot_be_shown_for_every_length_falls_back_to_the_operator(monkeypatch):
    monkeypatch.setattr("tmx_compile.graph.guards.holds_always", lambda expr, bounds: False)
    program = export(Stack(), torch.randn(X))
    after, report = rewrite(program, CONFIG)
    assert report.sites[1].lowering == "operator"
    assert any(node.target is OPERATOR for node in after.graph.nodes)
    assert "import tmx_compile" in report.notes[0]
    with pytest.raises(LoweringError, match="cannot be shown for every length"):
        rewrite(program, CONFIG, lowering="blocked")


# Graph modules -------------------------------------------------------------------------------------------------------


def check_module(before, x):
    """A rewritten graph module computes the triangle, and the one that went in what it did."""
    text = str(before.graph)
    after, report = rewrite(before, CONFIG, strict=True)
    assert isinstance(after, GraphModule)
    assert str(before.graph) == text
    assert len(report.triangle()) == 1
    assert names(after.graph, "placeholder") == names(before.graph, "placeholder")
    got = after(x)
    close(got[0] if isinstance(got, (tuple, list)) else got, expected(x, CONFIG))
    return after


def test_the_module_of_a_program():
    module = export(Stack(), torch.randn(X)).module()
    for length in LENGTHS:
        after = check_module(module, torch.randn(2, 2, length, 16))
    assert only_operators(after)
    assert len(after._forward_pre_hooks) == len(module._forward_pre_hooks)
    for checked in (module, after):
        with pytest.raises(Exception, match=r"n|size|<="):
            checked(torch.randn(2, 2, HIGH + 1, 16))


def seen_by(make_backend, model, *args, dynamic=None):
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=make_backend(keep), dynamic=dynamic)(*args)
    (gm,) = graphs
    return gm


def test_a_graph_that_dynamo_captured():
    check_module(seen_by(lambda keep: keep, Stack(), torch.randn(X)), torch.randn(X))


@pytest.mark.parametrize("attend", [causal, projected])
def test_a_graph_that_aot_autograd_traced(attend):
    from torch._dynamo.backends.common import aot_autograd

    gm = seen_by(lambda keep: aot_autograd(fw_compiler=keep), Stack(attend), torch.randn(X))
    assert any("flash_attention_for_cpu" in str(node.target) for node in gm.graph.nodes)
    # The heads are merged by a view alone: attention's result lies in memory as it wants.
    copies = sum(op_name(node) == "clone" for node in gm.graph.nodes)
    assert copies == (6 if attend is projected else 0)
    with torch.no_grad():
        after = check_module(gm, torch.randn(X))
    assert only_operators(after)
    # Composite operators do not come back into a graph that had none.
    assert not any(str(node.target).startswith("aten.scaled_dot") for node in after.graph.nodes)
    # The dense call went with all of its outputs.
    assert sum("flash_attention_for_cpu" in str(node.target) for node in gm.graph.nodes) == 2
    assert not any(n.name.startswith("_scaled") and n.name.endswith("cpu_1") for n in after.graph.nodes)


def test_make_fx_records_no_layers():
    x = torch.randn(X)
    gm = make_fx(Stack())(x)
    _, report = rewrite(gm, CONFIG)
    assert reasons(report) == [Reason.LAYER_UNKNOWN.name] * 2
    for index, node in enumerate(n for n in gm.graph.nodes if n.name.startswith("_scaled")):
        for entry in node.users:
            entry.meta["nn_module_stack"] = {"layer": (f"layers.{index}", Layer)}
    after = check_module(gm, torch.randn(X))
    # The dense call of layer 1 is gone, though nothing read its log-sum-exp before either.
    left = [n.name for n in after.graph.nodes if n.name.startswith("_scaled")]
    assert left == ["_scaled_dot_product_flash_attention_for_cpu"]


def test_a_graph_without_shapes_is_an_error_that_says_so():
    gm = symbolic_trace(Named())
    with pytest.raises(
        ValueError, match=r"node 'x' has neither meta\['val'\] nor meta\['example_value'\].*FakeTensorProp"
    ):
        rewrite(gm, CONFIG)
    x = torch.randn(X)
    FakeTensorProp(gm).propagate(x)
    after, report = rewrite(gm, CONFIG, strict=True)
    assert len(report.triangle()) == 1
    close(after(x), oracle(*qkv(x), None, *CONFIG.geometry, 0.25)[0])


# Arguments -----------------------------------------------------------------------------------------------------------


def test_bad_arguments():
    program = torch.export.export(Stack(), (torch.randn(X),))
    with pytest.raises(ValueError, match=r"GraphModule or a torch.export.ExportedProgram, got Stack"):
        rewrite(Stack(), CONFIG)
    with pytest.raises(ValueError, match="lowering must be one of"):
        rewrite(program, CONFIG, lowering="fast")
    with pytest.raises(ValueError, match="strict"):
        rewrite(program, CONFIG, strict=1)
    with pytest.raises(ValueError, match="config must be"):
        rewrite(program, {"num_sink_tokens": 4})


def test_a_disabled_configuration_changes_nothing():
    program = torch.export.export(Stack(), (torch.randn(X),))
    after, report = rewrite(program, TriangleMixInferenceConfig())
    assert len(report) == 0
    assert str(after) == str(program)


def test_a_constant_that_tracing_leaves_is_a_defect():
    """Constants would have to be lifted into the program: the pass writes none, and says so if one shows up."""
    program = torch.export.export(Stack(), (torch.randn(X),))
    after, _ = rewrite(program, CONFIG)
    x = torch.randn(X)
    close(after.module()(x), expected(x, CONFIG))
    with pytest.raises(VerificationError, match="left a constant"):
        standalone._Retracer(after.graph_module, composite=True)._adopt(torch.ones(3))


# Real models ---------------------------------------------------------------------------------------------------------


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **heads)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).eval()


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize(
    ("make", "strict", "dynamic", "padded"),
    [
        (tiny_qwen3, False, True, False),
        (tiny_qwen3, True, True, True),
        (tiny_qwen3, True, False, False),
        (tiny_llama, False, True, True),
        (tiny_llama, True, True, False),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_real_models(make, strict, dynamic, padded):
    model, length = make(), Dim("n", min=LOW, max=HIGH)
    args = (torch.randint(0, 128, (2, 150)), torch.ones(2, 150, dtype=torch.int64))[: 2 if padded else 1]
    shapes = tuple({1: length} for _ in args) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(Logits(model), args, dynamic_shapes=shapes, strict=strict)
        for before in (program, program.run_decompositions({})):
            after, report = rewrite(before, CONFIG, strict=True)
            paths = [f"model.model.layers.{i}.self_attn" for i in (0, 1)]
            assert [site.path for site in report] == paths
            assert [site.key[1] for site in report] == [2, 2]
            for n in (LOW, 192) if dynamic else (150,):
                ids, valid = torch.randint(0, 128, (2, n)), valid_keys(n)
                rest = (valid.to(torch.int64),) if padded else ()
                got, want = after.module()(ids, *rest), masked_oracle(model, CONFIG, ids, *rest)
                close(*(x[valid] if padded else x for x in (got, want)))
    # With every row a last row the triangle is the causal mask: the model's own logits.
    whole = TriangleMixConfig(triangle_layer_indices=[0, 1], num_last_tokens=4000, min_seq_len=100)
    with torch.no_grad():
        after, report = rewrite(program, whole, lowering="operator", strict=True)
        assert len(report.triangle()) == 2
        torch.testing.assert_close(after.module()(*args), model(args[0]).logits, atol=2e-5, rtol=0)


# Fresh processes -----------------------------------------------------------------------------------------------------

_CHILD = """
import sys, torch
folder, operator = sys.argv[1], sys.argv[2] == "operator"
if operator:
    import tmx_compile
cases = torch.load(f"{folder}/cases.pt")
runs = [torch.export.load(f"{folder}/program.pt2").module()]
if not operator:
    runs.append(torch._inductor.aoti_load_package(f"{folder}/package.pt2"))
for run in runs:
    for args, want, valid in cases:
        with torch.no_grad():
            got = run(*args).double()
        keep = valid[:, None].expand(-1, 2, -1)
        torch.testing.assert_close(got[keep], want[keep], atol=2e-5, rtol=0)
assert ("tmx_compile" in sys.modules) == operator
print("ran", len(runs), "programs")
"""


@pytest.mark.parametrize("lowering", ["auto", "operator"])
def test_saved_loaded_and_packaged_programs_run_in_a_fresh_process(lowering, tmp_path):
    """One package for several lengths; only the opaque operator needs this package there."""
    x = torch.randn(X)
    with torch.no_grad():
        program = export(Stack(with_padding), x, valid_keys(150))
        after, report = rewrite(program, CONFIG, lowering=lowering, strict=True)
        assert len(report.triangle()) == 1
        torch.export.save(after, tmp_path / "program.pt2")
        if lowering == "auto":
            torch._inductor.aoti_compile_and_package(after, package_path=str(tmp_path / "package.pt2"))
    cases = []
    for n in LENGTHS:
        x, valid = torch.randn(2, 2, n, 16), valid_keys(n)
        cases.append(((x, valid), padded_oracle(x, valid), valid))
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-c", _CHILD, str(tmp_path), lowering]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"ran {1 if lowering == 'operator' else 2} programs" in done.stdout
