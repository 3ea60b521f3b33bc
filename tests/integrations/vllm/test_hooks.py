"""Versions of vLLM, without one: an unknown release, platform or a missing module is refused in words."""

from __future__ import annotations

import inspect

import pytest

from tmx_compile.errors import UnsupportedEngineError
from tmx_compile.integrations.vllm import hooks
from tmx_compile.integrations.vllm.wrap import wrap


@pytest.mark.parametrize(
    ("version", "device", "message"),
    [
        ("0.31.0", "cpu", "supports vLLM 0.26.x and 0.32.x on cpu, this is 0.31.0"),
        ("0.33.0", "cuda", "supports vLLM 0.26.x on cuda, this is 0.33.0"),
        ("0.32.0", "tpu", "this platform is tpu"),
    ],
)
def test_what_is_not_known_is_refused(version, device, message):
    with pytest.raises(UnsupportedEngineError, match=message):
        hooks.check(version, device)


HOOK = hooks.Hook("posixpath", "join", "a p", (("0.26", "older"), ("0.32", "newer")), devices=("cpu",))


def test_what_has_changed_is_named(monkeypatch):
    monkeypatch.setattr(hooks, "HOOKS", (HOOK, hooks.Hook("no.such.module", "f", ""), hooks.Hook("json", "gone", "")))
    with pytest.raises(UnsupportedEngineError) as caught:
        hooks.check("0.32.1", "cpu")
    assert "vLLM 0.32.1 is not as TriangleMix knows it: posixpath.join is without newer; " in str(caught.value)
    assert "no.such.module has no f" in str(caught.value)
    assert "json has no gone" in str(caught.value)


def test_names_by_version_and_device(monkeypatch):
    assert HOOK.names("0.26") == {"a", "p", "older"}
    monkeypatch.setattr(hooks, "HOOKS", (HOOK,))
    # Not used on that device, so not looked at.
    hooks.check("0.26.0", "cuda")
    monkeypatch.setattr(hooks, "HOOKS", (hooks.Hook("posixpath", "join", "a p"),))
    hooks.check("0.26.0+cpu", "cpu")


def test_a_data_class_is_known_by_its_fields():
    assert hooks.Hook("tmx_compile.mask.geometry", "Geometry", "").found() == {"sink", "window", "last", "reach"}


def test_every_hook_has_names_for_every_version():
    for hook in hooks.HOOKS:
        assert hook.names("0.26") >= set(hook.parameters.split())
        assert {version for version, _ in hook.extra} <= {"0.26", "0.32"}


def test_a_function_is_wrapped_once_and_shows_its_own_parameters():
    class Engine:
        def get(self, request):
            return [request]

    def twice(plain):
        def get(self, *args):
            return plain(self, *args) * 2

        return get

    wrap(Engine, "get", twice)
    wrap(Engine, "get", twice)
    assert Engine().get(3) == [3, 3]
    assert list(inspect.signature(Engine.get).parameters) == ["self", "request"]
