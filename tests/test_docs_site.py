"""The documentation site as built: every public name with its docstring, every link with its target, every picture."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tools import build_docs

ROOT = Path(__file__).resolve().parent.parent
_VOID = {"br", "hr", "img", "input", "link", "meta", "path", "wbr"}


class Page(HTMLParser):
    """What a page has: anchors, links, sources, and the text inside each element that has an anchor."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.text: dict[str, str] = defaultdict(str)
        self._open: list[str | None] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.links += [given["href"] or ""] if "href" in given else []
        self.sources += [given["src"] or ""] if "src" in given else []
        if given.get("id"):
            self.text[str(given["id"])] += ""
        if tag not in _VOID:
            self._open.append(given.get("id"))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for anchor in {anchor for anchor in self._open if anchor}:
            self.text[anchor] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    assert build_docs.main(["--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def read(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def letters(text: str) -> str:
    """The text without markup and layout."""
    return re.sub(r":\w+:(?=`)|\W|_", "", text)


def test_every_page_is_there(site: Path) -> None:
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    wanted = {"index.html", "CHANGELOG.html", *(f"api/{name.replace('.', '/')}.html" for name in build_docs.MODULES)}
    wanted |= {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    # And no module that is none of a user's business.
    assert pages == wanted


def docstrings(module: str) -> Iterator[tuple[str, str]]:
    """Every public name of a module and the public methods and properties of its classes, with the docstring."""
    owner = import_module(module)
    for name in owner.__all__:
        what = getattr(owner, name)
        # A string's docstring is that of str.
        yield name, "" if isinstance(what, str) else inspect.getdoc(what) or ""
        ours = (
            [base for base in what.__mro__ if base.__module__.startswith("tmx_compile")]
            if inspect.isclass(what)
            else []
        )
        for each in sorted({each for base in ours for each in vars(base) if not each.startswith("_")}):
            member = getattr(what, each)
            if inspect.isroutine(member) or isinstance(member, property):
                yield f"{name}.{each}", inspect.getdoc(member) or ""


@pytest.mark.parametrize("module", build_docs.MODULES)
def test_every_public_name_is_there_with_its_docstring(site: Path, read: dict[Path, Page], module: str) -> None:
    page = read[site / f"api/{module.replace('.', '/')}.html"]
    for name, docstring in docstrings(module):
        assert name in page.text, f"{module}.{name} is not in the reference"
        shown = letters(page.text[name])
        for line in docstring.splitlines():
            # A heading such as Args is spelled out there.
            if not re.fullmatch(r"[A-Z]\w+:", line):
                assert letters(line) in shown, f"{module}.{name} lacks {line!r}"


@pytest.mark.parametrize("module", build_docs.MODULES)
def test_every_reference_is_a_link(site: Path, module: str) -> None:
    """Where a docstring names something by a role, a reader can follow."""
    content = (site / f"api/{module.replace('.', '/')}.html").read_text(encoding="utf-8")
    texts = [(module, import_module(module).__doc__ or ""), *docstrings(module)]
    roles = [(name, role) for name, text in texts for role in re.findall(r":\w+:`([^`]+)`", text)]
    dead = [f"{name}: {role}" for name, role in roles if not re.search(rf">{re.escape(role)}(\(\))?</a>", content)]
    assert dead == []


def test_no_link_is_broken(site: Path, read: dict[Path, Page]) -> None:
    broken, seen = [], 0
    for path, page in read.items():
        for target in [*page.links, *page.sources]:
            if re.match(r"[a-z]+:", target):
                continue
            seen += 1
            file, fragment = urldefrag(target)
            there = (path.parent / unquote(file)).resolve() if file else path
            found = there.is_file() and (not fragment or unquote(fragment) in read[there].text)
            broken += [] if found else [f"{path.relative_to(site)}: {target}"]
    assert seen > 100
    assert broken == []


def test_the_site_stands_alone(read: dict[Path, Page]) -> None:
    """No script, style or picture from a network."""
    assert [source for page in read.values() for source in page.sources if re.match(r"https?:|//", source)] == []


def test_every_picture_is_shown(site: Path, read: dict[Path, Page]) -> None:
    shown = {(path.parent / source).resolve() for path, page in read.items() for source in page.sources}
    pictures = [path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.svg")]
    assert pictures
    for picture in pictures:
        assert (site / picture).read_bytes() == (ROOT / picture).read_bytes()
        assert site / picture in shown, f"no page shows {picture}"


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    assert build_docs.main(["--out", str(tmp_path)]) == 1
    assert "holds something else than a site" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()
