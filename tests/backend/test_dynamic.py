"""Dynamic layers through the backend: one graph for all lengths, the report, strict, and what stays dense and why."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.blocks import listed_oracle
from tmx_compile import StrictModeError, TriangleMixConfig, explain, rewrite, tmx_backend
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic import select

CONFIG = TriangleMixConfig(
    4, 32, 20, triangle_layer_indices=[2], dynamic_layer_indices=[0, 1], dynamic_block=32, dynamic_share=0.5,
    min_seq_len=128,
)  # fmt: skip


class Layer(torch.nn.Module):
    def __init__(self, **changes):
        super().__init__()
        self.changes = {"is_causal": True, "scale": 0.25, "enable_gqa": True} | changes

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x[:, ::2], x[:, ::2], **self.changes)


def three(**changes):
    return torch.nn.Sequential(Layer(), Layer(**changes), Layer())


def one_layer_oracle(x, method, group):
    keys = x[:, ::2]
    lists = select(x, keys, None, Selection(method, 0.5, 32, group, 4, 20), 0.25)
    return listed_oracle(x, keys, keys, None, lists, 32, 0.25), lists.visited


@pytest.mark.parametrize(("method", "group"), [("pooled", 16), ("pooled", 32), ("sampled", 16)])
def test_one_graph_for_all_lengths_counts_its_blocks(method, group):
    how = {"dynamic_method": method, "dynamic_group": group}
    config = CONFIG.replace(dynamic_layer_indices=[0], triangle_layer_indices=[], **how)
    backend = tmx_backend(config, strict=True)
    compiled = torch.compile(torch.nn.Sequential(Layer(), torch.nn.Identity()), backend=backend)
    for tokens in (300, 777, 391):
        x = torch.randn(2, 2, tokens, 16)
        torch._dynamo.mark_dynamic(x, 2)
        with torch.no_grad():
            out = compiled(x)
        want, visited = one_layer_oracle(x, method, group)
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
        (site,) = backend.report
        assert backend.report.density(site) == visited[0] / visited[1]
    assert backend.report.graphs == 1
    assert (site.decision, site.method, site.share) == ("dynamic", method, 0.5)
    assert f"keeps 50% of the mass, {method}" in str(backend.report)


def test_beside_triangle_layers():
    backend = tmx_backend(CONFIG, strict=True)
    with torch.no_grad():
        torch.compile(three(), backend=backend)(torch.randn(1, 2, 300, 16))
    assert [site.decision for site in backend.report] == ["dynamic", "dynamic", "triangle"]
    first, second, third = map(backend.report.density, backend.report)
    assert 0 < first < 1
    assert 0 < second < 1
    assert third is None


def test_a_share_for_each_layer():
    backend = tmx_backend(CONFIG.replace(dynamic_share=[1.0, 0.3]), strict=True)
    with torch.no_grad():
        torch.compile(three(), backend=backend)(torch.randn(1, 2, 300, 16))
    assert [site.share for site in backend.report] == [1.0, 0.3, None]
    first, second, _ = map(backend.report.density, backend.report)
    assert second < first == 1.0


def test_explain_tells_and_counts_nothing():
    report = explain(three(), torch.randn(1, 2, 300, 16), config=CONFIG)
    assert [site.decision for site in report] == ["dynamic", "dynamic", "triangle"]
    assert report.density(next(iter(report))) is None


@pytest.mark.parametrize(("changes", "reason"), [({"is_causal": False}, "NOT_CAUSAL"), ({"dropout_p": 0.1}, "DROPOUT")])
def test_only_proven_causal_sites(changes, reason):
    model, x = three(**changes), torch.randn(1, 2, 300, 16)
    report = explain(model, x, config=CONFIG)
    assert [site.reason for site in report] == ["", reason, ""]
    with torch.no_grad(), pytest.raises(Exception, match="StrictModeError"):
        torch.compile(model, backend=tmx_backend(CONFIG, strict=True))(x)


def test_what_stays_dense():
    x = torch.randn(1, 2, 300, 16)
    short = explain(three(), x[:, :, :100], config=CONFIG)
    assert {site.reason for site in short} == {"SHORT_PROMPT"}
    chunked = explain(three(), x, config=CONFIG, chunked_prefill=True)
    assert [site.detail for site in chunked][:2] == ["dynamic blocks in chunked prefill"] * 2
    training = explain(three(), x.requires_grad_(), config=CONFIG)
    assert [site.detail for site in training][:2] == ["dynamic blocks: forward only"] * 2


def test_a_program_that_is_handed_back_has_none():
    program = torch.export.export(three(), (torch.randn(1, 2, 300, 16),))
    _, report = rewrite(program, CONFIG)
    details = [site.detail for site in report][:2]
    assert all("nothing on portable" in detail for detail in details)
    with pytest.raises(StrictModeError):
        rewrite(program, CONFIG, strict=True)


def test_a_model_cannot_be_handed_over():
    with pytest.raises(ValueError, match="model cannot be handed over together with dynamic_layer_indices"):
        tmx_backend(CONFIG, model=three())
