"""A real Hugging Face model through the backend, against a float64 oracle that shares no code with the package."""

import pytest
import torch

from tests.support.models import masked_oracle, tiny_qwen3
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.graph.nodes import value_of
from tmx_compile.testing import captured_graphs, rewritten_graphs

N = 300
CONFIG = TriangleMixConfig.deepest(
    2, num_layers=3, num_sink_tokens=4, sliding_window_size=32, num_last_tokens=16, min_seq_len=100
)


def padded(left=(0, 70), n=N):
    mask = torch.ones(len(left), n, dtype=torch.long)
    for row, start in enumerate(left):
        mask[row, :start] = 0
    return mask


def prompts(batch=2, n=N):
    return torch.randint(0, 128, (batch, n))


# The masks of facts: C causal by comparison or is_causal, P packed-sequence form, K causal and a 2-D padding mask.
FORMS = {
    "C": lambda: {"use_cache": True},
    "P": lambda: {"use_cache": False},
    "K": lambda: {"use_cache": True, "attention_mask": padded()},
    "K, no cache": lambda: {"use_cache": False, "attention_mask": padded((0, 0))},
}


@pytest.mark.parametrize("lowering", ["flex", "blocked", "operator"])
@pytest.mark.parametrize("form", FORMS)
def test_prefill_equals_the_masked_oracle(form, lowering):
    model, ids, kwargs = tiny_qwen3(3), prompts(), FORMS[form]()
    backend = tmx_backend(CONFIG, lowering=lowering, strict=True)
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(ids, **kwargs).logits
    want = masked_oracle(model, CONFIG, ids, kwargs.get("attention_mask"))
    seen = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
    torch.testing.assert_close(out[seen].double(), want[seen], atol=2e-5, rtol=0)
    assert torch.isfinite(out).all()
    assert [site.decision for site in backend.report] == ["dense", "triangle", "triangle"]
    assert [site.lowering for site in backend.report.triangle()] == [lowering] * 2
    assert [site.layer for site in backend.report] == [0, 1, 2]
    # Not the dense model: the oracle would catch it, and so would this.
    with torch.no_grad():
        assert (model(ids, **kwargs).logits - out)[seen].abs().max() > 1e-3


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMS)
def test_no_n_by_n_tensor_is_left(form, dynamic):
    """Walks every node: before, the mask is there; after, no tensor has two dimensions of the prompt's length."""
    model, ids, kwargs = tiny_qwen3(3), prompts(), FORMS[form]()
    if dynamic:
        for x in (ids, *(v for v in kwargs.values() if torch.is_tensor(v))):
            torch._dynamo.mark_dynamic(x, 1)

    def squares(gm):
        n = next(n for n in gm.graph.nodes if str(n.target).startswith("L_args_0")).meta["example_value"].shape[1]
        found = []
        for node in gm.graph.nodes:
            value = value_of(node)
            for x in value if isinstance(value, tuple) else (value,):
                if (
                    isinstance(x, torch.Tensor)
                    and sum(bool(s == n) if s is n or s == n else False for s in x.shape) > 1
                ):
                    found.append(node.name)
        return found

    with torch.no_grad():
        (before,) = captured_graphs(model, ids, dynamic=None, **kwargs)
        torch._dynamo.reset()
        (after,) = rewritten_graphs(model, ids, config=CONFIG, lowering="blocked", dynamic=None, **kwargs)
    # torch 2.11 with Transformers builds the mask for every prompt.
    assert bool(squares(before)) == (form != "C" or torch.__version__ < "2.12")
    assert squares(after) == []
    # And the keys are not repeated for the query heads any more.
    expanded = [n for n in after.graph.nodes if getattr(value_of(n), "shape", ())[1:3] == (2, 2)]
    assert expanded == []


@pytest.mark.parametrize("lowering", ["auto", "flex"])
def test_generate_on_a_left_padded_batch_gives_each_sequence_what_it_gets_alone(lowering):
    model = tiny_qwen3(3)
    lengths = (N, 230, 150)
    alone = [torch.randint(0, 128, (1, n)) for n in lengths]
    batch = torch.zeros(3, N, dtype=torch.long)
    mask = padded(tuple(N - n for n in lengths))
    for row, ids in enumerate(alone):
        batch[row, N - ids.shape[1] :] = ids[0]
    settings = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    backend = tmx_backend(CONFIG, lowering=lowering)
    model.compile(backend=backend)
    together = model.generate(batch, attention_mask=mask, **settings)
    assert len(backend.report.of_graph(0)) == 3
    assert len(backend.report.triangle()) == 2
    for row, ids in enumerate(alone):
        single = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert torch.equal(single.sequences[0, ids.shape[1] :], together.sequences[row, N:])
        for one, many in zip(single.logits, together.logits, strict=True):
            torch.testing.assert_close(one[0], many[row], atol=2e-5, rtol=0)
        # And the first token's logits are the oracle's.
        want = masked_oracle(tiny_qwen3(3), CONFIG, ids)[0, -1]
        torch.testing.assert_close(single.logits[0][0].double(), want, atol=2e-5, rtol=0)


def test_right_padding():
    model, ids = tiny_qwen3(3), prompts()
    mask = padded((0, 0))
    mask[1, 220:] = 0
    with torch.no_grad():
        out = torch.compile(model, backend=tmx_backend(CONFIG, strict=True))(ids, attention_mask=mask).logits
    want = masked_oracle(model, CONFIG, ids, mask)
    torch.testing.assert_close(out[mask.bool()].double(), want[mask.bool()], atol=2e-5, rtol=0)


def test_training_gradients_equal_the_oracle():
    model, ids = tiny_qwen3(3), prompts()
    backend = tmx_backend(CONFIG, strict=True)
    torch.compile(model, backend=backend)(ids, use_cache=False).logits.square().mean().backward()
    assert {site.lowering for site in backend.report.triangle()} == {"blocked"}
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    reference = tiny_qwen3(3)
    torch._dynamo.reset()
    compiled = torch.compile(reference, backend=tmx_backend(CONFIG, lowering="reference", strict=True))
    compiled(ids, use_cache=False).logits.square().mean().backward()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)
    # The dense model's gradients are others.
    dense = tiny_qwen3(3)
    dense(ids, use_cache=False).logits.square().mean().backward()
    name = "model.layers.1.self_attn.v_proj.weight"
    assert (dict(dense.named_parameters())[name].grad - got[name]).abs().max() > 1e-7


def test_autocast():
    model, ids = tiny_qwen3(3), prompts()
    backend = tmx_backend(CONFIG, strict=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(model, backend=backend)(ids, use_cache=False).logits
    assert len(backend.report.triangle()) == 2
    want = masked_oracle(model, CONFIG, ids)
    torch.testing.assert_close(out.double(), want, atol=3e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, ids = tiny_qwen3(3).to(dtype), prompts()
    backend = tmx_backend(CONFIG, strict=True)
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(ids, attention_mask=padded()).logits
    want = masked_oracle(model, CONFIG, ids, padded())
    seen = padded().bool()
    # The model itself computes its normalisation and rotary embedding in float32.
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(out[seen].double(), want[seen], atol=tolerance, rtol=0)
    assert len(backend.report.triangle()) == 2
