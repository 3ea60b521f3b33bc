"""Starting and not starting: bad values in the process of the user, TriangleMix off, versions, several processes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from tests_vllm.support import BLOCK, NEW_TOKENS, SETTINGS, Oracle, prompts
from tmx_compile.errors import UnsupportedEngineError
from tmx_compile.integrations.vllm import hooks, start
from tmx_compile.integrations.vllm.settings import KEY, handed_over

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv(start.WORKERS, raising=False)
    return monkeypatch


def configure(model: str, settings: Any, **arguments: Any) -> Any:
    """vLLM's configuration for an engine, no more."""
    extra = {} if settings is None else {"additional_config": {KEY: settings}}
    plain: dict[str, Any] = dict(max_model_len=512, block_size=BLOCK, enforce_eager=True, skip_tokenizer_init=True)
    return EngineArgs(model, **plain | extra | arguments).create_engine_config()


def test_the_entry_point_is_found() -> None:
    from importlib.metadata import entry_points

    (found,) = [each for each in entry_points(group="vllm.general_plugins") if each.name == "trianglemix"]
    assert found.value == "tmx_compile.integrations.vllm:register"


def test_off_leaves_the_configuration_alone(model: str, environ: pytest.MonkeyPatch) -> None:
    config = configure(model, None)
    assert config.additional_config == {}
    assert start.WORKERS not in os.environ
    config = configure(model, {"enable_trianglemix": False, "num_triangle_layers": 2})
    assert handed_over(config.additional_config) is None


def test_on_the_settings_are_in_the_configuration(model: str, environ: pytest.MonkeyPatch) -> None:
    config = configure(model, SETTINGS)
    settings = handed_over(json.loads(json.dumps(config.additional_config)))
    assert settings.config.layers() == (1, 3)
    assert settings.num_layers == 4
    assert os.environ[start.WORKERS] == "1"
    # An engine without it that this process starts next has none.
    configure(model, None)
    assert start.WORKERS not in os.environ


def test_the_environment_switches_it_on(
    model: str, environ: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environ.setenv("VLLM_TRIANGLEMIX_ENABLED", "1")
    environ.setenv("VLLM_TRIANGLEMIX_LAYERS", "2")
    environ.setattr(logging.getLogger("vllm"), "propagate", True)
    config = configure(model, None, dtype="float32")
    assert handed_over(config.additional_config).config.layers() == (0, 1)
    assert "num_triangle_layers=2 makes the first 2 layers sparse" in caplog.text


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"num_sink_tokens": -1}, {}, "trianglemix.num_sink_tokens in additional_config: .*got -1"),
        ({"triangle_layer_indices": [4]}, {}, "triangle_layer_indices must be less than num_layers=4, got 4"),
        (
            SETTINGS,
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv_transfer_config.kv_connector='ExampleConnector'",
        ),
        (
            SETTINGS,
            {"scheduler_cls": "vllm.v1.core.sched.interface.SchedulerInterface"},
            "scheduler_cls=SchedulerInterface does not derive",
        ),
    ],
)
def test_bad_values_stop_the_process_of_the_user(
    model: str, environ: pytest.MonkeyPatch, settings: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure(model, settings, **arguments)
    assert start.WORKERS not in os.environ


def test_a_bad_variable_stops_it_before_the_model_is_looked_for(environ: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="VLLM_TRIANGLEMIX_LAYERS='all'"):
        start.start({"VLLM_TRIANGLEMIX_ENABLED": "1", "VLLM_TRIANGLEMIX_LAYERS": "all"})


def test_this_vllm_is_as_the_hooks_say() -> None:
    hooks.check(vllm.__version__, current_platform.device_type)


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0"])
def test_an_unknown_version_is_refused(version: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=rf"supports vLLM 0.26.x and 0.32.x on cpu, this is {version}"):
        hooks.check(version, "cpu")


def test_an_unknown_platform_is_refused() -> None:
    with pytest.raises(UnsupportedEngineError, match="runs on cpu and cuda, this platform is xpu"):
        hooks.check(vllm.__version__, "xpu")


@pytest.mark.parametrize("hook", [hook for hook in hooks.HOOKS if "cpu" in hook.devices], ids=lambda hook: hook.name)
def test_a_changed_hook_is_seen(hook: hooks.Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    found = type(hook).found
    monkeypatch.setattr(type(hook), "found", lambda self: found(self) | ({"more"} if self is hook else set()))
    with pytest.raises(UnsupportedEngineError, match=rf"{hook.name} is with more"):
        hooks.check(vllm.__version__, "cpu")


def test_a_hook_that_is_gone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "HOOKS", (hooks.Hook("vllm.v1.core.kv_cache_manager", "Gone.method", "self"),))
    with pytest.raises(UnsupportedEngineError, match=r"vllm.v1.core.kv_cache_manager has no Gone.method"):
        hooks.check(vllm.__version__, "cpu")


PROGRAM = """
import json, sys
from tests_vllm.support import Engine
model, asked, settings, arguments = json.loads(sys.stdin.read())
if __name__ == "__main__":
    engine = Engine(model, settings, **arguments)
    answers, _ = engine.ask(asked)
    print("ANSWERS", json.dumps([answer.tokens for answer in answers]))
"""


def run(model: str, asked: list[list[int]], settings: Any, environment: dict[str, str], **arguments: Any):
    """An engine whose parts are processes of their own."""
    variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)} | environment
    variables.pop(start.WORKERS, None)
    given = json.dumps([model, asked, settings, arguments])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=given, env=variables, capture_output=True, text=True, timeout=600
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("ANSWERS ")), done.stdout + done.stderr


def test_two_workers_in_processes_of_their_own(model: str, oracle: Oracle) -> None:
    """Tensor parallelism: each worker has half of the heads. The settings reach all of them, and so does the log."""
    names = ["long", "middle", "short"]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_LOGGING_LEVEL": "INFO"}
    answers, said = run(
        model, [prompts()[name] for name in names], SETTINGS, environment,
        tensor_parallel_size=2, max_num_batched_tokens=128,
    )  # fmt: skip
    assert answers == [oracle.answer(prompts()[name]).tokens for name in names]
    assert answers[0] != oracle.answer(prompts()["long"], ()).tokens
    assert said.count("triangle layers 1,3 of 4 (dense: 2 NOT_SELECTED), geometry 4/16/24") == 2


def test_off_the_engine_is_vllms_own(model: str, oracle: Oracle) -> None:
    answers, said = run(model, [prompts()["long"]], None, {"VLLM_LOGGING_LEVEL": "INFO"})
    assert answers == [oracle.answer(prompts()["long"], ()).tokens]
    assert "TriangleMix" not in said
    assert len(answers[0]) == NEW_TOKENS
