"""The throughput case: every variant does the work it says, and the page says what was measured. Nothing is timed."""

import copy
import json
import math
import warnings

import pytest
import torch

from benchmarks import common, run, throughput
from benchmarks.generation import Run
from tests.support.serving import oracle_logits
from tools.pages import section_throughput
from tools.pages.markdown import Fields

PLAN = throughput.QUICK
(BATCH, TOKENS, ROUNDS) = PLAN["workloads"][0]
PART, NEW = f"batch-{BATCH}", PLAN["new_tokens"]
HELD = PLAN["num_sink_tokens"] + PLAN["sliding_window_size"] + 1
# Bytes of one key and its value in one layer: two key heads of 16 in float32.
TOKEN = 2 * 2 * 16 * 4


@pytest.fixture
def lab(eager):
    """The quick form's model, on which nothing is compiled yet."""
    throughput.lab_of.cache_clear()
    yield throughput.lab_of(True)
    throughput.lab_of.cache_clear()


def test_a_quick_run_writes_valid_records(lab, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run.main(["throughput", "--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / throughput.file()).read_text(encoding="utf-8"))
    assert result["quick"]
    assert str(tmp_path) not in json.dumps(result)
    assert result["runs"].keys() == {PART}
    records = {r["variant"]: r for r in result["records"]}
    assert list(records) == PLAN["variants"] == list(throughput.VARIANTS)
    dense = records["dense"]
    seen = TOKENS + NEW - 1
    whole, shrunk = (BATCH * keys * TOKEN / 2**20 for keys in (4 * seen, 2 * seen + 2 * HELD))
    for name, r in records.items():
        assert r["failed"] is None
        assert (r["batch"], r["tokens"], r["new_tokens"]) == (BATCH, TOKENS, NEW)
        assert r["rounds"] == len(r["prefill_s_all"]) == len(r["decode_s_all"]) == ROUNDS
        assert r["tokens_per_s"] == pytest.approx(
            BATCH * NEW / sum((sum(r["prefill_s_all"]), sum(r["decode_s_all"]))) * ROUNDS, rel=1e-4
        )
        assert r["decode_tokens_per_s"] == pytest.approx(BATCH * (NEW - 1) / r["decode_s"], rel=1e-4)
        assert r["ratio"] == pytest.approx(r["tokens_per_s"] / dense["tokens_per_s"], rel=1e-4)
        assert r["cache_mib"] == pytest.approx(shrunk if name == "streaming-cache" else whole, rel=1e-5)
        assert r["cache_prompt_mib"] == pytest.approx(4 * BATCH * TOKENS * TOKEN / 2**20, rel=1e-5)
        assert r["compile_s"] > 0
        # The prompt's graph and that of single rows; the cache that shrinks has a first row of its own.
        assert r["compilations"] == (3 if name == "streaming-cache" else 2)
        assert r["recompiles"] == 0
        assert r["triangle_layers"] == (0 if name == "dense" else 2)
    assert dense["like_dense"] == 1


def test_every_variant_chooses_what_the_oracle_does(lab):
    """The same forced tokens; greedy choices from written-out masks over all keys, in float64."""
    ids = lab.ids(BATCH, TOKENS + NEW)
    model = copy.deepcopy(lab.runner("dense")._model)
    model.config._attn_implementation = "sdpa"
    config = lab.runner("triangle")._config
    assert config.geometry.counts == (4, 32, 64)
    rows = {
        "dense": {},
        "triangle": {"triangle": [(0, TOKENS)]},
        "streaming": {"triangle": [(0, TOKENS)], "prompt": TOKENS},
        "streaming-cache": {"triangle": [(0, TOKENS)], "prompt": TOKENS},
    }
    chosen = {}
    with torch.no_grad():
        for name, asked in rows.items():
            found = lab.runner(name)(ids, TOKENS)
            want = oracle_logits(model, config, ids[:, :-1], **asked)[:, TOKENS - 1 :].argmax(-1)
            assert torch.equal(found.chosen, want), name
            chosen[name] = want
            lab.runner(name).check()
            assert lab.runner(name).lowerings()
    # Otherwise the comparison would not tell the variants apart.
    assert not torch.equal(chosen["dense"], chosen["triangle"])
    assert not torch.equal(chosen["triangle"], chosen["streaming"])


def made(seconds, graphs):
    return Run(seconds, 2 * seconds, 0, 0, None, torch.zeros(1, 1), graphs)


@pytest.mark.usefixtures("_light")
def test_a_round_that_compiles_is_made_again():
    left = [made(9.0, 1), made(8.0, 2), made(1.0, 0), made(3.0, 0)]
    outcome = throughput.Outcome()
    outcome.attempt(lambda: [made(50.0, 2)])
    for _ in range(2):
        outcome.attempt(lambda: throughput.counted(lambda ids, tokens: left.pop(0), None, 1))
    fields = outcome.fields(4, 10)
    assert fields["prefill_s_all"] == [1.0, 3.0]
    assert (fields["compilations"], fields["recompiles"], fields["rounds"]) == (5, 3, 2)
    assert fields["tokens_per_s"] == pytest.approx(4 * 10 / 6)
    assert fields["decode_tokens_per_s"] == pytest.approx(4 * 9 / 4)
    outcome.attempt(lambda: throughput.counted(lambda ids, tokens: made(1.0, 1), None, 1))
    assert outcome.failed == "RuntimeError: still compiling after 4 rounds"
    assert outcome.fields(4, 10)["tokens_per_s"] is None


def test_layers_that_are_not_what_was_asked_for_are_an_error(lab):
    runner = lab.runner("streaming")
    with pytest.raises(RuntimeError, match=r"wanted triangle layers \[2, 3\], got \[\]"):
        runner.check()


def test_texts_that_are_too_short_are_an_error(lab):
    lab._text = torch.arange(100)
    assert lab.ids(2, 50).tolist() == [list(range(50)), list(range(50, 100))]
    with pytest.raises(RuntimeError, match="the text has 100 tokens, 2 sequences of 51 need more"):
        lab.ids(2, 51)


@pytest.fixture
def _light(monkeypatch):
    monkeypatch.setattr(throughput, "free", lambda: None)


WORKLOADS = [[1, 4096, 3], [2, 4096, 3], [4, 3072, 2], [8, 2304, 2]]


def result(failed=None):
    """A result as the case would store it, with made-up times."""
    records = []
    for batch, tokens in ((1, 4096), (8, 2304)):
        for number, name in enumerate(throughput.VARIANTS):
            outcome = throughput.Outcome()
            outcome.attempt(lambda: [made(30.0, 2)])
            seconds = 8.0 / (number + 1)
            outcome.attempt(lambda seconds=seconds: [made(seconds, 0)])
            if (batch, name) == failed:
                outcome.failed = "RuntimeError: no luck"
            records.append(
                {
                    "part": f"batch-{batch}",
                    "variant": name,
                    "batch": batch,
                    "tokens": tokens,
                    **outcome.fields(batch, 256),
                    "lowerings": "flex",
                    "like_dense": 0.875,
                }
            )
    throughput.finish(records)
    return Fields(
        {
            "settings": Fields(throughput.settings(False) | {"workloads": WORKLOADS}, "settings"),
            "records": [Fields(r, f"record {i}") for i, r in enumerate(records)],
        },
        "throughput.json",
    )


@pytest.mark.usefixtures("_light")
def test_the_page_says_what_was_measured():
    text = section_throughput.section(result())
    # 256 tokens in 24 s, and half of that time.
    assert "| 1 x 4,096 | `dense` | 8 | 10.7 | 15.9 | 0 |" in text
    assert "|  | `triangle` | 4 (2.00x) | 21.3 (2.00x) | 31.9 (2.00x) | 0 |" in text
    assert "| 8 x 2,304 | `dense` | 8 | 85.3 | 128 | 0 |" in text
    assert "|  | `streaming-cache` | 2 (4.00x) | 341 (4.00x) | 510 (4.00x) | 0 |" in text
    assert "`triangle` 0 s, 88% alike" in text
    assert "Of `dense` the prompt takes 33% at 1 x 4,096, 33% at 8 x 2,304." in text
    assert "failed" not in text
    missing = next(line for line in text.splitlines() if line.startswith("Not measured yet"))
    assert "`batch-2`, `batch-4`" in missing
    assert math.isclose(2.0, result()["records"][1]["ratio"])


@pytest.mark.usefixtures("_light")
def test_the_page_tells_what_failed():
    text = section_throughput.section(result(failed=(8, "triangle")))
    assert "|  | `triangle` | failed |  |  |  |" in text
    assert "- `triangle`, 8 x 2,304: RuntimeError: no luck" in text
    assert section_throughput.section(result(failed=(8, "dense"))).count("33% at") == 1


def test_serving_has_the_measured_figures():
    folder = common.RESULTS
    text = " ".join((folder.parents[1] / "docs" / "serving.md").read_text(encoding="utf-8").split())

    def ratios(file, field):
        records = json.loads((folder / file).read_text(encoding="utf-8"))["records"]
        named = [(r["variant"], r[field]) for r in records]
        return [[x for variant, x in named if variant == wanted] for wanted in ("triangle", "streaming-cache")]

    gpu = ratios("throughput_cuda.json", "ratio")
    prefill = ratios("throughput_cuda.json", "prefill_ratio")[0]
    assert f"is read {prefill[0]:.2f} times as fast" in text
    assert f"at once: {prefill[1]:.2f}, {gpu[0][1]:.2f} and {gpu[1][1]:.2f} times." in text
    assert f"give {gpu[0][0]:.2f} times the tokens per second, with a `StreamingCache` {gpu[1][0]:.2f} times" in text
    cpu = [f"{min(values):.2f} to {max(values):.2f} times" for values in ratios("throughput.json", "ratio")]
    assert f"{cpu[0]}, and {cpu[1]}." in text
    decode = ratios("throughput.json", "decode_ratio")[0]
    assert f"came out {min(decode):.2f} to {max(decode):.2f} times as fast" in text
