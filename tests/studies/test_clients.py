"""The clients' programs that need no library of their own, and that their comparison sees a wrong number."""

import pytest
import torch

from studies.clients import (
    accelerate_offload,
    common,
    gpt_fast_form,
    nanogpt_form,
    transformers_compile_config,
    transformers_generate,
)
from studies.clients.case import PROGRAMS, run
from tests.support.models import attentions
from tests.support.switched import interfaces_kept
from tmx_compile import tmx_backend
from tools.pages.markdown import Fields
from tools.pages.page_attach import clients

WAYS = {
    "nanoGPT": nanogpt_form.train,
    "gpt-fast": gpt_fast_form.generate,
    "regions": accelerate_offload.regions,
    "disk": lambda: accelerate_offload.switched(accelerate_offload.mapped),
    "beams": transformers_generate.WAYS["3 beams"],
    "assisted": transformers_generate.WAYS["assisted by the prompt"],
    "CompileConfig": lambda: transformers_compile_config.compiled(True, prefill_chunk_size=150),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_layers_named_go_sparse(way, eager):
    # A number that is not the oracle's is an error of the program itself.
    with interfaces_kept():
        assert WAYS[way]()["triangle"] == [1, 2]


def test_a_wrong_number_is_seen(eager, monkeypatch):
    model = common.qwen3()
    backend = tmx_backend(common.CONFIG, model=model)
    model.compile(backend=backend)
    honest = common.attended
    monkeypatch.setattr(common, "attended", lambda *args: honest(*args[:4], args[4] + 1, *args[5:]))
    with torch.no_grad(), pytest.raises(AssertionError, match="numbers are wrong"):
        common.compared(lambda: model(common.prompt()).logits, backend, attentions(model))


def test_a_library_that_is_missing_is_a_record():
    assert "No module named studies.clients.nothing" in run("nothing", False)[0]["failed"]
    assert len(PROGRAMS) == len(set(PROGRAMS))


def test_the_table_says_what_stayed_dense_and_what_did_not_run():
    each = {"client": "peft", "version": "1.0+cpu", "failed": "", "reasons": ["NOT_SELECTED"], "error": 1.24e-6}
    records = [
        each | {"way": "a", "triangle": [1, 2]},
        each | {"way": "b", "triangle": [1], "reasons": ["LAYER_UNKNOWN", "NOT_SELECTED"]},
        {"client": "peft", "version": "1.0", "way": "c", "failed": "OSError: no"},
        each | {"way": "d", "triangle": [2], "selected": [2]},
    ]
    result = Fields({"settings": {"triangle_layers": [1, 2]}, "records": [Fields(r, "r") for r in records]}, "f")
    lines = clients(result).splitlines()[2:]
    assert lines == [
        "| PEFT 1.0 | a | triangle | 1e-06 |",
        "|  | b | dense: LAYER_UNKNOWN | 1e-06 |",
        "|  | c | does not run: OSError: no |  |",
        "|  | d | triangle | 1e-06 |",
    ]
