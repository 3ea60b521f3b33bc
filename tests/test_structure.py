"""The house: imports point down the list only, and the package imports without its optional parts."""

import ast
import subprocess
import sys
from pathlib import Path

import tmx_compile

ROOT = Path(tmx_compile.__file__).parent
# Reading order. A room may import itself and rooms above it; graph and lowering know each other only as listed.
ORDER = [
    "version",
    "errors",
    "identity",
    "environment",
    "config",
    "chunks",
    "plan",
    "report",
    "ops",
    "graph",
    "lengths",
    "guards",
    "always",
    "lowering",
    "pipeline",
    "record",
    "one_row",
    "standalone",
    "npu",
]
FREE = {
    "api": {*ORDER, "price"},
    "deploy": {*ORDER, "api"},
    "testing": set(ORDER),
    "modules": {"config", "plan", "ops"},
    # To advise, a layer has to be timed; what it computes is never taken from bench.
    "analysis": {*ORDER, "bench"} - {"always", "standalone"},
    "bench": {"version", "config", "plan", "lowering", "api"},
    "price": {"config"},
    "cache": {"config", "price"},
    "cli": {"analysis", "bench", "config"},
    "__init__": None,
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tmx_compile"):
            parts = node.module.split(".")
            yield parts[1:] or [alias.name for alias in node.names][:1], node.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("tmx_compile"):
                    yield alias.name.split(".")[1:], alias.name


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_down_the_list():
    wrong, seen = [], 0
    for path in ROOT.rglob("*.py"):
        room = room_of(path)
        assert room in ORDER or room in FREE, f"{room} has no place in the reading order"
        allowed = FREE[room] if room in FREE else set(ORDER[: ORDER.index(room) + 1])
        for parts, name in imports(path):
            seen += 1
            if allowed is not None and parts[0] not in allowed | {room}:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert seen > 50
    assert wrong == []


def test_targets_do_not_import_one_another():
    targets = {"blocked", "dense", "flex", "operator_call", "reference"}
    for target in targets:
        for parts, name in imports(ROOT / "lowering" / f"{target}.py"):
            assert len(parts) < 2 or parts[0] != "lowering" or parts[1] not in targets, f"{target} imports {name}"


def test_plan_knows_no_fx():
    for path in (ROOT / "plan").rglob("*.py"):
        assert "torch.fx" not in path.read_text(), path


def test_imports_cold():
    """Without transformers, triton and torch_npu, and without touching them where they are installed."""
    program = (
        "import sys\n"
        "for name in ('transformers', 'triton', 'torch_npu', 'gguf', 'expecttest'):\n"
        "    sys.modules[name] = None\n"
        "import tmx_compile, tmx_compile.testing\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_files_stay_one_room():
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 480}
    assert long == {}
