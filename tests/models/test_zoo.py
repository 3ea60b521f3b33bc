"""Every model of the zoo: numbers, decisions and reasons, and that the published matrix says what comes out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.support.zoo import runs
from tests.support.zoo.decoders import ZOO
from tests.support.zoo.runs import (
    CALLS,
    GEOMETRY,
    IMPLEMENTATIONS,
    MIN_SEQ_LEN,
    SWITCH,
    TRIANGLE,
    Specimen,
    calls_of,
    compiled,
    complaint,
)
from tmx_compile import tmx_backend

ROOT = Path(__file__).parent.parent.parent
STORED = json.loads((ROOT / "docs" / "support-matrix.json").read_text(encoding="utf-8"))
NAMES = {entry.name: entry for entry in ZOO}
SAME_VERSIONS = STORED["versions"] == {"torch": torch.__version__, "transformers": transformers.__version__}


def stored(name, implementation):
    return STORED["cells"][name][implementation]


@pytest.fixture(scope="module")
def specimens():
    made = {}

    def specimen(name, implementation):
        if (name, implementation) not in made:
            made[name, implementation] = Specimen(NAMES[name], implementation)
        return made[name, implementation]

    return specimen


def check(specimen, call):
    outcome = specimen.run(call)
    assert complaint(specimen.entry, specimen.implementation, call.name, outcome) == ""
    if SAME_VERSIONS:
        assert outcome == stored(specimen.entry.name, specimen.implementation)[call.name], (
            "docs/support-matrix.md is out of date: make matrix"
        )


# Dynamo takes five times as long to trace it: the matrix has all of them, the tests those that differ.
FLEX = ("Llama", "Gemma 2 (softcap", "Gemma 3", "GPT-2", "OPT", "gpt-oss", "BART", "ViT")
# The others prefill and decode as Llama does.
GENERATE = ("Llama", "Mistral", "Gemma", "GPT", "OPT", "Bloom", "Falcon", "DeepSeek", "gpt-oss", "T5", "BART", "LLaVA")
PREFILLS = [
    (name, implementation)
    for name, entry in NAMES.items()
    for implementation in IMPLEMENTATIONS
    if not entry.brief and (implementation != "flex_attention" or name.startswith(FLEX))
]
# Of those that came later the tests have a hybrid, windows, chunks, and keys that the model picks.
LATER = [name for name in NAMES if name.startswith(("Nemotron-H", "Gemma 4", "Llama 4", "EXAONE 4", "DeepSeek-V3.2"))]
# Recurrent layers take Dynamo long to trace: with sdpa they are in the matrix alone.
HYBRIDS = [
    name
    for name in NAMES
    if name.startswith(("Qwen3-Next", "Qwen3.5", "Falcon-H1", "Granite 4", "Jamba", "Bamba", "OLMo hybrid"))
    or name == "MiniMax"
]


@pytest.mark.parametrize(("name", "implementation"), PREFILLS)
def test_prefill(specimens, name, implementation):
    """With left padding and a cache, where the model has them: each number is that of the masked oracle."""
    if implementation not in NAMES[name].offers:
        with pytest.raises(ValueError):
            Specimen(NAMES[name], implementation).run(CALLS["no mask"])
        return
    specimen = specimens(name, implementation)
    names = [call.name for call in calls_of(specimen.entry)]
    # With flex_attention a cache takes twice the time to trace.
    wanted = ["left padding, cache", "left padding", "no mask"][implementation == "flex_attention" :]
    check(specimen, CALLS[next(call for call in wanted if call in names)])


@pytest.mark.parametrize("implementation", ["sdpa", SWITCH])
@pytest.mark.parametrize("name", LATER)
def test_prefill_of_later_models(specimens, name, implementation):
    check(specimens(name, implementation), CALLS["left padding"])


@pytest.mark.parametrize("name", HYBRIDS)
def test_prefill_of_hybrids(specimens, name):
    check(specimens(name, SWITCH), CALLS["left padding"])


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(GENERATE) and not NAMES[name].brief])
def test_generate(specimens, name):
    """The implementation that the class takes by itself; every step's logits are the oracle's."""
    check(specimens(name, NAMES[name].offers[0]), CALLS["generate"])


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma 3 text (alternating windows)"])
def test_dynamic_lengths(specimens, name):
    """One graph for all prompts; the numbers are right for long ones, and short ones are dense."""
    specimen = specimens(name, "sdpa")
    backend = tmx_backend(specimen.config, lowering="operator")
    with compiled(specimen.model, backend, dynamic=True), torch.no_grad():
        for tokens in (100, 131, MIN_SEQ_LEN, 77):
            mask = torch.ones(2, tokens, dtype=torch.long)
            mask[1, :9] = 0
            inputs = specimen.entry.inputs(2, tokens, mask)
            out = specimen.model(**inputs)
            if tokens > MIN_SEQ_LEN:
                specimen.check(out, inputs, mask, backend.report)
            else:
                with torch.compiler.set_stance("force_eager"):
                    torch.testing.assert_close(out.logits, specimen.model(**inputs).logits)
    assert backend.report.graphs == 1
    assert {site.decision for site in backend.report.of_graph(0)} == {TRIANGLE}


@pytest.mark.parametrize("name", ["Llama", "Falcon without ALiBi"])
def test_the_oracle_sees_one_key_too_many(specimens, monkeypatch, name):
    """What all of this rests on: another window, another number of sinks or last rows, does not pass."""
    specimen = specimens(name, "sdpa")
    for wrong in ((3, 8, 8), (4, 9, 8), (4, 8, 9)):
        monkeypatch.setattr(runs, "GEOMETRY", wrong)
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            specimen.run(CALLS["left padding"])


def test_what_must_not_go_sparse_is_complained_of():
    model, sparse = NAMES["BART"], {"triangle": 2}
    assert complaint(model, "sdpa", "no mask", {"causal": sparse, "encoder": {"NOT_CAUSAL": 2}}) == ""
    assert "went sparse" in complaint(model, "sdpa", "no mask", {"causal": sparse, "encoder": {"triangle": 1}})
    assert "stayed dense" in complaint(model, "sdpa", "no mask", {"causal": {"triangle": 1, "MASK_UNKNOWN": 1}})
    assert "expected" in complaint(NAMES["Bloom (ALiBi)"], "eager", "no mask", {"causal": sparse})
    assert "expected" in complaint(NAMES["Bloom (ALiBi)"], "eager", "no mask", {})


def test_the_stored_matrix_is_whole_and_keeps_the_rules():
    assert STORED["settings"]["geometry"] == list(GEOMETRY)
    assert STORED["settings"]["min_seq_len"] == MIN_SEQ_LEN
    assert list(STORED["cells"]) == list(NAMES)
    complaints = []
    for name, entry in NAMES.items():
        assert tuple(STORED["cells"][name]) == entry.offers
        for implementation, cell in STORED["cells"][name].items():
            assert list(cell) == [call.name for call in calls_of(entry)]
            for call, outcome in cell.items():
                if text := complaint(entry, implementation, call, outcome):
                    complaints.append(f"{name}, {implementation}, {call}: {text}")
    assert complaints == []


def test_the_page_is_generated_from_the_stored_matrix():
    command = [sys.executable, "tools/support_matrix.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
