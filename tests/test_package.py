"""What would be published: the package, whole and alone, with the metadata that it should have."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tools import check_package

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("package")
    check_package.check(work, quick=True)
    return work


def rewritten(built: Path, wheel: Path, drop: str = "", add: str = "", replace: tuple[str, str] = ("", "")) -> None:
    """A copy of the wheel with one thing wrong."""
    (original,) = (built / "dist").glob("*.whl")
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(wheel, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if replace[0] and name.endswith("METADATA"):
                data = data.replace(replace[0].encode(), replace[1].encode())
            if name != drop:
                new.writestr(name, data)
        if add:
            new.writestr(add, "")


def test_the_package_is_whole_and_alone(built: Path) -> None:
    (wheel,) = (built / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "tmx_compile/py.typed" in names
    assert "tmx_compile/commands/explain.py" in names
    assert "tmx_compile/config/prices.json" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"tmx_compile"}
    # Every room, whatever it is called: pyproject.toml names none.
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "tmx_compile").rglob("*.py")}
    assert rooms <= {name.rpartition("/")[0] for name in names}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"drop": "tmx_compile/py.typed"}, "the wheel lacks ['tmx_compile/py.typed']"),
        ({"drop": "tmx_compile/mask/algebra.py"}, "the wheel lacks ['tmx_compile/mask/algebra.py']"),
        ({"add": "tests/test_x.py"}, "should not have ['tests/test_x.py']"),
        ({"replace": ("Name: tmx-compile", "Name: other")}, "the metadata's Name must be 'tmx-compile', got 'other'"),
        ({"replace": ("Version: ", "Version: 9")}, "the metadata's Version must be "),
    ],
)
def test_the_check_sees_what_is_wrong(built: Path, tmp_path: Path, wrong: dict[str, str], message: str) -> None:
    (sdist,) = (built / "dist").glob("*.tar.gz")
    rewritten(built, tmp_path / "wrong.whl", **wrong)
    with pytest.raises(check_package.PackageError) as caught:
        check_package.check_contents(built / "source", sdist, tmp_path / "wrong.whl")
    assert message in str(caught.value)


def test_the_example_of_the_readme_is_found() -> None:
    assert "tmx_backend(cfg)" in check_package.readme_example()
