"""The pictures: what they show, that their titles hold, and that a changed style is noticed."""

import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks.common import RESULTS
from tools.pages import drawing, page_benchmarks, page_distributed, page_quality, pictures

DOCS = RESULTS.parents[1] / "docs"


@pytest.fixture(scope="module")
def drawn():
    """All pictures of the stored results, by file."""
    found = page_benchmarks.generate(RESULTS, DOCS)[1] + page_quality.generate(RESULTS)[1]
    found += page_distributed.generate(RESULTS, DOCS)[1]
    return {picture.file: picture for picture in found}


def test_every_picture_of_the_pages_is_made(drawn):
    shown = {
        name for page in DOCS.parent.rglob("*.md") for name in re.findall(r"\(\S*?([\w-]+\.svg)\)", page.read_text())
    }
    assert shown == drawn.keys() == {path.name for path in DOCS.glob("*.svg")}


def test_a_changed_style_is_noticed(tmp_path, monkeypatch):
    picture = pictures.Picture("some.svg", {"title": "", "x": "", "groups": [["a", [["b", 1.0, "1 s"]]]]}, drawing.bars)
    picture.write(tmp_path)
    assert picture.is_current(tmp_path)
    style = tmp_path / "drawing.py"
    text = Path(drawing.__file__).read_text(encoding="utf-8")
    style.write_text(text.replace('"lines.linewidth": 2', '"lines.linewidth": 3'), encoding="utf-8")
    monkeypatch.setattr(drawing, "__file__", str(style))
    assert not picture.is_current(tmp_path)


def test_pictures_bring_their_own_ground(drawn):
    """A page may be dark: what is drawn first covers the whole picture in white."""
    for file in drawn:
        text = (DOCS / file).read_text(encoding="utf-8")
        assert re.search(r'<g id="patch_1">\s*<path d="[^"]+"\s+style="fill: #ffffff', text), file


def test_bars_begin_at_zero_on_a_linear_axis(drawn):
    figure = Figure()
    drawing.bars(figure, drawn["ttft.svg"].data)
    (axes,) = figure.axes
    assert axes.get_xscale() == "linear"
    assert axes.get_xlim()[0] == 0
    records = json.loads((RESULTS / "ttft.json").read_text(encoding="utf-8"))["records"]
    at = [r for r in records if r["tokens"] == 131072 and not r["mask"] and not r["graphs"]]
    want = [
        next(r["ms"] for r in at if (r["model"], r["variant"]) == (model, variant)) / 1e3
        for model in ("Llama-3.1-8B", "Qwen3-8B")
        for variant in ("dense-causal", "triangle-8-512-128")
    ]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(want)


def test_one_panel_and_no_legend(drawn):
    for picture in drawn.values():
        figure = Figure()
        picture.draw(figure, picture.data)
        (axes,) = figure.axes
        assert axes.get_legend() is None
        names = [text.get_text() for text in axes.texts]
        lines = picture.data.get("lines", [])
        assert sorted(names) == sorted(name for name, *_ in lines) or not lines


def lines_of(picture):
    return {name: dict(map(tuple, points)) for name, points, *_ in picture.data["lines"]}


@pytest.mark.parametrize("file", ["operator-cpu.svg", "operator-cuda.svg"])
def test_the_longer_the_prompt_the_more_is_saved(drawn, file):
    for name, line in lines_of(drawn[file]).items():
        values = [line[n] for n in sorted(line)]
        assert values == sorted(values)
        assert name == "dense" or values[-1] > values[0] > 1


def test_the_first_layers_cost_most(drawn):
    lines = lines_of(drawn["quality-layers.svg"])
    first = lines.pop("first")
    lines.pop("random")
    assert first
    assert all(cost > line[count] for count, cost in first.items() for line in lines.values())


def test_the_deepest_layers_are_not_needed_to_find_and_copy(drawn):
    lines = lines_of(drawn["quality-tasks.svg"])
    for task in ("needle", "copy"):
        dense = lines[f"{task}, deepest"][0]
        assert min(lines[f"{task}, deepest"].values()) > dense - 0.11
        assert max(right for count, right in lines[f"{task}, first"].items() if count) < dense - 0.4


def test_which_layers_go_sparse_decides_what_survives(drawn):
    lines = lines_of(drawn["quality-recall.svg"])
    assert lines["direct"][4] > 0.9 > 0.3 > lines["gradient, deepest"][4]
    assert lines["first"][2] < 0.2


def test_time_falls_until_there_are_as_many_cards_as_heads(drawn):
    lines = lines_of(drawn["distributed-time.svg"])
    assert len(lines) == 5
    for line in lines.values():
        assert all(line[2 * cards] < 0.62 * line[cards] for cards in (2, 4, 8, 16))
        assert 0.85 * line[32] < line[64] <= line[32]


def test_collectives_cost_most_in_short_prompts_and_beyond_one_host(drawn):
    lines = lines_of(drawn["distributed-share.svg"])
    for cards in (2, 4, 8, 16, 32, 64):
        shares = [line[cards] for line in lines.values()]
        assert shares == sorted(shares, reverse=True)
    for line in lines.values():
        assert line[16] / line[8] > 3 > line[8] / line[4]
