"""Chunks, decoding and the shrinking caches on a real NVIDIA GPU, against the float64 oracle.

On a GPU: ``python -m pytest tests/integrations/transformers/test_serve_cuda.py -n 8``.
"""

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.support.chunks import CASES, SIZES, check_operator, feed, fixed, growing
from tests.support.models import tiny_qwen3
from tests.support.oracle import tolerance
from tests.support.serving import CONFIG, SETTINGS, check_generated, left_padded, oracle_logits, prompt
from tests.support.streaming_caches import HELD, KINDS, static
from tests.support.switched import registered
from tmx_compile import TriangleMixConfig, prefill, tmx_backend
from tmx_compile.integrations.transformers import StreamingCache

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:streaming decode"),
    pytest.mark.usefixtures("sparse_from_min_seq_len"),
]
# Through a model of three layers; fused float32 kernels split their products into narrower ones.
ALLOWED = 5e-4


def on_gpu(layers=3):
    """A model there, and the same weights here for the oracle."""
    return tiny_qwen3(layers).cuda(), tiny_qwen3(layers)


def generated(model, ids, mask, **kwargs):
    """``generate`` on the GPU; the logits and sequences that come back."""
    mask = None if mask is None else mask.cuda()
    out = model.generate(ids.cuda(), attention_mask=mask, **SETTINGS, **kwargs)
    out.sequences, out.logits = out.sequences.cpu(), tuple(x.cpu() for x in out.logits)
    return out


def unlike_dense(out, model, ids, mask, config=CONFIG):
    """That the logits are not those of full attention: else the oracle could not tell."""
    whole = None if mask is None else torch.cat([mask, mask.new_ones(mask.shape[0], len(out.logits))], 1)
    n = ids.shape[1]
    dense = oracle_logits(model, config, out.sequences, whole)[:, n - 1 : -1]
    return (torch.stack(out.logits, 1).double() - dense).abs().max() > 2 * ALLOWED


@pytest.mark.parametrize("make", [growing, fixed])
@pytest.mark.parametrize("starts", [None, (0, 40)])
@pytest.mark.parametrize("lowering", ["auto", "triton", "blocked", "operator"])
def test_chunks_equal_one_pass(make, starts, lowering):
    model, same = on_gpu(2)
    ids = prompt(2)
    mask = None if starts is None else left_padded(starts)
    backend = tmx_backend(CONFIG, chunked_prefill=True, strict=True, lowering=lowering)
    step = torch.compile(model, backend=backend, dynamic=True)
    want = oracle_logits(same, CONFIG, ids, mask, triangle=[(0, 100)])
    seen = torch.ones_like(ids).bool() if mask is None else mask.bool()
    for sizes in SIZES:
        with prefill(total_tokens=100):
            got = feed(step, make(model), ids.cuda(), sizes, None if mask is None else mask.cuda()).cpu()
        torch.testing.assert_close(got[seen].double(), want[seen], atol=ALLOWED, rtol=0)
    assert {site.lowering for site in backend.report.triangle()} == {"chunked"}


@pytest.mark.parametrize("lowering", ["auto", "operator", "triton", "blocked"])
@pytest.mark.parametrize("name", CASES)
def test_the_operator_equals_the_oracle(name, lowering):
    case = CASES[name]
    allowed = 1e-4 if case.dtype == torch.float32 else tolerance(case.dtype)
    check_operator(case, lowering, "cuda", allowed)


def test_a_long_prompt_in_chunks():
    """16,384 tokens, bfloat16, in three sizes of chunk, with the recommended geometry: what one pass says."""
    config = TriangleMixConfig(triangle_layer_indices=[0, 1])
    model = tiny_qwen3(2).to("cuda", torch.bfloat16)
    ids = prompt(1, 16384).cuda()
    backend = tmx_backend(config, chunked_prefill=True, strict=True)
    step = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
    with prefill(total_tokens=16384):
        want = feed(step, growing(model), ids, (16384,))
        found = [feed(step, growing(model), ids, (size,)) for size in (4096, 5000)]
    assert torch.isfinite(want).all()
    off = (want - dense).float().square().mean().sqrt()
    for got in found:
        assert (got - want).float().square().mean().sqrt() < off / 10


@pytest.mark.parametrize("starts", [None, (0, 30), (0, 97)])
@pytest.mark.parametrize("static", [False, True])
def test_streaming_decode(static, starts):
    model, same = on_gpu()
    ids, mask = prompt(2), None if starts is None else left_padded(starts)
    backend = tmx_backend(CONFIG, decode="streaming", strict=True, assume_causal=static)
    model.compile(backend=backend, dynamic=True)
    cache = StaticCache(config=model.config, max_cache_len=160) if static else DynamicCache(config=model.config)
    # A static cache makes generate() compile the model by itself, which would leave the backend out.
    out = generated(model, ids, mask, past_key_values=cache, max_new_tokens=40, disable_compile=True)
    check_generated(same, CONFIG, ids, mask, out, atol=ALLOWED, triangle=[(0, 100)])
    assert unlike_dense(out, same, ids, mask)
    assert {site.lowering for site in backend.report if site.decision == "streaming"} == {"decode"}


