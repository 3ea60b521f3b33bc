"""One model dense and sparse in turn, two models at once, one cache for several prompts."""

import threading

import pytest
import torch
from transformers import DynamicCache

from tests.support.models import tiny_qwen3
from tests.support.serving import CONFIG, SETTINGS, check_generated, left_padded, oracle_logits, prompt
from tmx_compile import TriangleMixConfig, prefill, tmx_backend
from tmx_compile.integrations.transformers import StreamingCache

pytestmark = pytest.mark.filterwarnings("ignore:streaming decode")
OTHER = TriangleMixConfig(
    triangle_layer_indices=[0], num_sink_tokens=2, sliding_window_size=9, num_last_tokens=5, min_seq_len=32
)


def logits(step, ids):
    with torch.no_grad():
        return step(ids).logits


def test_one_model_dense_and_triangle_in_turn(eager):
    """Each compiled form keeps its own numbers, and the model by itself is what it was."""
    model, ids = tiny_qwen3(3), prompt(2)
    before = logits(model, ids)
    forms = {}
    for name, config in (("deep", CONFIG), ("first", OTHER), ("dense", TriangleMixConfig(triangle_layer_indices=[7]))):
        forms[name] = config, torch.compile(model, backend=tmx_backend(config))
    for _ in range(2):
        for config, step in forms.values():
            want = oracle_logits(model, config, ids, triangle=[(0, 100)])
            torch.testing.assert_close(logits(step, ids).double(), want, atol=2e-5, rtol=0)
        assert torch.equal(logits(model, ids), before)


def test_one_model_with_streaming_and_ordinary_caches_in_turn(eager):
    """The kind of cache decides, call by call, compiled or not."""
    model, ids, mask = tiny_qwen3(3), prompt(2), left_padded((0, 40))
    settings = SETTINGS | dict(attention_mask=mask, max_new_tokens=8)
    for is_compiled in (False, True):
        if is_compiled:
            model.compile(backend=tmx_backend(CONFIG))
        triangle = [(0, 100)] if is_compiled else None
        for streaming in (False, True, False, True):
            cache = StreamingCache(model, CONFIG) if streaming else DynamicCache(config=model.config)
            out = model.generate(ids, past_key_values=cache, **settings)
            begin = 100 if streaming else out.sequences.shape[1]
            check_generated(model, CONFIG, ids, mask, out, triangle=triangle, prompt=begin)


def test_two_models_compiled_at_once_in_threads(eager):
    models = [tiny_qwen3(3, seed=seed) for seed in (0, 1)]
    configs = [CONFIG, OTHER]
    prompts = [prompt(1, 100), prompt(1, 120)]
    backends = [tmx_backend(config) for config in configs]
    steps = [torch.compile(model, backend=backend) for model, backend in zip(models, backends, strict=True)]
    results, barrier = {}, threading.Barrier(2)

    def work(index):
        barrier.wait()
        for _ in range(3):
            results[index] = logits(steps[index], prompts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        ids = prompts[index]
        want = oracle_logits(models[index], configs[index], ids, triangle=[(0, ids.shape[1])])
        torch.testing.assert_close(results[index].double(), want, atol=2e-5, rtol=0)
        assert [site.layer for site in backends[index].report.triangle()] == list(configs[index].layers())


def test_two_streaming_caches_of_one_model_in_threads():
    """Nothing of a cache is kept in the model: generations do not meet."""
    model = tiny_qwen3(3)
    jobs = [(prompt(1, 100), CONFIG), (prompt(2, 70), OTHER)]
    results, barrier = {}, threading.Barrier(2)

    def work(index):
        ids, config = jobs[index]
        cache = StreamingCache(model, config)
        barrier.wait()
        results[index] = model.generate(ids, past_key_values=cache, max_new_tokens=20, **SETTINGS)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (ids, config) in enumerate(jobs):
        check_generated(model, config, ids, None, results[index])


def test_a_cache_is_reused_for_a_prompt_that_shares_its_beginning(eager):
    """A dense cache cut back to a shared beginning and continued: the chunks of the second prompt."""
    model, shared = tiny_qwen3(3), prompt(1, 60)
    backend = tmx_backend(CONFIG, chunked_prefill=True, strict=True)
    step = torch.compile(model, backend=backend, dynamic=True)
    first, second = (torch.cat([shared, prompt(1, n)], 1) for n in (40, 55))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with prefill(total_tokens=100):
            step(first, past_key_values=cache)
        cache.crop(-40)
        with prefill(total_tokens=115):
            got = step(second[:, 60:], past_key_values=cache).logits
    # No row of the beginning was a last row, so that it is the second prompt's as well.
    want = oracle_logits(model, CONFIG, second, triangle=[(0, 115)])[:, 60:]
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
