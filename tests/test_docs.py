"""The documentation against the code: every reason has its section, every link its target, every example runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tmx_compile.report import Reason

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
REASONS = DOCS / "reasons.md"

_FENCE = re.compile(r"^(?P<mark><!-- run -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def examples(text):
    """(code, whether it is marked to be run) of every Python block."""
    return [(match["code"], match["mark"] is not None) for match in _FENCE.finditer(text)]


def runnable():
    found = []
    for page in PAGES:
        marked = [code for code, mark in examples(page.read_text(encoding="utf-8")) if mark]
        found += [pytest.param(code, id=f"{name_of(page)} {i}") for i, code in enumerate(marked)]
    return found


def reason_sections():
    """The text of each section of reasons.md, by its heading; what comes before the first is under ''."""
    heading, *rest = re.split(r"^## (.+)$", REASONS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {"": heading} | dict(zip(rest[::2], rest[1::2], strict=True))


def test_every_reason_has_its_section_in_order():
    assert list(reason_sections())[1:] == [reason.name for reason in Reason]


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_reason_is_asserted_by_a_test(reason):
    mention = re.compile(rf"""\bReason\.{reason.name}\b|["']{reason.name}["']""")
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    assert any(mention.search(path.read_text(encoding="utf-8")) for path in tests)


@pytest.mark.parametrize("reason", [reason.name for reason in Reason])
def test_the_example_of_a_reason_provokes_it(reason):
    sections = reason_sections()
    names = {"__name__": "example"}
    for code, _ in examples(sections[""]) + examples(sections[reason]):
        exec(compile(code, name_of(REASONS), "exec"), names)
    if reason == "NO_LOWERING":
        # No site ever carries it; the example shows the error of a lowering chosen by name.
        assert isinstance(names["cause"], names["LoweringError"])
    elif reason == "LENGTH_UNKNOWN":
        assert names["counts"].steps == {reason: 1}
    else:
        assert names["report"].sites[0].reason == reason


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    prose = re.sub(
        r"^```.*?^```$|`[^`\n]*`(?!\])", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    targets = [match["target"] for match in _LINK.finditer(prose)]
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in relative if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile(page):
    text = page.read_text(encoding="utf-8")
    blocks = examples(text)
    assert len(blocks) == text.count("```python")
    for code, _ in blocks:
        compile(code, name_of(page), "exec")


def test_the_pages_have_examples_to_run():
    assert {param.id for param in runnable()} >= {"README.md 0", "docs/guide.md 0"}


@pytest.mark.parametrize("code", runnable())
def test_marked_examples_run(code, tmp_path):
    """As a program of its own, as a reader would start it."""
    program = tmp_path / "example.py"
    program.write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    # A minute on an idle machine is plenty; the limit is there to end a hang, not to measure.
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "print(backend.report)" in code:
        assert re.search(r"layers\.1\.self_attn.*triangle", done.stdout), done.stdout


def test_dynamo_is_as_the_examples_expect():
    """README: the wrapper of torch.compile hands ``generate`` to the original module, which runs uncompiled."""

    class Model(torch.nn.Module):
        def forward(self, x):
            return x + 1

        def generate(self, x):
            return self(x)

    compiled = []

    def backend(gm, example_inputs):
        compiled.append(gm)
        return gm.forward

    torch.compile(Model(), backend=backend).generate(torch.ones(2))
    assert compiled == []
    model = Model()
    model.compile(backend=backend)
    model.generate(torch.ones(2))
    assert len(compiled) == 1
