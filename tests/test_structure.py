"""The house: imports point down the list only, tests share through tests/support, and files stay short."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tmx_compile

ROOT = Path(tmx_compile.__file__).parent
# The way the data flows. A room may import itself and rooms above it.
ORDER = [
    "version",
    "errors",
    "report",
    "mask",
    "config",
    "operator",
    "legacy",
    "graph",
    "find",
    "proof",
    "lowering",
    "limit",
    "layers",
    "request",
    "passes",
    "remarks",
    "compilers",
    "backend",
    "export",
]
FREE = {
    "testing": set(ORDER),
    # To advise, a layer has to be timed; what it computes is never taken from bench.
    "analysis": {*ORDER, "bench"} - {"export"},
    "bench": {"version", "config", "legacy", "mask", "lowering", "backend"},
    "integrations": set(ORDER) - {"export"},
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
TESTS = Path(__file__).parent
TEST = re.compile(r"(^|\.)(test_|conftest$|trianglemix_attention_test$)")
PRIVATE = re.compile(r"_[A-Za-z]\w*")
# Every folder with Python of the project's own. None of them may use another file's private names.
FOLDERS = ("tmx_compile", "tests", "tests_vllm", "examples", "benchmarks", "studies", "tools")


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


def all_imports(tree):
    """(the module that a statement imports from, the name in it; or a module, None) of a whole file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import names no folder"
            yield from ((node.module or "", alias) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def sources():
    """(path from the project's root, text) of every file of Python."""
    for folder in FOLDERS:
        files = sorted((TESTS.parent / folder).rglob("*.py"))
        assert files, folder
        yield from ((path.relative_to(TESTS.parent).as_posix(), path.read_text(encoding="utf-8")) for path in files)


def is_ours(module):
    return module.partition(".")[0] in FOLDERS


def private_names(tree):
    """Names with an underscore that a file takes from another file of the project, whichever way.

    ``from a import _b``, ``a._b`` and ``c.a._b`` where ``a`` or ``c.a`` was imported, and ``setattr(a, "_b", ...)``.
    """
    ours, found = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours |= {alias.asname or alias.name for alias in node.names if is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom) and is_ours(node.module):
            ours |= {alias.asname or alias.name for alias in node.names}
            found |= {alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and ast.unparse(node.value) in ours:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and len(node.args) > 1 and ast.unparse(node.func).endswith("setattr"):
            of, name = (ast.unparse(arg).strip("'\"") for arg in node.args[:2])
            found |= {name} if of in ours else set()
    return set(filter(PRIVATE.fullmatch, found))


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
        "for name in ('transformers', 'triton', 'torch_npu', 'gguf', 'expecttest', 'vllm'):\n"
        "    sys.modules[name] = None\n"
        "import tmx_compile, tmx_compile.testing, tmx_compile.integrations.vllm\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_files_stay_one_room():
    assert {path: n for path, text in sources() if (n := len(text.splitlines())) > 400} == {}


def test_what_people_read_stays_short():
    root = TESTS.parent
    assert len((root / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    pages = ("guide", "serving", "design", "quality", "benchmarks", "ascend")
    words = {page: len((root / f"docs/{page}.md").read_text(encoding="utf-8").split()) for page in pages}
    assert sum(words.values()) <= 15_000, words
    lines = {path.name: len(path.read_text().splitlines()) for path in (root / "benchmarks").glob("*.py")}
    assert sum(lines.values()) <= 2_000, lines


def test_tests_import_from_support_alone():
    """No test imports another, and none a conftest: what two of them need stands in tests/support."""
    wrong = []
    for path in TESTS.rglob("*.py"):
        for module, alias in all_imports(ast.parse(path.read_text(encoding="utf-8"))):
            whole = module if alias is None else f"{module}.{alias.name}"
            if (module.startswith("tests") and not whole.startswith("tests.support")) or TEST.search(whole):
                wrong.append(f"{path.relative_to(TESTS)} imports {whole}")
    assert wrong == []


def test_no_file_uses_a_private_name_of_another():
    assert {path: names for path, text in sources() if (names := private_names(ast.parse(text)))} == {}


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("from tmx_compile.operator import kernel\nkernel._BUDGET", {"_BUDGET"}),
        ("from tmx_compile.operator.kernel import _BUDGET", {"_BUDGET"}),
        ("from benchmarks.common import _median", {"_median"}),
        ("import benchmarks.common\nbenchmarks.common._median", {"_median"}),
        ("import studies.quality as quality\nquality._slug", {"_slug"}),
        ("from tmx_compile.operator import kernel\nmonkeypatch.setattr(kernel, '_BUDGET', 3)", {"_BUDGET"}),
        ("import torch\nfrom tmx_compile import backend\ntorch._dynamo, backend.__file__, backend.tmx", set()),
    ],
)
def test_private_names_are_seen(program, found):
    assert private_names(ast.parse(program)) == found


@pytest.mark.parametrize("number", range(3))
def test_what_measures_does_not_know_what_reports(number):
    """The package knows no measurement, benchmarks no study, and none of them the writer of pages."""
    folder, *strangers = ("tmx_compile", "benchmarks", "studies", "tools")[number:]
    files = [*(TESTS.parent / folder).rglob("*.py")]
    assert files
    wrong = [
        f"{path.name} imports {module}"
        for path in files
        for module, _ in all_imports(ast.parse(path.read_text(encoding="utf-8")))
        if module.partition(".")[0] in strangers
    ]
    assert wrong == []
