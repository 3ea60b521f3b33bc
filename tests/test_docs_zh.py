"""The Chinese pages against the English: the same sections, and in each the same code, links, tables and numbers."""

import functools
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ZH = DOCS / "zh"
NAMES = ("README.md", "legacy-api.md", "quick-reference.md", "serving.md", "vllm.md")

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n|\n(?= {4}))+")
_COMMENT = re.compile(r"\s*#.*$", re.MULTILINE)
_HEADING = re.compile(r"^(?P<level>#+) (?P<title>.+)$", re.MULTILINE)
_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
_LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>[^)\s]+)\)")
_NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)*%?")
_SPAN = re.compile(r"`([^`]+)`")


@dataclass
class Section:
    """What a section is made of, whatever language its sentences are in."""

    level: int
    code: list[str] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    links: Counter = field(default_factory=Counter)
    names: Counter = field(default_factory=Counter)
    numbers: Counter = field(default_factory=Counter)


def english(page):
    """The English page of a page; itself where it is none of ``docs/zh``."""
    if page.parent != ZH:
        return page
    return ROOT / "README.md" if page.name == "README.md" else DOCS / page.name


@functools.cache
def without_code(text):
    """The text without its blocks of code, and the blocks without comments, in their order."""
    blocks = []

    def take(match):
        lines = _COMMENT.sub("", match["code"] if "code" in match.re.groupindex else match[0]).splitlines()
        blocks.append((match.start(), "\n".join(line.rstrip() for line in lines).strip()))
        return re.sub(r"[^\n]", " ", match[0])  # so that places stay what they are

    prose = _INDENTED.sub(take, _FENCE.sub(take, re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)))
    return prose, sorted(blocks)


@functools.cache
def anchors(text):
    """The anchors of the headings, in their order, as GitHub makes them."""
    prose, _ = without_code(text)
    titles = [_LINK.sub(r"\g<text>", match["title"]).lower() for match in _HEADING.finditer(prose)]
    return [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]


def target(page, link):
    """Where a link leads, in a form that is the same for both languages: the English page and the heading's number."""
    if re.match(r"[a-z]+:", link):
        return link
    path, _, anchor = link.partition("#")
    file = (page.parent / path).resolve() if path else page
    place = anchors(file.read_text(encoding="utf-8")).index(anchor) if anchor else None
    return english(file).relative_to(ROOT).as_posix(), place


def sections(page, text):
    prose, blocks = without_code(text)
    headings = list(_HEADING.finditer(prose))
    ends = [heading.start() for heading in headings[1:]] + [len(prose)]
    found = []
    for heading, end in zip(headings, ends, strict=True):
        part = prose[heading.start() : end]
        found.append(
            Section(
                level=len(heading["level"]),
                code=[code for place, code in blocks if heading.start() <= place < end],
                tables=[[row.count("|") for row in table.splitlines()] for table in _TABLE.findall(part)],
                links=Counter(target(page, match["target"]) for match in _LINK.finditer(part)),
                names=Counter(" ".join(span.split()) for span in _SPAN.findall(part)),
                numbers=Counter(_NUMBER.findall(_SPAN.sub("", _LINK.sub(r"\g<text>", part)))),
            )
        )
    return found


def of(page):
    return sections(page, page.read_text(encoding="utf-8"))


def test_every_page_is_known():
    assert sorted(page.name for page in ZH.glob("*.md")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["level", "code", "tables", "links", "names", "numbers"])
def test_both_pages_have_the_same(name, what):
    zh, en = of(ZH / name), of(english(ZH / name))
    assert [getattr(section, what) for section in zh] == [getattr(section, what) for section in en]


@pytest.mark.parametrize("name", NAMES)
def test_the_pages_lead_to_each_other(name):
    zh = ZH / name
    for page, other in ((zh, english(zh)), (english(zh), zh)):
        links = [match["target"] for match in _LINK.finditer(page.read_text(encoding="utf-8"))]
        assert other in [(page.parent / link).resolve() for link in links if ":" not in link]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "added",
    [
        "\n## One more\n\nText.\n",
        "\nIt took 12,345 ms.\n",
        "\nSee `one_more_name`.\n",
        "\n[more](https://example.org)\n",
        "\n| a | b |\n|---|---|\n",
        "\n```python\nprint()\n```\n",
        "\n    make more\n",
    ],
)
def test_what_the_english_page_gains_is_missed(name, added):
    page = english(ZH / name)
    assert sections(page, page.read_text(encoding="utf-8") + added) != of(ZH / name)
    assert sections(page, page.read_text(encoding="utf-8") + "\nA sentence.\n") == of(page)


def test_comments_are_free_to_be_translated():
    one, other = "# A\n\n    make demo   # a model\n", "# 甲\n\n    make demo  # 模型\n"
    assert sections(DOCS / "a.md", one) == sections(ZH / "a.md", other)
    assert sections(DOCS / "a.md", one) != sections(ZH / "a.md", other.replace("demo", "bench"))
