"""``tmx explain``: a model's folder without weights in, its layers and a page out; and what it refuses."""

import re
from html.parser import HTMLParser

import pytest
from transformers import Gemma3TextConfig, Qwen3Config

from tmx_compile.cli import main
from tmx_compile.commands.outcome import Outcome, Row, rows
from tmx_compile.commands.page import page
from tmx_compile.commands.picture import Shape, section_polygons, svg
from tmx_compile.config import TriangleMixConfig
from tmx_compile.mask import Grid, Window, attends, dense_section, last_section, middle_section, streaming_section
from tmx_compile.mask.geometry import ALL_ROWS, Geometry
from tmx_compile.report import Report, SiteRecord

SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
VOID = {"meta", "br", "rect", "polygon"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen3 of three layers: its configuration alone."""
    made = tmp_path_factory.mktemp("qwen3")
    Qwen3Config(vocab_size=128, num_hidden_layers=3, max_position_embeddings=4096, **SIZES).save_pretrained(made)
    return made


class Page(HTMLParser):
    """Elements in order as (name, attributes, text); every one has to be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.elements[self.open[-1][1]][2] += data

    def texts(self, tag):
        return [text for name, _, text in self.elements if name == tag]

    def attributes(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


def section_at(polygons, row, key):
    """What covers a cell's centre: the last polygon around it, by the crossings of a ray to the right."""
    x, y = key + 0.5, row + 0.5
    found = None
    for name, corners in polygons:
        crossings = 0
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
                crossings += 1
        found = name if crossings % 2 else found
    return found


def drawn(text):
    """The polygons of an SVG, as a reader sees them."""
    return [
        (attributes["class"], [tuple(map(float, point.split(","))) for point in attributes["points"].split()])
        for attributes in Page(text).attributes("polygon")
    ]


@pytest.mark.parametrize("reach", [None, 0, 3, 9, 200])
@pytest.mark.parametrize(
    "geometry", [None, (0, 0, 0), (2, 3, 4), (0, 5, 0), (30, 1, 2), (1, 40, 3), (3, 2, 40), (2, 0, 1)]
)
def test_a_picture_is_its_mask_cell_by_cell(geometry, reach):
    n = 23
    grid = Grid(n, n)
    if geometry is None:
        sections = {"dense": dense_section()}
    else:
        sections = {
            "streaming": streaming_section(*geometry[:2]),
            "last": last_section(*geometry),
            "middle": middle_section(*geometry),
        }
    polygons = drawn(svg(Shape(n, Geometry(*(geometry or (0, 0, ALL_ROWS)), reach)), "a mask"))
    for row in range(n):
        for key in range(n):
            own = reach is None or attends(Window(reach), grid, row, key)
            want = [name for name, mask in sections.items() if own and attends(mask, grid, row, key)]
            assert section_at(polygons, row, key) == (want[0] if want else None), (row, key)


def test_a_large_picture_is_its_mask_at_its_edges():
    n, (sink, window, last), reach = 131072, (8, 512, 128), 100_000
    polygons = section_polygons(Shape(n, Geometry(sink, window, last, reach)))
    for row in (0, 512, 513, reach, reach + 8, n - last - 1, n - last, n - 1):
        for key in (0, sink - 1, sink, row - reach, row - reach - 1, row - window, row - window - 1, row, row + 1):
            if not 0 <= key < n:
                continue
            near, final = key < sink or row - key <= window, row >= n - last
            want = "streaming" if near else "last" if final else "middle"
            attended = key <= row and row - key <= reach
            assert section_at(polygons, row, key) == (want if attended else None), (row, key)


def test_it_names_every_layer_and_writes_a_page_without_weights(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    options = ("--layers", "0,2", "--geometry", "4/32/64", "--min-seq-len", "100", "--device", "cpu")
    main(["explain", str(folder), "--tokens", "300", *options, "--html", str(out)])
    shown = capsys.readouterr().out
    assert "sparse: 2 (0, 2) of 3 layers" in shown
    # 300 rows: causal 300 * 301 / 2 in each layer; triangle 4 sinks + 33 window keys, 64 last rows.
    attended = sum(i + 1 if i >= 300 - 64 or i < 37 else 37 for i in range(300))
    assert f"attended pairs: {2 * attended + 45150:,} of {3 * 45150:,}" in shown
    assert re.search(r"│ +1 │ dense +│.*the configuration keeps this layer dense", shown)
    assert re.search(r"│ +2 │ triangle +│ \w+", shown)
    found = Page(out.read_text(encoding="utf-8"))
    squares = [(a["class"], text) for name, a, text in found.elements if name == "li"]
    assert squares == [("triangle", "0"), ("dense", "1"), ("triangle", "2")]
    assert [cell for cell in found.texts("td") if cell.startswith("model.layers")] == [
        f"model.layers.{i}.self_attn" for i in range(3)
    ]
    assert len(found.attributes("svg")) == 2, "one picture a distinct mask"
    assert not {"script", "link", "img", "iframe"} & {name for name, _, _ in found.elements}
    assert "http" not in out.read_text(encoding="utf-8").replace("http://www.w3.org", "")


def test_a_layers_own_window_is_a_mask_of_its_own(tmp_path, capsys):
    config = Gemma3TextConfig(
        vocab_size=128,
        num_hidden_layers=2,
        sliding_window=100,
        layer_types=["sliding_attention", "full_attention"],
        **SIZES,
    )
    config.save_pretrained(tmp_path)
    out = tmp_path / "page.html"
    options = ("--deepest", "2", "--geometry", "4/32/64", "--min-seq-len", "100", "--device", "cpu")
    main(["explain", str(tmp_path), "--tokens", "300", *options, "--html", str(out)])
    labels = [a["aria-label"] for a in Page(out.read_text(encoding="utf-8")).attributes("svg") if "aria-label" in a]
    geometry = "triangle: 4 sinks, window 32, 64 last rows"
    assert labels == [f"{geometry}, within the layer's own window of 100 keys", geometry]


def test_a_selected_layer_that_stays_dense_is_told_apart(folder, capsys):
    main(["explain", str(folder), "--tokens", "300", "--deepest", "1", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "dense although selected: 1 (2)" in shown
    assert "the prompt is not longer than min_seq_len" in shown


def test_a_layer_is_selected_by_the_configuration_whatever_its_reason():
    """Gemma 2's softcap is a reason to stay dense in a layer that was to stay dense anyway."""
    site = dict(graph=0, path="", query=(1, 1, 9, 8), key=(1, 1, 9, 8), value=(1, 1, 9, 8), dtype="", dynamic=False)
    refused = dict(decision="dense", reason="SCORE_CHANGED", detail="tanh", lowering="", attended_pairs=0)
    report = Report([SiteRecord(**site, **refused, causal_pairs=0, layer=layer) for layer in (0, 1, None)])
    config = TriangleMixConfig(triangle_layer_indices=[1])
    found = rows(report, config, 3)
    assert [(row.layer, row.kind) for row in found] == [(0, "dense"), (1, "refused"), (2, "none"), (None, "refused")]
    summary = dict(Outcome("m", "C", 9, "cpu", config, found, []).summary())
    assert summary["dense although selected"] == "2 (1)"
    assert summary["attended pairs"] == "none: no attention was read"


def test_what_a_model_says_is_escaped():
    evil = "<script>alert('x')</script>&\""
    row = Row(0, evil, "refused", evil, evil, 1, 1, Shape(1, Geometry(0, 0, ALL_ROWS)))
    text = page(Outcome(evil, evil, 1, "cpu", TriangleMixConfig(), [row], [evil]))
    assert "<script" not in text
    assert evil in Page(text).texts("td")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/model"}, "there is no folder '/no/such/model'"),
        ({"model": "no-such-model"}, "model 'no-such-model' has no configuration that can be loaded: "),
        ({"--tokens": "0"}, "argument --tokens: must be a whole number of at least 1, got '0'"),
        ({"--tokens": "-5"}, "argument --tokens: must be a whole number of at least 1, got '-5'"),
        ({"--layers": "1,3"}, "layers must be among the model's 0 to 2, got 3"),
        ({"--layers": "2-1"}, "argument --layers: must be layers counted from 0 as in 20,21,24-27, got '2-1'"),
        ({"--layers": "1,1"}, "triangle_layer_indices"),
        ({"--deepest": "4"}, "deepest must be at most the model's 3 layers, got 4"),
        ({"--geometry": "4/32"}, "argument --geometry: must be sinks/window/last rows as in 8/64/128, got '4/32'"),
        ({"--min-seq-len": "x"}, "argument --min-seq-len: must be a whole number of at least 0, got 'x'"),
        ({"--profile": "/no/such.json"}, "/no/such.json"),
        ({"--html": "/no/such/page.html"}, "html must be a file in an existing folder, got '/no/such/page.html'"),
    ],
)
def test_bad_input_is_one_clear_line(monkeypatch, capsys, folder, changes, message):
    monkeypatch.setattr("tmx_compile.commands.explain.explain_shape", None)
    given = {"model": str(folder), "--tokens": "300"} | changes
    with pytest.raises(SystemExit) as stopped:
        main(["explain", given.pop("model"), *(word for pair in given.items() for word in pair)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.splitlines()[-1].startswith("tmx explain: error: ")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ("--lowering", "blocked", "--geometry", "4/5000/64"), "lowering 'blocked' cannot take this attention: "),
        ({"num_key_value_heads": 3}, (), "model of Qwen3Config cannot be traced without its weights: "),
        ({"hidden_act": "no such"}, (), "model cannot be built from its Qwen3Config: "),
    ],
)
def test_what_cannot_be_traced_is_one_clear_line(tmp_path, capsys, changes, options, message):
    config = Qwen3Config(vocab_size=128, num_hidden_layers=1, max_position_embeddings=8192, **(SIZES | changes))
    config.save_pretrained(tmp_path)
    given = ("--tokens", "6000", "--deepest", "1", "--device", "cpu", *options)
    with pytest.raises(SystemExit):
        main(["explain", str(tmp_path), *given])
    assert f"tmx explain: error: {message}" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["explain", str(tmp_path), "--tokens", "300"])
    assert f"model must be a folder with a config.json, {str(tmp_path)!r} has none" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["explain", str(tmp_path), "--tokens", "300"])
    assert "has no configuration that can be loaded: " in capsys.readouterr().err.splitlines()[-1]
