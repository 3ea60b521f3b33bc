"""lm-eval: log-likelihoods and generation through ``HFLM``, which takes a compiled model as it is."""

from __future__ import annotations

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from studies.clients.common import CONFIG, Result, attentions, compared, main, qwen3, text, tokenizer
from tmx_compile import tmx_backend
from tmx_compile.integrations.transformers import register_attention


def likelihoods(harness: HFLM) -> torch.Tensor:
    requests = [Instance("loglikelihood", {}, (words, " w7 w8 w9"), i) for i, words in enumerate(text(2))]
    return torch.tensor([likelihood for likelihood, _ in harness.loglikelihood(requests, disable_tqdm=True)])


def compiled() -> Result:
    model = qwen3()
    backend = tmx_backend(CONFIG, model=model, strict=True)
    model.compile(backend=backend)
    harness = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=2, max_length=400)
    return compared(lambda: likelihoods(harness), backend, attentions(model))


def switched() -> Result:
    model = qwen3()
    attention = register_attention(CONFIG, strict=True)
    model.set_attn_implementation("tmx")
    harness = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=2, max_length=400)
    return compared(lambda: likelihoods(harness), attention, attentions(model), switched=model)


if __name__ == "__main__":
    main("lm-eval", {"`HFLM`": compiled, "`HFLM`, switched": switched})
