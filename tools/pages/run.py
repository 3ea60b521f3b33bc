"""Write the generated parts of the documents, and their pictures, from the stored results.

python -m tools.pages            writes them
python -m tools.pages --check    fails where they differ from what the results say
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import RESULTS
from tools.pages import (
    page_ascend,
    page_attach,
    page_benchmarks,
    page_dense,
    page_distributed,
    page_dynamic,
    page_floor,
    page_quality,
    page_vllm,
)

DOCS = RESULTS.parent.parent / "docs"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.pages", description="Write the generated parts of docs/.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages to write, or to compare with")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    options = parser.parse_args(arguments)
    folder = options.docs
    page, pictures = page_benchmarks.generate(options.results, folder)
    pages = [(folder / page_benchmarks.PAGE, page)]
    if (quality := page_quality.generate(options.results)) is not None:
        pages.append((folder / page_quality.PAGE, quality[0]))
        pictures += quality[1]
    if (ascend := page_ascend.generate(options.results, folder)) is not None:
        pages.append((folder / page_ascend.PAGE, ascend))
    if (attach := page_attach.generate(options.results, folder)) is not None:
        pages.append((folder / page_attach.PAGE, attach))
    if (dense := page_dense.generate(options.results, folder)) is not None:
        pages.append((folder / page_dense.PAGE, dense))
    if (distributed := page_distributed.generate(options.results, folder)) is not None:
        pages.append((folder / page_distributed.PAGE, distributed[0]))
        pictures += distributed[1]
    if (dynamic := page_dynamic.generate(options.results, folder)) is not None:
        pages.append((folder / page_dynamic.PAGE, dynamic))
    if (floor := page_floor.generate(options.results, folder)) is not None:
        pages.append((folder / page_floor.PAGE, floor))
    pages += page_vllm.generate(options.results, folder).items()
    if not options.check:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in pages:
            path.write_text(text, encoding="utf-8")
        for picture in pictures:
            if not picture.is_current(folder):
                picture.write(folder)
        return
    stale = [picture.file for picture in pictures if not picture.is_current(folder)]
    for path, text in pages:
        stored = path.read_text(encoding="utf-8") if path.is_file() else ""
        changes = difflib.unified_diff(stored.splitlines(), text.splitlines(), "stored", "generated", lineterm="")
        if stored != text:
            print("\n".join(changes))
            stale.append(path.name)
    if stale:
        sys.exit(f"{', '.join(stale)} is out of date: run python -m tools.pages")
