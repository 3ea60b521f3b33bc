"""docs/quality.md says what a result file says, and nothing where the file says nothing."""

import json
import re

import pytest

from benchmarks import docs, docs_quality, quality
from benchmarks.common import RESULTS
from tmx_compile.price import STREAMING_COST

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
    cell("gradient", 9, 0.11, decode="streaming"),
    cell("deepest", 15, 0.07, [0, 64, 128], part="prompt-2048/ablations"),
]


@pytest.fixture
def page(tmp_path):
    def write(records):
        settings = {**quality.settings(False), **quality._ITEMS["cpu"]}
        stored = json.loads((RESULTS / "first_n.json").read_text(encoding="utf-8"))
        content = {**stored, "case": "quality", "settings": settings, "records": records}
        (tmp_path / "quality.json").write_text(json.dumps(content), encoding="utf-8")
        text, pictures = docs.generate_quality(tmp_path)
        for picture in pictures:
            picture.write(tmp_path)
            assert picture.is_current(tmp_path)
        return text

    return write


def test_the_page_tells_the_answers(page):
    text = page(RECORDS)
    # 5: 0.001 < 0.0015; 9: 0.004 > 0.0035 and 0.25; 15: 0.008 < 0.02. Random draws: mean 0.006.
    assert "first n in 1 of 1, deepest n in 2 of 3, the mean of three random draws in 1 of 1 comparisons" in text
    assert (
        "within 0.3% perplexity (upper ends of the intervals): 5 of 30 at 2,048 tokens with 8/64/128 (gradient)" in text
    )
    assert (
        "within 1.0% perplexity (upper ends of the intervals): 15 of 30 at 2,048 tokens with 8/64/128 (gradient)"
        in text
    )
    assert text.count("not even 3 at 2,048 tokens with 8/512/128") == 2
    assert "calibrated +0.4%, deepest +0.4%, first +25.0%" in text
    assert "needle retrieval falls most from 100% to 12% (deepest, 2,048 tokens with 8/64/128)" in text
    assert "| 2,048 | 8/64/128 | gradient | 9 (30%) | 29% | +0.4% (+0.3% to +0.5%) | +11.0% (+10.9% to" in text
    assert "| 2,048 | 0/64/128 | +7.0% (+6.9% to +7.1%) |" in text
    assert "All 30 layers sparse: perplexity +90.0% (+89.9% to +90.1%)" in text


def test_what_was_not_measured_is_not_told(page):
    text = page([cell("deepest", 9, 0.001)])
    for absent in ("gradient have", "streaming decode\n", "What sinks", "published presets", "All 30 layers"):
        assert absent not in text
    assert re.search(r"within 0.3% perplexity .*: 9 of 30 at 2,048 tokens with 8/64/128 \(deepest\)", text)


def test_noise_does_not_pass_for_free(page):
    """A mean within the budget whose interval is not."""
    text = page([cell("deepest", 9, 0.0025, ppl_final=[0.0025, -0.01, 0.004])])
    assert "within 0.3% perplexity (upper ends of the intervals): nothing" in text


def test_there_is_no_page_without_results(tmp_path):
    assert docs.generate_quality(tmp_path) is None


def test_a_missing_field_is_named(page):
    record = cell("deepest", 9, 0.001)
    del record["ppl_following"]
    with pytest.raises(ValueError, match=r"quality.json: record 0 lacks the field 'ppl_following'"):
        page([record])


def test_a_gpu_result_is_preferred(page, tmp_path):
    page(RECORDS)
    (tmp_path / "quality.json").rename(tmp_path / "quality_cuda.json")
    page([cell("deepest", 9, 0.001)])
    assert docs_quality.FILES[0] == "quality_cuda.json"
    assert "quality_cuda.json" in docs.generate_quality(tmp_path)[0]


def test_the_same_layers_are_no_comparison(page):
    text = page([cell("gradient", 5, 0.001), cell("deepest", 5, 0.001, indices=cell("gradient", 5, 0)["indices"])])
    assert "Layers chosen by gradient" not in text


def test_the_warning_of_streaming_decode_has_the_measured_figures():
    content = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    for share, cost in STREAMING_COST.items():
        [record] = [
            r
            for r in content["records"]
            if (r.get("decode"), r["policy"], r.get("prompt")) == ("streaming", "deepest", 2048)
            and (r["geometry"], r["count"]) == ([8, 64, 128], round(share * 30))
        ]
        assert record["ppl_following"][0] == pytest.approx(cost, abs=0.005)
        assert (record["copy"][0] < 0.25) == (share >= 0.3)
