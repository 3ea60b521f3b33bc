"""The house: imports point down the list only, and the package imports without its optional parts."""

import ast
import subprocess
import sys
from pathlib import Path

import tmx_compile

ROOT = Path(tmx_compile.__file__).parent
# The way the data flows. A room may import itself and rooms above it.
ORDER = [
    "version",
    "errors",
    "report",
    "config",
    "mask",
    "operator",
    "legacy",
    "graph",
    "find",
    "proof",
    "lowering",
    "passes",
    "compilers",
    "backend",
    "export",
]
FREE = {
    "testing": set(ORDER),
    # To advise, a layer has to be timed; what it computes is never taken from bench.
    "analysis": {*ORDER, "bench"} - {"export"},
    "bench": {"version", "config", "legacy", "mask", "lowering", "backend"},
    "integrations": {"config", "legacy"},
    "cli": {"commands"},
    "commands": {*ORDER, "analysis", "bench"},
    "__init__": None,
}
# The original API's classes stand on the operator alone.
LEGACY = {"config", "mask", "operator"}
# What has no business with whom: mask algebra with graphs, finding and proving with what runs the graph.
APART = {
    "mask": ("torch.fx",),
    "graph": ("tmx_compile.legacy",),
    "find": ("tmx_compile.config", "tmx_compile.legacy"),
    "proof": ("tmx_compile.config", "tmx_compile.legacy"),
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
        if room == "legacy":
            allowed = LEGACY
        for parts, name in imports(path):
            seen += 1
            if allowed is not None and parts[0] not in allowed | {room}:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert seen > 50
    assert wrong == []


def test_targets_do_not_import_one_another():
    targets = {"blocked", "sdpa", "flex", "operator_call", "reference"}
    for target in targets:
        files = [*(ROOT / "lowering" / target).glob("*.py"), ROOT / "lowering" / f"{target}.py"]
        for parts, name in (found for path in files if path.exists() for found in imports(path)):
            assert len(parts) < 2 or parts[0] != "lowering" or parts[1] not in targets - {target}, (
                f"{target} imports {name}"
            )


def test_rooms_that_know_nothing_of_each_other():
    assert all((ROOT / room).is_dir() for room in APART)
    for room, strangers in APART.items():
        for path in (ROOT / room).rglob("*.py"):
            for stranger in strangers:
                assert stranger not in path.read_text(), f"{path} knows {stranger}"


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
