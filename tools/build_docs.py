"""Build the documentation as a web site without a network: the pages of docs/ and the API reference.

    python tools/build_docs.py [--out FOLDER]

The site has the layout of the checkout, so that relative links hold: README.md becomes index.html, docs/guide.md
docs/guide.html, and a file that a page shows or links to is copied. Beside them lies api/, which pdoc makes from the
docstrings of what users import: the names in ``__all__`` of MODULES, and nothing else.
"""

from __future__ import annotations

import argparse
import html
import importlib
import os
import posixpath
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "docs_templates"
MODULES = (
    "tmx_compile",
    "tmx_compile.analysis",
    "tmx_compile.integrations.transformers",
    "tmx_compile.testing",
)
"""What users import from, in the order in which the reference lists them."""

_TARGET = re.compile(r'(?P<attribute>\b(?:href|src))="(?P<target>[^"]*)"')
_OUTSIDE = re.compile(r"[a-z]+:|#|$")


def main(arguments: list[str] | None = None) -> int:
    """Build the site; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="the folder, made anew (default: site)")
    out = parser.parse_args(arguments).out
    if out.exists() and not (out / "index.html").exists() and any(out.iterdir()):
        print(f"docs: {out} holds something else than a site; give another --out", file=sys.stderr)
        return 1
    try:
        build(out)
    except ImportError as error:
        print(f"docs: {error}; run `make docs`, or: pip install -e '.[docs]' -c constraints.txt", file=sys.stderr)
        return 1
    print(f"docs: open {out / 'index.html'}")
    return 0


def pages() -> list[Path]:
    """The Markdown files of the site, in the order in which its navigation lists them."""
    docs = ROOT / "docs"
    return [ROOT / "README.md", *sorted(docs.glob("*.md")), *sorted(docs.glob("*/*.md")), ROOT / "CHANGELOG.md"]


def build(out: Path) -> None:
    """Make the whole site in ``out``; what was there is removed."""
    # Here and not above: those who read the lists of pages and modules need no pdoc.
    import pdoc.doc
    from pdoc import render

    shutil.rmtree(out, ignore_errors=True)
    navigation = [(_title(page), _place(page)) for page in pages()]
    reference = [(name, f"api/{name.replace('.', '/')}.html") for name in MODULES]
    render.configure(docformat="google", show_source=False, search=True, template_directory=TEMPLATES)
    render.env.globals.update(site_pages=navigation, site_reference=reference)
    try:
        template = render.env.get_template("page.html.jinja2")
        for page in pages():
            place = _place(page)
            content = _linked(_markdown(page.read_text(encoding="utf-8")), page, out)
            text = template.render(content=content, place=place, root=_root(place), title=_title(page))
            _write(out / place, text)
        modules = {name: pdoc.doc.Module(importlib.import_module(name)) for name in MODULES}
        for (_, place), module in zip(reference, modules.values(), strict=True):
            render.env.globals.update(place=place, root=_root(place))
            _write(out / place, render.html_module(module, modules))
        _write(out / "api/search.js", render.search_index(modules))
    finally:
        render.configure()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _place(page: Path) -> str:
    """Where a page lies in the site."""
    place = page.relative_to(ROOT).with_suffix(".html").as_posix()
    return "index.html" if place == "README.html" else place


def _root(place: str) -> str:
    """The way from a place back to the site's root."""
    return "../" * place.count("/")


def _title(page: Path) -> str:
    """A page's heading up to a colon, and its language where that is not English."""
    if page == ROOT / "README.md":
        return "Overview"
    heading = page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    language = page.relative_to(ROOT).parent.name
    title = re.split("[:：]", heading)[0]
    return title if language in ("", "docs") else f"{title} ({language})"


def _markdown(text: str) -> str:
    """HTML of a page, by the rules by which pdoc reads docstrings."""
    import markdown2
    from pdoc.render_helpers import markdown_extensions

    class Markdown(markdown2.Markdown):  # type: ignore[misc]
        def header_id_from_text(self, text: str, prefix: Any, n: int | None = None) -> str:
            """The anchors that GitHub makes, which links within the pages are written for."""
            plain = html.unescape(re.sub("<[^>]+>", "", text)).strip().lower()
            return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")

    extras = {name: value for name, value in markdown_extensions.items() if name not in ("link-patterns", "pyshell")}
    return str(Markdown(extras=extras).convert(text))


def _linked(content: str, page: Path, out: Path) -> str:
    """The content with its links to pages turned to their HTML; other files that it links to are copied."""

    def turned(found: re.Match[str]) -> str:
        target, _, fragment = found["target"].partition("#")
        if _OUTSIDE.match(found["target"]):
            return found[0]
        file = Path(os.path.normpath(page.parent / target))
        if file.suffix == ".md":
            there = _place(file)
        else:
            there = file.relative_to(ROOT).as_posix()
            (out / there).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / there)
        relative = posixpath.relpath(there, posixpath.dirname(_place(page)) or ".")
        return f'{found["attribute"]}="{relative}{"#" if fragment else ""}{fragment}"'

    return _TARGET.sub(turned, content)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
