"""Continuous batching with the switch: requests packed in one sequence, each by the plan."""

import pytest
import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from tests.support.oracle import oracle, tolerance
from tests.support.switched import CONFIG, WINDOW, prompt, registered, switched_model


class Layer(nn.Module):
    is_causal, layer_idx, num_key_value_groups = True, 1, 2


class Cache:
    """What the paged cache does with a layer's rows: hands out all keys of every request, one after another."""

    def __init__(self, keys, values, lengths):
        self.keys, self.values, self.lengths = keys, values, lengths

    def update(self, key_states, value_states, layer_idx, kwargs):
        assert layer_idx == 1
        kwargs["cu_seq_lens_k"] = starts(self.lengths)
        return self.keys, self.values


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("window", [None, WINDOW])
def test_every_request_by_itself(window):
    """Prompts, a chunk after 40 tokens, a short prompt and a decode step, and two rows of no request."""
    rows = [60, 50, 20, 1]
    keys = [60, 90, 20, 30] if window is None else [60, 50 + WINDOW - 1, 20, WINDOW]
    q = torch.randn(1, 4, sum(rows) + 2, 16)
    k, v = (torch.randn(1, 2, sum(keys), 16) for _ in range(2))
    settings = dict(
        cache=Cache(k, v, keys), cu_seq_lens_q=starts(rows), cu_seq_lens_k={}, sliding_window=window, is_causal=True
    )
    with registered(CONFIG) as attention:
        out, weights = attention.forward_paged(Layer(), q, None, None, None, scaling=0.25, **settings)
    assert weights is None
    assert not out[:, sum(rows) :].any()
    reach = None if window is None else window - 1
    for i, n in enumerate(rows):
        here, there = slice(sum(rows[:i]), sum(rows[: i + 1])), slice(sum(keys[:i]), sum(keys[: i + 1]))
        # With a window the chunk's first keys are gone, and with them the sinks.
        sparse = i == 0 or (i == 1 and window is None)
        geometry = CONFIG.geometry.counts if sparse else (0, 0, n)
        want, _ = oracle(q[:, :, here], k[:, :, there], v[:, :, there], None, *geometry, 0.25, reach)
        torch.testing.assert_close(out[:, here].transpose(1, 2).double(), want, atol=tolerance(q.dtype), rtol=0)
    reasons = {site.reason for site in attention.report}
    assert reasons == {"", "SHORT_PROMPT"} | ({"POSITIONS_UNKNOWN"} if window else set())


def test_generate_batch():
    """The tokens of each prompt are those of ``generate`` with the prompt alone."""
    prompts = [prompt(1, n)[0].tolist() for n in (100, 60, 20, 90)]
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with registered(CONFIG) as attention:
        model = switched_model("Mistral")
        with registered(CONFIG), torch.no_grad():
            want = [model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in prompts]
        attention.batch_continuously(model)
        small = ContinuousBatchingConfig(page_size=32, num_blocks=32, max_batch_tokens=512, use_cuda_graph=False)
        found = model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(**settings),
            continuous_batching_config=small,
            warmup=False,
        )
        assert [result.generated_tokens for result in found.values()] == want
        assert {site.layer for site in attention.report.triangle()} == {1, 2}
        model.set_attn_implementation("tmx")
        model(prompt())


def test_other_calls_are_refused():
    with registered(CONFIG) as attention:
        model = switched_model()
        attention.batch_continuously(model)
        with pytest.raises(ValueError, match="is for continuous batching"):
            model(prompt())