@KINDS
@pytest.mark.parametrize("starts", [None, (0, 30, 75), (0, 92, 99)])
@pytest.mark.parametrize("how", ["as it is", "generate", "backend"])
def test_caches(make, starts, how):
    """Uncompiled; as ``generate`` does it, which compiles a static cache's steps into CUDA graphs; with the backend."""
    model, same = on_gpu()
    ids, mask = prompt(3), None if starts is None else left_padded(starts)
    if how == "backend":
        model.compile(backend=tmx_backend(CONFIG, strict=True, assume_causal=make is static), dynamic=True)
    for _ in range(2):
        cache = make(model)
        out = generated(model, ids, mask, past_key_values=cache, max_new_tokens=40, disable_compile=how != "generate")
        triangle = [(0, 100)] if how == "backend" else None
        check_generated(same, CONFIG, ids, mask, out, atol=ALLOWED, triangle=triangle)
        assert unlike_dense(out, same, ids, mask)
        assert [layer.keys.shape[2] for layer in cache.layers][1:] == [HELD] * 2
        assert all(layer.keys.is_cuda for layer in cache.layers)


def test_memory_is_freed():
    """What the allocator holds falls by what the cache says it let go."""
    model = tiny_qwen3(3).cuda()
    cache = StreamingCache(model, CONFIG)
    ids = prompt(1, 20000).cuda()
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        held, full = torch.cuda.memory_allocated(), sum(cache.memory_bytes())
        model(ids[:, :1], past_key_values=cache)
    freed = full - sum(cache.memory_bytes())
    assert freed > 0.6 * full
    assert held - torch.cuda.memory_allocated() > 0.9 * freed


PADDED = pytest.mark.parametrize("starts", [None, (0, 40)])


def offloaded(model, starts, cache, **settings):
    """``generate`` as Transformers' documentation writes it: ids, mask, what came back."""
    ids, mask = prompt(2), None if starts is None else left_padded(starts)
    out = generated(model, ids, mask, cache_implementation=cache, max_new_tokens=6, **settings)
    # Layers of keys wait on the CPU.
    assert not all(layer.keys.is_cuda for layer in out.past_key_values.layers)
    return ids, mask, out


def layers_sparse(report):
    return {layer for site in report.triangle() for layer in site.layers or (site.layer,)}


@PADDED
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static", "offloaded_hybrid"])
def test_offloaded_caches_switched(cache, starts):
    """Of static ones ``generate`` compiles the steps by itself into CUDA graphs, which crashes with keys on the CPU."""
    model, same = on_gpu()
    with registered(CONFIG, strict=True) as attention:
        model.set_attn_implementation(attention.name)
        ids, mask, out = offloaded(model, starts, cache, disable_compile=cache != "offloaded")
    check_generated(same, CONFIG, ids, mask, out, atol=ALLOWED, prompt=None, triangle=[(0, 100)])
    assert unlike_dense(out, same, ids, mask)
    assert layers_sparse(attention.report) == {1, 2}


PLAIN = """
import torch
from tests.support.models import tiny_qwen3
model = tiny_qwen3(3).cuda()
model.compile(backend="eager")
ids = torch.randint(1, 128, (2, 100)).cuda()
model.generate(ids, cache_implementation="offloaded", max_new_tokens=6, do_sample=False, pad_token_id=0)
"""


@pytest.fixture(scope="module")
def streams_compile():
    """Skips where Dynamo itself does not survive the streams of an offloaded cache, whatever the backend."""
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, timeout=300)
    if done.returncode < 0:
        pytest.skip(f"torch {torch.__version__} ends by signal {-done.returncode} here with backend='eager' too")
    assert done.returncode == 0, done.stderr[-2000:]


@PADDED
def test_an_offloaded_cache_compiled_and_switched(streams_compile, eager, starts):
    """The cache's streams break the graph inside attention."""
    model, same = on_gpu()
    with registered(CONFIG) as attention:
        model.set_attn_implementation(attention.name)
        backend = tmx_backend(CONFIG, model=model)
        model.compile(backend=backend)
        ids, mask, out = offloaded(model, starts, "offloaded")
    check_generated(same, CONFIG, ids, mask, out, atol=ALLOWED, prompt=None, triangle=[(0, 100)])
    assert layers_sparse(attention.report) | layers_sparse(backend.report) == {1, 2}
    assert backend.report.uncompiled == 0


@PADDED
def test_an_offloaded_cache_compiled_alone_is_told(streams_compile, eager, starts):
    model, same = on_gpu()
    backend = tmx_backend(CONFIG, model=model)
    model.compile(backend=backend)
    with pytest.warns(UserWarning, match="LAYER_UNKNOWN|ran uncompiled"):
        ids, mask, out = offloaded(model, starts, "offloaded")
    check_generated(same, CONFIG, ids, mask, out, atol=ALLOWED, prompt=None)
    assert not backend.report.triangle()
