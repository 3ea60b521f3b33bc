"""Strict mode raises wherever a layer that the configuration names ends dense in a long prompt, whatever the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.layers import CONFIG, Call, Layer, N, Stack, causal, random
from tmx_compile import rewrite, tmx_backend
from tmx_compile.errors import StrictModeError

ALL = CONFIG.replace(triangle_layer_indices=[0, 1])


def from_data(x):
    mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask & (x[..., :1] > -9))


def encoder(x):
    return F.scaled_dot_product_attention(x, x, x)


def with_dropout(x):
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True)


def grouped(x):
    """Half as many key heads; where both are symbols that one divides the other cannot be told."""
    return F.scaled_dot_product_attention(x[0], x[1], x[1], is_causal=True, enable_gqa=True)


def run(model, *args, config=CONFIG, **options):
    return torch.compile(model, backend=tmx_backend(config, strict=True), **options)(*args)


def raises(reason):
    return pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=f"StrictModeError.*{reason}")


REFUSED = {
    "a mask from data": (from_data, "the mask depends on data"),
    "an encoder": (encoder, "the mask is not causal"),
    "dropout": (with_dropout, "attention dropout is active"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_long_prompt_raises_and_a_short_one_does_not(name, eager):
    attend, reason = REFUSED[name]
    run(Stack(attend), random(1, 2, 100, 16))
    torch._dynamo.reset()
    with raises(reason):
        run(Stack(attend), random(1, 2, N, 16))


@pytest.mark.parametrize("name", REFUSED)
def test_dynamic_lengths_are_short_until_they_are_long(name, eager):
    attend, reason = REFUSED[name]
    compiled = torch.compile(Stack(attend), backend=tmx_backend(CONFIG, strict=True))

    def input_of(n):
        x = random(1, 2, n, 16)
        torch._dynamo.mark_dynamic(x, 2)
        return x

    for n in (60, 90):
        compiled(input_of(n))
    with raises(reason):
        compiled(input_of(N))


@pytest.mark.parametrize("name", REFUSED)
def test_a_fixed_range_across_the_threshold_has_long_prompts(name, eager):
    attend, reason = REFUSED[name]
    x = random(1, 2, 60, 16)
    torch._dynamo.mark_dynamic(x, 2, min=20, max=300)
    with raises(reason):
        run(Stack(attend), x)


def test_layers_that_the_configuration_keeps_dense_may_be_anything(eager):
    run(Stack(from_data), random(1, 2, N, 16), config=CONFIG.replace(triangle_layer_indices=[7]))


@pytest.mark.parametrize("attend", [causal, from_data, with_dropout])
def test_a_site_without_a_number_may_be_a_layer_that_was_named(attend, eager):
    run(Call(attend), random(1, 2, 100, 16))
    torch._dynamo.reset()
    with raises("Call|names no layer|dropout|no path"):
        run(Call(attend), random(1, 2, N, 16))


def test_an_encoder_without_a_number_is_none_that_was_named(eager):
    x = random(1, 2, N, 16)
    torch.testing.assert_close(run(Call(encoder), x), encoder(x))


def test_heads_that_became_symbols(eager):
    """Automatic dynamic shapes: the second number of heads makes it a symbol, and no site can be read any more."""
    for model in (Grouped(), Call(grouped)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=tmx_backend(ALL, strict=True))
        # The layer without a number is refused in a long prompt anyway.
        n = N if isinstance(model, Grouped) else 90
        compiled((random(1, 4, n, 16), random(1, 2, n, 16)))
        many = random(1, 8, n, 16), random(1, 4, n, 16)
        if n < N:
            compiled(many)
            many = random(1, 8, N, 16), random(1, 4, N, 16)
        with raises("key heads dividing"):
            compiled(many)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Call(grouped)])

    def forward(self, x):
        return self.layers[0](x)


def test_chunks_of_a_long_prompt_may_be_short(eager):
    """With chunked_prefill a call's length tells nothing: what is refused is refused at any."""
    backend = tmx_backend(CONFIG, strict=True, chunked_prefill=True)
    with raises("the mask depends on data"):
        torch.compile(Stack(from_data), backend=backend)(random(1, 2, 30, 16))
    torch._dynamo.reset()
    backend = tmx_backend(CONFIG, strict=True, chunked_prefill=True)
    torch.compile(Stack(from_data), backend=backend)(random(1, 2, 1, 16))


@pytest.mark.parametrize("attend", [from_data, with_dropout])
def test_rewrite_is_strict_too(attend):
    for n in (60, N):
        program = torch.export.export(Stack(attend), (random(1, 2, n, 16),), strict=False)
        if n <= CONFIG.min_seq_len:
            rewrite(program, CONFIG, strict=True)
        else:
            with pytest.raises(StrictModeError, match=r"layers\.1"):
                rewrite(program, CONFIG, strict=True)


def test_a_result_whose_layout_is_not_known_raises():
    class Odd(nn.Module):
        def forward(self, x):
            return x + F.scaled_dot_product_attention(x, x, x, is_causal=True)

    model = nn.Sequential(Odd())
    config = CONFIG.replace(triangle_layer_indices=[0])
    program = torch.export.export(model, (random(1, 2, N, 16),), strict=False).run_decompositions({})
    for node in program.graph.nodes:
        if "scaled_dot_product" in str(node.target):
            # As no operator leaves it: rows that overlap.
            values = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
            first = values[0].new_empty_strided((1, 2, N, 16), (2 * N * 16, N * 16, 8, 1))
            node.meta["val"] = (first, *values[1:]) if isinstance(node.meta["val"], tuple) else first
            for user in node.users:
                if user.target.__name__ == "getitem" and user.args[1] == 0:
                    user.meta["val"] = first
    _, report = rewrite(program, config)
    assert [site.reason for site in report] == ["LAYOUT"]
    with pytest.raises(StrictModeError, match="the result has strides"):
        rewrite(program, config, strict=True)


def test_every_site_of_a_stack_is_looked_at(eager):
    """The first layer may go sparse, the second may not."""

    class Mixed(Stack):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer(with_dropout)])

    with raises("attention dropout"):
        run(Mixed(), random(1, 2, N, 16), config=ALL)
