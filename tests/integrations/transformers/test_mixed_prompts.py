"""Prompts of mixed lengths, batch sizes and padding: no graph more than without us, and sparse past Dynamo's limit."""

import gc
import logging
import random
import warnings
import weakref

import pytest
import torch
from torch import nn

from tests.support.generation import answered, living_tensors
from tests.support.layers import Stack, causal
from tests.support.models import masked_oracle, with_masks
from tests.support.oracle import attended
from tests.support.switched import CONFIG, registered, switched_model
from tmx_compile import StrictModeError, tmx_backend

pytestmark = pytest.mark.usefixtures("eager")
LIMIT = CONFIG.min_seq_len
GENERATED = 3
LAYERS = dict(num_hidden_layers=2)
ONE = CONFIG.replace(triangle_layer_indices=[1])


def mixed_prompts(count, seed, most=120):
    """(ids, attention mask) of 1 to 3 sequences, some with padding on the left, on both sides of the limit."""
    chance = random.Random(seed)
    for _ in range(count):
        batch, n = chance.randint(1, 3), chance.randint(8, most)
        mask = torch.ones(batch, n, dtype=torch.long)
        if chance.random() < 0.7:
            for row in range(batch):
                mask[row, : chance.randint(0, n // 2)] = 0
        yield torch.randint(3, 128, (batch, n)), mask


def graphs_of(backend, prompts):
    """How many graphs Dynamo compiles for a load."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = switched_model(implementation="sdpa", **LAYERS)
    model.compile(backend=backend)
    for ids, mask in prompts:
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            config = ONE if ids.shape[1] > LIMIT else ONE.replace(triangle_layer_indices=[])
            if backend != "eager":
                want = masked_oracle(model, config, ids, mask)
                torch.testing.assert_close(logits[mask.bool()].double(), want[mask.bool()], atol=5e-5, rtol=0)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("first", [20, 90], ids=["short first", "long first"])
def test_no_more_graphs_than_inductor_alone(first):
    """Each kind of prompt (one sequence or several, here always padded) comes on either side of the limit."""
    lengths = (first, 33, 32, 110, 21, 64)
    prompts = [(torch.randint(3, 128, (2, n)), torch.ones(2, n, dtype=torch.long)) for n in lengths]
    for _, mask in prompts:
        mask[0, :5] = 0
    backend = tmx_backend(ONE, strict=True)
    assert graphs_of(backend, prompts) == graphs_of("eager", prompts) == backend.report.graphs == 2


def oracle_logits(model, config, tokens, mask):
    """Logits of every answered token in float64: the prompt under the triangle, the answer's rows dense."""
    n, total = mask.shape[1], tokens.shape[1]
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], total - n)], 1)
    plain = attended(total, total, mask.bool(), 0, 0, total)
    triangle = plain.clone()
    if n > config.min_seq_len:
        triangle[:, :n, :n] = attended(n, n, mask[:, :n].bool(), *config.geometry.counts)
    masks = {layer: triangle if layer in config.layers() else plain for layer in range(LAYERS["num_hidden_layers"])}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return with_masks(model, tokens, masks, mask, position_ids=positions)[:, n - 1 : total - 1]


def test_a_soak_past_the_limit_stays_sparse():
    """Graphs and memory stay as they are, and every answer is the oracle's, compiled or not."""
    # What other tests left behind may go at any time: it has to be told apart.
    others = [weakref.ref(each) for each in living_tensors()]
    with registered(ONE) as attention, torch._dynamo.config.patch(recompile_limit=4):
        model = switched_model(**LAYERS)
        plain = switched_model(implementation="sdpa", **LAYERS)
        backend = tmx_backend(ONE, model=model)
        model.compile(backend=backend)
        counts, said = [], []
        for turn, (ids, mask) in enumerate(mixed_prompts(16, seed=random.randrange(1 << 30))):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                tokens, logits = answered(model, ids, mask, GENERATED)
            said += [str(each.message) for each in told if "register_attention" in str(each.message)]
            torch.testing.assert_close(logits.double(), oracle_logits(plain, ONE, tokens, mask), atol=2e-4, rtol=0)
            if turn in (7, 15):
                old = {id(each()) for each in others}
                counts.append((backend.report.graphs, sum(id(each) not in old for each in living_tensors())))
    report = backend.report
    assert len(said) == 1
    assert said[0] in report.notes
    assert counts[0] == counts[1]
    assert report.graphs == 4
    assert report.triangle()
    assert report.switched > 0
    assert report.uncompiled == 0
    assert "sparse through the switch" in str(report)
    assert {site.layer for site in attention.report.triangle()} == {1}


def past_the_limit(backend, model=None):
    """Two kinds of prompts where Dynamo compiles one, and the first again."""
    compiled = torch.compile(model or Stack(), backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in (80, 81, 80):
            compiled(torch.randn(1, 2, n, 16))


class Attention(nn.Module):
    def forward(self, x):
        return causal(x)


class Attentions(nn.Module):
    """Layers that are modules of attention."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_limit_is_told_without_the_model():
    backend = tmx_backend(ONE)
    with pytest.warns(UserWarning, match=r"no more graphs of a function after 1.*recompile_limit is 1") as told:
        past_the_limit(backend)
    assert len(told) == 1
    assert backend.report.notes == [str(told[0].message)]


def test_the_limit_is_an_error_in_strict_mode():
    backend = tmx_backend(ONE, strict=True)
    with pytest.raises(StrictModeError, match="recompile_limit"):
        past_the_limit(backend)
    torch._dynamo.reset()
    backend.allow_uncompiled()
    past_the_limit(backend)


def test_the_limit_with_the_model_counts_the_calls():
    model = Attentions()
    backend = tmx_backend(ONE, model=model)
    with pytest.warns(UserWarning, match="recompile_limit") as told:
        past_the_limit(backend, model)
    assert len(told) == 1
    assert (backend.report.uncompiled, backend.report.switched) == (1, 0)
    assert "outside every graph, dense: 1" in str(backend.report)
    torch._dynamo.reset()
    model = Attentions()
    backend = tmx_backend(ONE, model=model, strict=True)
    with (
        pytest.warns(UserWarning, match="recompile_limit"),
        pytest.raises(StrictModeError, match=r"layer 1 ran uncompiled.*recompile_limit"),
    ):
        past_the_limit(backend, model)


def test_another_function_at_its_limit_is_not_ours():
    backend = tmx_backend(ONE)
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(Stack(), backend=backend)(torch.randn(1, 2, 80, 16))
        other = torch.compile(lambda x: x * 2, backend="eager")
        for x in (torch.zeros(3), torch.zeros(3, dtype=torch.int)):
            other(x)
    assert not backend.report.notes
    assert "Dynamo recompile limit exceeded" in str(torch._dynamo.utils.counters["unimplemented"])


def test_a_backend_that_is_gone_is_not_listened_for():
    before = len(logging.getLogger("torch._dynamo.convert_frame").filters)
    for _ in range(3):
        torch._dynamo.reset()
        torch.compile(Stack(), backend=tmx_backend(ONE))(torch.randn(1, 2, 80, 16))
        gc.collect()
    assert len(logging.getLogger("torch._dynamo.convert_frame").filters) <= before + 2
