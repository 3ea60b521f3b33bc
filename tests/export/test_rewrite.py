"""``rewrite``: a graph in, a graph of the same kind out, right for every length that it takes."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.support.layers import CONFIG, Stack, expected, qkv, reasons
from tests.support.oracle import oracle
from tests.support.programs import (
    HIGH,
    LENGTHS,
    LOW,
    Attend,
    Named,
    X,
    close,
    export,
    names,
    only_operators,
    outputs,
    padded_oracle,
    projected,
    valid_keys,
    with_padding,
)
from tmx_compile import (
    LoweringError,
    Reason,
    StrictModeError,
    TriangleMixConfig,
    rewrite,
)
from tmx_compile.graph.nodes import fake_mode_of, tensor_of
from tmx_compile.operator import OPERATOR

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


def test_a_result_of_the_program_keeps_its_name_and_its_layout():
    program = export(Named(), torch.randn(X))
    after, report = rewrite(program, CONFIG, strict=True)
    assert len(report.triangle()) == 1
    assert outputs(after.graph) == outputs(program.graph)
    assert after.graph_signature == program.graph_signature
    x = torch.randn(2, 2, 130, 16)
    out = after.module()(x)
    close(out, oracle(*qkv(x), None, *CONFIG.geometry.counts, 0.25)[0])
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
