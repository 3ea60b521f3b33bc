"""The command ``tmx export`` in the process with torch_npu (see ``standin``)."""

from __future__ import annotations

from typing import Any


def run(folder: Any, *arguments: str) -> bytes:
    """Run ``tmx`` with the arguments; the ``.air`` that it wrote into the folder."""
    from tests.support.ascend.standin import capture
    from tmx_compile.cli import main

    main(arguments)
    return capture.air(folder)


def refused(*arguments: str) -> str:
    """The last line that ``tmx`` says on standard error, where it exits with 2."""
    import contextlib
    import io

    import pytest

    from tmx_compile.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return said.getvalue().splitlines()[-1]
