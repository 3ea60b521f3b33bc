"""Dynamic layers through the attention implementation: what they compute, count, and leave dense."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tmx_compile import StrictModeError, TriangleMixConfig
from tmx_compile.integrations.transformers import register_attention

CONFIG = TriangleMixConfig(
    4, 32, 20, triangle_layer_indices=[1], dynamic_layer_indices=[0], dynamic_block=32, dynamic_share=1.0,
    min_seq_len=128,
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16)).eval()


def logits(model, config, ids, mask, **options):
    attention = register_attention(config, name="dynamic", **options)
    model.set_attn_implementation("dynamic")
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits, attention.report


def test_with_padding_and_counts(model):
    ids = torch.randint(0, 64, (2, 300))
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    dense, _ = logits(model, CONFIG.replace(dynamic_layer_indices=None), ids, mask)
    # The whole mass is every block.
    out, report = logits(model, CONFIG, ids, mask, strict=True)
    torch.testing.assert_close(out[mask.bool()], dense[mask.bool()], atol=1e-4, rtol=0)
    assert [(site.layer, site.decision) for site in report] == [(0, "dynamic"), (1, "triangle")]
    assert [report.density(site) for site in report] == [1.0, None]
    _, report = logits(model, CONFIG.replace(dynamic_share=0.3), ids, mask)
    assert 0 < report.density(next(iter(report))) < 1


def test_chunked_prefill_is_dense_with_the_reason(model):
    ids = torch.randint(0, 64, (1, 300))
    _, report = logits(model, CONFIG, ids, None, chunked_prefill=True)
    assert next((site.decision, site.detail) for site in report) == ("dense", "dynamic blocks in chunked prefill")
    with pytest.raises(StrictModeError, match="chunked prefill"):
        logits(model, CONFIG, ids, None, chunked_prefill=True, strict=True)


def test_a_share_for_each_layer(model):
    config = CONFIG.replace(triangle_layer_indices=None, dynamic_layer_indices=[1, 0], dynamic_share=[0.3, 1.0])
    _, report = logits(model, config, torch.randint(0, 64, (1, 300)), None)
    assert [(site.layer, site.share) for site in report] == [(0, 1.0), (1, 0.3)]
    first, second = map(report.density, report)
    assert second < first == 1.0
