"""What people put around a model, each as its documentation writes it, and the layers that come out sparse."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import compile_regions
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tests.support.models import masked_oracle, tiny_qwen3
from tests.support.switched import model_of_images, prompt_with_an_image
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.integrations.transformers import register_attention

CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1, 2], num_sink_tokens=4, sliding_window_size=32, num_last_tokens=16, min_seq_len=128
)
pytestmark = pytest.mark.usefixtures("eager")


def qwen3():
    return tiny_qwen3(layers=3, initializer_range=0.2)


def sparse(report):
    """The layers that went sparse, whichever way they are told."""
    return {layer for site in report.triangle() for layer in site.layers or (site.layer,)}


def assert_oracle(model, ids, logits):
    torch.testing.assert_close(logits.double(), masked_oracle(model, CONFIG, ids), rtol=2e-4, atol=2e-4)


@pytest.fixture
def ids():
    return torch.randint(1, 128, (1, 300))


def test_offloaded_by_hooks_and_switched(ids):
    model = qwen3()
    plain = copy.deepcopy(model)
    attention = register_attention(CONFIG, strict=True)
    model.set_attn_implementation("tmx")
    cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        logits = model(ids).logits
    assert sparse(attention.report) == {1, 2}
    assert_oracle(plain, ids, logits)


def test_offloaded_by_hooks_and_compiled(ids):
    """A hook in every module breaks the graph inside attention: the mask comes from another graph."""
    model = qwen3()
    plain = copy.deepcopy(model)
    backend = tmx_backend(CONFIG, model=model, strict=True, assume_causal=True)
    cpu_offload(model, execution_device="cpu")
    model.compile(backend=backend)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    assert {site.layers for site in backend.report} == {(0,), (1, 2)}
    assert sparse(backend.report) == {1, 2}
    assert backend.report.uncompiled == 0
    assert_oracle(plain, ids, logits)


def test_regions(ids):
    model = qwen3()
    plain = copy.deepcopy(model)
    backend = tmx_backend(CONFIG, model=model, strict=True)
    with torch.no_grad():
        logits = compile_regions(model, backend=backend)(ids, use_cache=False).logits
    assert [site.layers for site in backend.report] == [(0,), (1, 2)]
    assert_oracle(plain, ids, logits)


def test_pipeline():
    vocabulary = {f"w{i}": i for i in range(128)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    model = qwen3()
    backend = tmx_backend(CONFIG, model=model, strict=True)
    pipe = pipeline("text-generation", model=model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    pipe.model.compile(backend=backend)
    text = " ".join(f"w{i % 127 + 1}" for i in range(300))
    assert pipe(text, max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith(text)
    assert sparse(backend.report) == {1, 2}


class _Repeated(torch.utils.data.Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(input_ids=self.ids, labels=self.ids)


def test_trainer_with_checkpoints(ids, tmp_path):
    losses = []
    for way in ("plain", "compiled"):
        model = qwen3().train()
        if way == "compiled":
            backend = tmx_backend(CONFIG, model=model, strict=True)
            model.compile(backend=backend)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            gradient_checkpointing=True,
            disable_tqdm=True,
        )
        losses.append(Trainer(model, arguments, train_dataset=_Repeated(ids[0])).train().training_loss)
    assert sparse(backend.report) == {1, 2}
    # Triangle attention is another function: the same loss would mean that nothing was sparse.
    assert 1e-6 < abs(losses[0] - losses[1]) < 1


def test_an_image_in_a_prompt():
    """The loop over the layers is broken by the image's features: compiled and switched are held to each other."""
    inputs = prompt_with_an_image(300)
    logits = []
    for way in ("sdpa", "switched", "compiled"):
        model = model_of_images("sdpa")
        if way == "switched":
            holder = register_attention(CONFIG)
            model.set_attn_implementation("tmx")
        elif way == "compiled":
            holder = tmx_backend(CONFIG, model=model.model.language_model)
            model.compile(backend=holder)
        with torch.no_grad():
            logits.append(model(**inputs, use_cache=False).logits)
        assert way == "sdpa" or sparse(holder.report) == {1, 2}
    dense, switched, compiled = logits
    torch.testing.assert_close(switched, compiled, rtol=2e-4, atol=2e-4)
    assert (switched - dense).abs().max() > 1e-2
