"""docs/quality.md says what a result file says, and nothing where the file says nothing."""

import functools
import json
import re

import pytest

from benchmarks.common import RESULTS
from studies import quality, recall
from tmx_compile.config.prices import prices
from tools.pages import page_quality

DOCS = RESULTS.parents[1] / "docs"
G1, G2 = [8, 64, 128], [8, 512, 128]
PARTS = ("final", "following")


def cell(policy, count, cost, geometry=G1, decode="dense", **changes):
    record = {
        "part": f"prompt-2048/{'-'.join(map(str, geometry))}/ranked",
        "prompt": 2048,
        "geometry": geometry,
        "policy": policy,
        "count": count,
        "decode": decode,
        "indices": [sum(map(ord, policy)), count],
        "items": "0",
        "nll_dense_final": 2.0,
        "nll_dense_following": 2.0,
        **{
            key: [cost, cost - 0.001, cost + 0.001]
            for key in ("kl_final", "kl_following", "ppl_final", "ppl_following")
        },
        **{key: [0.5, 0.4, 0.6] for key in ("needle", "copy")},
        "needle_dense": 1.0,
        "copy_dense": 0.75,
        **{key: [0.25, 0.2, 0.3] for key in ("needle_nll", "copy_nll")},
    }
    return record | changes


RECORDS = [
    cell("gradient", 5, 0.001),
    cell("gradient", 9, 0.004),
    cell("gradient", 15, 0.008),
    cell("deepest", 5, 0.0015),
    cell("deepest", 9, 0.0035),
    cell("deepest", 15, 0.02, needle=[0.125, 0.0, 0.25]),
    cell("first", 9, 0.25),
    *(cell(f"random{i}", 9, 0.003 * (i + 1)) for i in range(3)),
    cell("all", 30, 0.9),
    cell("gradient", 9, 0.05, G2),
    cell("direct", 9, 0.001, prompt=4096),
    cell("deepest", 9, 0.0025, prompt=4096),
    cell("gradient", 9, 0.11, decode="streaming"),
    cell("deepest", 15, 0.07, [0, 64, 128], part="prompt-2048/ablations"),
    cell("deepest", 9, 0.0035, part="prompt-2048/turns", turn=0, rows="sparse"),
    cell("deepest", 9, 0.045, part="prompt-2048/turns", turn=256, rows="sparse"),
    cell("deepest", 15, 0.065, part="prompt-2048/turns", turn=256, rows="sparse", needle=[0.25, 0.2, 0.3]),
    cell("deepest", 9, 0.0255, part="prompt-2048/turns", turn=256, rows="dense"),
]


