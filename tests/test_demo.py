"""The demo's manners: it refuses what would waste minutes, and tells where it stands in few lines."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

DEMO = Path(__file__).resolve().parent.parent / "examples" / "trianglemix_quickstart.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo as a module that prints into ``demo.console.file``, which is no terminal."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "console", Console(file=io.StringIO(), width=100))
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "2048"], "--tokens must be more than 2,048"),
        (["--tokens", "8190", "--new-tokens", "3"], "must fit together into the model's 8,192 positions"),
        (["--runs", "0"], "--runs must be at least 1"),
    ],
)
def test_what_would_waste_minutes_is_refused(
    demo: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [str(DEMO), *arguments])
    with pytest.raises(SystemExit):
        demo.parse_arguments()
    assert message in capsys.readouterr().err


def test_layers_that_became_the_same_share_a_row(demo: ModuleType) -> None:
    def site(layer: int, decision: str, reason: str = "") -> dict[str, Any]:
        rest = {"detail": "", "lowering": "blocked", "attended_pairs": 1, "causal_pairs": 2}
        return {"layer": layer, "decision": decision, "reason": reason, **rest}

    demo.show_sites([*(site(i, "dense", "NOT_SELECTED") for i in range(3)), site(3, "triangle"), site(4, "triangle")])
    rows = demo.console.file.getvalue().splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == ["0 to 2", "3 to 4"]
    assert "the configuration keeps this layer dense" in rows[0]


def test_progress_is_a_line_where_there_is_no_terminal(demo: ModuleType) -> None:
    with demo.doing("compiling"):
        assert demo.console.file.getvalue() == "compiling ...\n"
