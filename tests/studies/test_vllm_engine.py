"""What the studies of vLLM make of measurements, and what they switch. No vLLM here: its parts are stand-ins."""

from __future__ import annotations

import sys
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from studies import vllm_engine
from studies.ratios import of_pairs, of_rounds, quantile
from tmx_compile.integrations.vllm.backend import Active
from tmx_compile.integrations.vllm.wrap import wrap


@pytest.mark.parametrize(("count", "low", "high"), [(6, 0, 5), (12, 2, 9), (15, 3, 11), (30, 9, 20)])
def test_the_median_of_pairs_lies_between_these(count: int, low: int, high: int) -> None:
    """By tables of order statistics."""
    ratios = [1 + 0.01 * number for number in torch.randperm(count).tolist()]
    found = of_pairs(ratios)["pairs"]
    assert found["confidence_95"] == pytest.approx([1 + 0.01 * low, 1 + 0.01 * high])
    assert found["median"] == pytest.approx(1 + 0.01 * (count - 1) / 2)


def test_few_pairs_say_nothing() -> None:
    assert of_pairs([1.0] * 5) == {}


def test_the_ratio_of_rounds_lies_where_the_times_were_drawn() -> None:
    """Rounds differ by what goes on beside them, their runs by noise; one kind takes 2% longer than the other."""
    generator = torch.Generator().manual_seed(0)

    def times(beside: float, longer: float) -> list[float]:
        return (beside + longer + 0.2 * torch.rand(4, generator=generator)).tolist()

    rounds = [(times(beside, 10.0), times(beside, 10.2)) for beside in torch.rand(40, generator=generator).tolist()]
    found = of_rounds(rounds)["ratio"]
    low, high = found["confidence_95"]
    assert low < 10.6 / 10.8 < high
    assert low < found["median"] < high
    assert high - low < 0.01
    low, high = found["quartile_confidence_95"]
    assert low < found["quartile"] < high < 1


def test_a_quantile_lies_between_numbers() -> None:
    assert [quantile([1.0, 2.0, 4.0], part) for part in (0, 0.25, 0.5, 0.75, 1)] == [1.0, 1.5, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("control", [False, True])
def test_rounds_change_sides_and_their_first_runs_do_not_count(control: bool) -> None:
    engine: Any = vllm_engine.Engine.__new__(vllm_engine.Engine)
    engine.runner, engine.off, now, said = "V2", False, [], []
    engine.switch = now.append

    def run() -> float:
        said.append(now[-1])
        return 1000.0 if len(said) < 2 or said[-2] is not said[-1] or len(said) % 16 == 13 else 2.0 + now[-1]

    rounds = engine.in_turns(run, 0, 2, control=control)
    kinds = [[False] * 3 + [True] * 5 + [False] * 3, [True] * 3 + [False] * 5 + [True] * 3]
    assert said == ([False] * 22 if control else [*kinds[0], *kinds[1]])
    if not control:
        assert [sorted(map(len, each)) for each in rounds] == [[4, 4]] * 2
        record = engine.compared_in_turns("what", rounds, n=3)
        assert (record["rounds"], record["runs"], record["dense_ms"], record["ms"]) == (2, 8, 2.0, 3.0)
        assert record["ratio"]["median"] == record["speedup"] == 2 / 3


def test_dense_has_nothing_of_the_plugin_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    class Platform:
        def build(self, rows: int) -> str:
            return f"vLLM's {rows}"

        forward = build

    class Common:
        def build(self, rows: int) -> str:
            return f"ours around {super().build(rows)}"  # type: ignore[misc]

        forward = build

        def leave_alone(self, always: bool) -> None:
            self.forward = super().forward if always else MethodType(Common.forward, self)  # type: ignore[misc]

    class Ours(Common, Platform):
        pass

    class Runner:
        def step(self) -> str:
            return "vLLM's step"

    def around(plain: Any) -> Any:
        return lambda self: f"ours around {plain(self)}"

    # As the plugin's module and one of vLLM's.
    Ours.__module__ = "tmx_compile.integrations.vllm.cuda"
    module = ModuleType("vllm.v1.worker.stand_in")
    module.Runner = Runner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    hook = SimpleNamespace(module=module.__name__, name="Runner.step")
    gone = SimpleNamespace(module="vllm.v1.worker.absent", name="Runner.step")
    monkeypatch.setattr("tmx_compile.integrations.vllm.hooks.HOOKS", (hook, gone))
    wrap(Runner, "step", around)
    builder, other = Ours(), Platform()
    layers = {"one": SimpleNamespace(impl=Ours()), "rotary": object()}
    on: Any = Active.__new__(Active)
    on.impls, on.following = (layers["one"].impl,), True  # type: ignore[attr-defined]
    builder.active = on  # type: ignore[attr-defined]
    runner = SimpleNamespace(
        attn_groups=[[SimpleNamespace(metadata_builders=[builder, other])]],
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers)),
    )
    worker = SimpleNamespace(model_runner=runner)
    engine: Any = vllm_engine.Engine.__new__(vllm_engine.Engine)
    engine.llm = SimpleNamespace(collective_rpc=lambda call, args: call(worker, *args))
    for triangle in (False, False, True, True, False, True):
        engine.switch(triangle)
        if triangle:
            # As the runner's hook does before a step with streaming rows.
            on.follow(True)
        said = builder.build(3), layers["one"].impl.forward(4), Runner().step()
        plain = "vLLM's 3", "vLLM's 4", "vLLM's step"
        assert said == (tuple(f"ours around {each}" for each in plain) if triangle else plain)
        assert other.build(5) == "vLLM's 5"