def store(folder, case, settings, records):
    """A result file of a case, from the machine of another."""
    stored = json.loads((RESULTS / "first_n.json").read_text(encoding="utf-8"))
    content = {**stored, "case": case, "settings": settings, "records": records}
    (folder / f"{case}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def page(tmp_path):
    def write(records):
        store(tmp_path, "quality", {**quality.settings(False), **quality.ITEMS["cpu"]}, records)
        text, pictures = page_quality.generate(tmp_path)
        for picture in pictures:
            picture.write(tmp_path)
            assert picture.is_current(tmp_path)
        return text

    return write


def test_the_page_tells_the_answers(page):
    text = page(RECORDS)
    # 5: 0.001 < 0.0015; 9: 0.004 > 0.0035 and 0.25; 15: 0.008 < 0.02. Random draws: mean 0.006.
    assert "first n in 1 of 1, deepest n in 2 of 3, the mean of three random draws in 1 of 1 comparisons" in text
    free = "perplexity (upper ends of the intervals), of 30 layers, with 8/64/128: "
    assert f"within 0.3% {free}5 and 9 at 2,048 and 4,096 tokens; 8/512/128: 0 at 2,048 tokens." in text
    assert f"within 1.0% {free}15 and 9 at 2,048 and 4,096 tokens; 8/512/128: 0 at 2,048 tokens." in text
    assert "`direct`) have a lower one, where the choices differ, than deepest n in 1 of 1 comparisons" in text
    # 8/512/128 lacks policies.
    assert "with 8/64/128: by gradient +0.4%, by divergence +0.1%, deepest +0.2% to +0.4%, first +25.0%." in text
    assert "needle retrieval falls most from 100% to 12% (deepest, 2,048 tokens with 8/64/128)" in text
    assert "| 2,048 | 8/64/128 | 9 | +0.4% |  | +0.4% (+0.2% to +0.5%) | +25.0% | +0.6% |" in text
    assert "| 2,048 | 8/64/128 | 15 | +0.8% |  | +2.0% (+1.9% to +2.1%) |  |  |" in text
    assert "| 2,048 | 8/64/128 | 100%/75% | 50%/50% |  | 12%/50% |  | 50%/50% |" in text
    assert "Decoded densely the same layers change that perplexity by +0.4%." in text
    assert "| 2,048 | 8/64/128 | gradient | +11.0% (50%/50%) |" in text
    assert "| 2,048 | 0/64/128 | +7.0% (+6.9% to +7.1%) | +7.0% | 50%/50% |" in text
    assert "| 8/64/128 | one prompt | +0.4% | +0.4% | 50% | 25% |" in text
    assert "| 8/64/128 | turn, sparse | +4.5% to +6.5% | +4.5% to +6.5% | 75% | 25% |" in text
    assert "| 8/64/128 | turn, dense | +2.5% | +2.5% | 50% | 25% |" in text
    assert "All 30 layers sparse: +90.0%." in text
    assert "The most that were ranked" not in text


def test_what_was_not_measured_is_not_told(page):
    text = page([cell("deepest", 9, 0.001)])
    for absent in (
        "gradient have",
        "Continued conversations",
        "trained to recall",
        "streaming decode\n",
        "What sinks",
        "published presets",
        "All 30 layers",
    ):
        assert absent not in text
    assert re.search(r"within 0.3% perplexity .*, of 30 layers, with 8/64/128: 9 at 2,048 tokens\.", text)


def test_the_most_layers_that_were_ranked_are_told():
    """The tables stop at half of the layers; what more of them cost stays on the page."""
    records = [cell("deepest", 15, 0.002), cell("deepest", 21, 0.07), cell("gradient", 21, 0.12)]
    text = page_quality.sections({"settings": quality.settings(False) | quality.ITEMS["cpu"], "records": records})
    assert "The most that were ranked, 21: +7.0% to +12.0%." in text


def test_nothing_falls_by_less_than_nothing(page):
    text = page([*RECORDS[:4], cell("deepest", 9, 0.0, part="p/turns", turn=0, rows="sparse", copy_dense=0.25)])
    assert "| 8/64/128 | one prompt | +0.0% | +0.0% | 50% | 0% |" in text


def test_noise_does_not_pass_for_free(page):
    """A mean within the budget whose interval is not."""
    text = page([cell("deepest", 9, 0.0025, ppl_final=[0.0025, -0.01, 0.004])])
    assert "within 0.3% perplexity (upper ends of the intervals), of 30 layers, with 8/64/128: 0 at 2,048" in text


def recalled(policy, count, *accuracy, tokens=8192, geometry=G1, dense=(1.0, 0.99)):
    return {
        "part": "8192/8-64-128",
        "tokens": tokens,
        "geometry": geometry,
        "policy": policy,
        "count": count,
        "indices": list(range(count)),
        "accuracy": dict(zip(("0 hops", "copy"), accuracy, strict=True)),
        "dense": dict(zip(("0 hops", "copy"), dense, strict=True)),
    }


RECALL = [
    recalled("dense", 0, 1.0, 0.99),
    *(recalled("deepest", n, *scores) for n, scores in ((1, (1.0, 0.99)), (2, (0.5, 0.98)), (3, (1.0, 0.99)))),
    *(recalled("gradient", n, *scores) for n, scores in ((1, (1.0, 0.985)), (2, (0.995, 0.98)), (3, (0.25, 0.99)))),
    recalled("first", 1, 0.125, 0.25),
    recalled("first", 2, 0.0625, 0.3),
    recalled("random0", 2, 0.0625, 0.3),
    recalled("deepest", 4, 0.0625, 0.5),
    recalled("dense", 0, 0.875, 0.75, tokens=1024, dense=(0.875, 0.75)),
    recalled("first", 1, 0.8, 0.75, tokens=1024, dense=(0.875, 0.75)),
    recalled("gradient", 2, 0.875, 0.75, tokens=1024, dense=(0.875, 0.75)),
    recalled("deepest", 2, 0.875, 0.75, tokens=1024, dense=(0.875, 0.75)),
]
TRAINED = {
    "command": "python -m studies.recall_model --minutes 3",
    "shape": {"layers": 4, "hidden": 192, "heads": 6},
    "parameters": 3_140_000,
    "seed": 1,
    "hardware": {"gpu": "a GPU"},
    "log": [{"step": 100, "minutes": 0.4}, {"step": 1200, "minutes": 2.9}],
}


def with_recall(tmp_path, records):
    store(tmp_path, "recall", recall.settings(False), records)
    (tmp_path / "recall").mkdir(exist_ok=True)
    (tmp_path / "recall" / "recall-model.json").write_text(json.dumps(TRAINED), encoding="utf-8")


def test_the_model_that_recalls(page, tmp_path):
    with_recall(tmp_path, RECALL)
    text = page(RECORDS)
    # Gradient keeps two layers free, deepest one: its third is good again, behind one that is not.
    assert (
        "- A model trained to recall, at 8,192 tokens: with 8/64/128 2 of 4 layers (gradient) lose at most 1%" in text
    )
    assert "half of them cost up to 50.0% (deepest, 0 hops: 100.0% to 50.0%), " in text
    assert "50.0%), the first 2 layers 93.8% (0 hops: 100.0% to 6.2%)." in text
    assert "task: 0 hops 93.8% (100.0% to 6.2%; first, 8,192 tokens, 8/64/128), copy 69.0% (99.0% to 30.0%; " in text
    assert "| 8,192 | 8/64/128 | 2 (gradient) | 2 |  | 1 | 0 |" in text
    # There the counts do not begin at one.
    assert "| 1,024 | 8/64/128 | none | 0 |  | 0 | 0 |" in text
    assert "| 1,024 | 87.5% | 75.0% |" in text
    assert "| 8/64/128 | gradient | 0, 1 | 99.5% | 98.0% |" in text
    assert "| 8/64/128 | first, random0 | 0, 1 | 6.2% | 30.0% |" in text
    # Of the longest prompts alone.
    assert "Half of the layers sparse, 8,192 tokens" in text
    assert "| 0, 1 | 87.5% |" not in text
    assert (
        "3.1 million parameters (4 layers, hidden size 192, 6 heads), trained from seed 1 for 3 minutes, compilation"
        in text
    )


def test_a_model_without_the_record_of_its_training_is_refused(page, tmp_path):
    with_recall(tmp_path, RECALL)
    (tmp_path / "recall" / "recall-model.json").unlink()
    with pytest.raises(ValueError, match=r"recall-model\.json is missing"):
        page(RECORDS)


def test_there_is_no_page_without_results(tmp_path):
    assert page_quality.generate(tmp_path) is None


def test_a_missing_field_is_named(page):
    record = cell("deepest", 9, 0.001)
    del record["ppl_following"]
    with pytest.raises(ValueError, match=r"quality.json: record 0 lacks the field 'ppl_following'"):
        page([record])


def test_a_gpu_result_is_preferred(page, tmp_path):
    page(RECORDS)
    (tmp_path / "quality.json").rename(tmp_path / "quality_cuda.json")
    page([cell("deepest", 9, 0.001)])
    assert page_quality.FILES[0] == "quality_cuda.json"
    assert "quality_cuda.json" in page_quality.generate(tmp_path)[0]


def test_the_same_layers_are_no_comparison(page):
    text = page([cell("gradient", 5, 0.001), cell("deepest", 5, 0.001, indices=cell("gradient", 5, 0)["indices"])])
    assert "Layers chosen by gradient" not in text


def prose(path):
    """A document on one line, so that a sentence is found wherever it breaks."""
    return " ".join(path.read_text(encoding="utf-8").split())


@functools.cache
def measured(path=RESULTS / "quality_cuda.json"):
    content = json.loads(path.read_text(encoding="utf-8"))
    return [r for r in content["records"] if not r["part"].startswith("ranking/")]


def the(policy, geometry, count, decode="dense", prompt=4096, path=RESULTS / "quality_cuda.json"):
    part = f"prompt-{prompt}/{'-'.join(map(str, geometry))}/"
    [record] = [
        r
        for r in measured(path)
        if r["part"].startswith(part) and (r["policy"], r["count"], r["decode"]) == (policy, count, decode)
    ]
    return record


def quoted(name):
    """The prices of ``name``, and how to find the record that one was taken from, in the file that they name."""
    price = prices()[name]
    path = RESULTS.parents[1] / price["source"]
    return price, functools.partial(the, prompt=prices()["prompt"], path=path)


def test_the_warning_of_streaming_decode_has_the_measured_figures():
    price, taken = quoted("streaming")
    assert len(price["choices"]) == 3
    for choice in price["choices"]:
        for share, cost, copied in zip(price["shares"], choice["perplexity"], choice["copied"], strict=True):
            count = round(share * prices()["layers_of_model"])
            record = taken(choice["policy"], choice["geometry"], count, "streaming")
            assert record["ppl_following"][0] == pytest.approx(cost, abs=0.00051)
            assert record["copy"][0] == pytest.approx(copied, abs=0.0051)
            assert record["copy_dense"] == pytest.approx(price["copied_by_dense"], abs=0.0051)


def test_the_warning_of_the_first_layers_has_the_measured_figures():
    price, taken = quoted("first_n")
    assert price["perplexity"].keys() == {"first", "deepest"}
    for policy, cost in price["perplexity"].items():
        record = taken(policy, price["geometry"], price["layers"])
        assert record["ppl_final"][0] == pytest.approx(cost, abs=0.0005)


def test_serving_tells_what_a_new_turn_costs():
    """The ranges over all lengths, geometries and layers, and the needles."""
    turns = [r for r in measured() if r["part"].endswith("/turns")]
    text = prose(DOCS / "serving.md")

    def span(key, rows):
        values = [r[key][0] for r in turns if (rows == "one" and not r["turn"]) or (r["turn"] and r["rows"] == rows)]
        return f"{min(values):+.1%} to {max(values):+.1%}"

    assert f"as one prompt they change by {span('ppl_final', 'one')}" in text
    assert f"{span('ppl_final', 'sparse')} as a sparse turn" in text
    assert f"{span('ppl_final', 'dense')} as a dense one" in text
    assert all(r["needle_dense"] - r["needle"][0] <= 0.051 and r["copy_dense"] - r["copy"][0] < 0.01 for r in turns)


def test_serving_tells_what_streaming_costs():
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    for geometry in ((8, 64, 128), (8, 512, 128)):
        for policy in ("deepest", "gradient"):
            for count in (3, 9, 15):
                record = the(policy, geometry, count, "streaming")
                needle = f"{record['needle'][0]:.0%} of {record['needle_dense']:.0%}"
                copy = f"{record['copy'][0]:.0%} of {record['copy_dense']:.0%}"
                assert f"| {count / 30:.0%} | {record['ppl_following'][0]:+.1%} | {needle} | {copy} |\n" in text
                assert abs(the(policy, geometry, count)["ppl_following"][0]) < 0.005
    small = [
        the(policy, (4, 32, 64), 9, "streaming", prompt)["ppl_following"][0]
        for policy in ("deepest", "gradient")
        for prompt in (2048, 4096, 7680)
    ]
    assert f"every choice of 30% costs {min(small):.0%} or more" in text.replace("\n", " ")


def test_needles_alone_do_not_show_what_the_wrong_layers_break():
    """What the guide says of the model that recalls: look-ups and copying stay, chains of facts do not."""
    records = json.loads((RESULTS / "recall.json").read_text(encoding="utf-8"))["records"]
    longest = {(r["policy"], tuple(r["geometry"]), r["count"]): r for r in records if r["tokens"] == 8192}
    chains = {name: longest[name, (8, 512, 128), 3]["accuracy"]["2 hops"] for name in ("direct", "deepest", "first")}
    assert chains["direct"] >= chains["deepest"] > 0.9 > 0.1 > chains["first"]
    halves = [r for r in records if r["count"] == 3]
    assert all(r["dense"][task] - r["accuracy"][task] < 0.005 for r in halves for task in ("0 hops", "copy"))


def test_guide_has_the_measured_figures():
    guide = prose(DOCS / "guide.md")

    def cost(policy, geometry, count, decode="dense"):
        key = "ppl_final" if decode == "dense" else "ppl_following"
        return the(policy, geometry, count, decode)[key][0]

    small, wide = (4, 32, 64), (8, 512, 128)
    assert f"cost {cost('deepest', small, 15):+.1%} with 4/32/64" in guide
    assert f"and {cost('deepest', wide, 15):+.1%} with 8/512/128" in guide
    # The advice that the guide gives without figures.
    streamed = {
        geometry: [cost(p, geometry, 9, "streaming") for p in ("gradient", "deepest")] for geometry in (small, wide)
    }
    assert streamed[wide][0] < streamed[wide][1]
    assert streamed[small][0] > streamed[small][1]
    of = {tuple(r["geometry"]): r["ppl_final"][0] for r in measured() if r["part"] == "prompt-4096/ablations"}
    assert all(of[without] > 10 * of[8, 64, 128] for without in ((0, 64, 128), (8, 0, 128), (8, 64, 0)))
    page = (DOCS / "quality.md").read_text(encoding="utf-8")
    for said in ("deepest n in 18 of 18", "deepest n in 10 of 27", "direct in 1 of 36"):
        assert said in page
    for geometry in ((4, 32, 64), (8, 64, 128), (8, 512, 128)):
        for count in (3, 5, 9):
            assert the("direct", geometry, count)["indices"] == the("deepest", geometry, count)["indices"]
