"""The examples in the docstrings: every public name has one, complete as it stands, and all of them run."""

from __future__ import annotations

import doctest
import enum
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from tools.build_docs import MODULES

# Says nothing that an example could show.
WITHOUT = {"tmx_compile.__version__"}
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.REPORT_ONLY_FIRST_FAILURE


def public() -> dict[str, Any]:
    """Every public object by the name that users import it by."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    return {f"{name}.{each}": getattr(module, each) for name, module in modules.items() for each in module.__all__}


def functions(name: str, what: Any) -> Iterator[tuple[str, Any, str]]:
    """A function, or a class (its docstring is its constructor's) and its public methods: path, callable, docstring."""
    if inspect.isfunction(what):
        yield name, what, inspect.getdoc(what) or ""
    elif inspect.isclass(what) and not issubclass(what, (enum.Enum, Exception)):
        yield name, what, inspect.getdoc(what) or ""
        ours = [vars(base) for base in what.__mro__ if base.__module__.startswith("tmx_compile")]
        for each in sorted(set().union(*ours)):
            method = getattr(what, each)
            if not each.startswith("_") and inspect.isroutine(method):
                yield f"{name}.{each}", method, inspect.getdoc(method) or ""


def examples() -> list[Any]:
    """One parameter for each docstring with an example; what is public in two modules comes once."""
    found: dict[int, Any] = {}
    modules = {name: importlib.import_module(name) for name in MODULES}
    for name, what in {**modules, **public()}.items():
        for test in doctest.DocTestFinder(recurse=name not in modules).find(what, name, globs={}):
            if test.examples:
                found.setdefault(hash(test.docstring), pytest.param(test, id=test.name))
    return list(found.values())


@pytest.mark.parametrize("test", examples())
def test_the_example_runs(test: doctest.DocTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a module of its own, with nothing in it: an example imports all that it uses."""
    module = types.ModuleType("example_of_a_docstring")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    test.globs = vars(module)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append, clear_globs=False)
    assert result.failed == 0, "".join(said)


@pytest.mark.parametrize("name", sorted(public().keys() - WITHOUT))
def test_every_public_name_has_an_example(name: str) -> None:
    docstring = inspect.getdoc(public()[name]) or ""
    assert doctest.DocTestParser().get_examples(docstring), f"{name} has no example"


@pytest.mark.parametrize("name", sorted(public().keys() - WITHOUT))
def test_every_parameter_is_told_about(name: str) -> None:
    """Under ``Args`` or ``Attributes``, or by its name in the text."""
    for path, function, docstring in functions(name, public()[name]):
        assert docstring, f"{path} has no docstring"
        taken = [each for each in inspect.signature(function).parameters if each not in ("self", "cls")]
        untold = [each for each in taken if f"\n    {each}: " not in docstring and f"``{each}``" not in docstring]
        assert not untold, f"{path} does not tell about {untold}"
