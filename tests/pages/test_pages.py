"""``python -m tools.pages``: what it says of a result file whatever that holds."""

import importlib
import json

import pytest

from benchmarks import run as benchmarks
from benchmarks.common import RESULTS
from studies import run as studies
from tools.pages import blocks
from tools.pages.results import MOVED, today

COMMANDS = sorted(
    {
        command
        for path in RESULTS.rglob("*.json")
        for content in [json.loads(path.read_text(encoding="utf-8"))]
        if isinstance(content, dict)
        for command in [content.get("command"), *(part["command"] for part in content.get("runs", {}).values())]
        if command is not None
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stored_command_is_told_as_it_can_be_run_today(command):
    python, option, module, *rest = today(command).split()
    assert (python, option) == ("python", "-m")
    known = {"benchmarks.run": benchmarks.CASES, "studies.run": studies.CASES}
    if module in known:
        assert rest[0] in {case.name for case in known[module]}
    else:
        assert callable(importlib.import_module(module).main)


def test_a_command_that_moved_keeps_its_arguments():
    assert today("python -m benchmarks.run quality --only 'a b'") == "python -m studies.run quality --only 'a b'"
    assert today("python -m benchmarks.run quality_of_life") == "python -m benchmarks.run quality_of_life"
    assert len(COMMANDS) > 20
    assert all(any(command.startswith(f"python -m {old}") for command in COMMANDS) for old in MOVED)


def test_blocks_are_filled_and_what_is_around_them_stays(tmp_path):
    page = tmp_path / "page.md"
    written = (
        "# Title\n\n<!-- begin one -->\n<!-- end one -->\nbetween\n<!-- begin two -->\nold\n<!-- end two -->\nend\n"
    )
    page.write_text(written, encoding="utf-8")
    text = blocks.filled(page, {"two": "2", "one": "1"})
    assert text == (
        "# Title\n\n<!-- begin one -->\n\n1\n\n<!-- end one -->\nbetween\n"
        "<!-- begin two -->\n\n2\n\n<!-- end two -->\nend\n"
    )
    page.write_text(text, encoding="utf-8")
    assert blocks.filled(page, {"one": "1", "two": "2"}) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "page.md is missing; its text is written by hand"),
        ("no marks\n", "page.md lacks the marks <!-- begin one --> and <!-- end one -->"),
        ("<!-- begin one -->\n", "page.md lacks the marks <!-- begin one --> and <!-- end one -->"),
        ("<!-- begin three -->\n<!-- end three -->\n", "page.md has marks of unknown blocks: three; known: one"),
    ],
)
def test_a_page_without_the_marks_is_refused(tmp_path, text, reason):
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        blocks.filled(page, {"one": "1"})
