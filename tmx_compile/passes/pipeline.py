"""The pass: its stages in order, and the one entry under the backend, ``explain``, ``rewrite`` and ``export``.

``TORCH_LOGS="+tmx_compile"`` logs every stage with its time, and the graph after each that changes it;
``TORCH_LOGS="+tmx_compile.passes.lower"`` one stage.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from tmx_compile.errors import LoweringError, VerificationError
from tmx_compile.graph.guards import no_guard_added
from tmx_compile.graph.nodes import fake_mode_of
from tmx_compile.passes.choose import choose
from tmx_compile.passes.judge import judge
from tmx_compile.passes.lengths import Prompt
from tmx_compile.passes.lower import inductor_options, lower
from tmx_compile.passes.open import close, open_graph
from tmx_compile.passes.plan import Plan
from tmx_compile.passes.program import refresh, retrace
from tmx_compile.passes.prove import prove
from tmx_compile.passes.search import search
from tmx_compile.passes.settle import settle
from tmx_compile.passes.substitute import substitute
from tmx_compile.request import Host, Request

_T = TypeVar("_T")


@dataclass(frozen=True)
class Stage:
    """One step of the pass; ``writes`` tells that it changes the graph, which is then linted and logged."""

    name: str
    run: Callable[[Plan], Plan]
    writes: bool = False

    def __call__(self, plan: Plan) -> Plan:
        """Run it, timed and logged."""
        start = time.perf_counter()
        plan = self.run(plan)
        if self.writes:
            plan.gm.graph.lint()
        spent = time.perf_counter() - start
        log = logging.getLogger(self.run.__module__)
        if log.isEnabledFor(logging.DEBUG):
            text = plan.gm.print_readable(print_output=False) if self.writes else "\n".join(map(_line, plan.sites))
            log.debug("%s: %.1f ms\n%s", self.name, 1e3 * spent, text)
        return replace(plan, seconds={**plan.seconds, self.name: plan.seconds.get(self.name, 0.0) + spent})


DECIDE = (
    Stage("open", open_graph),
    Stage("find", search),
    Stage("prove", prove),
    Stage("judge", judge),
    Stage("settle", settle),
)
CHOOSE = (Stage("choose", choose),)
REWRITE = (
    *CHOOSE,
    Stage("substitute", substitute, writes=True),
    Stage("lower", lower, writes=True),
    Stage("close", close, writes=True),
)
# A graph that is handed back keeps its operators, and is judged by what its tracing asks of the lengths.
REWRITE_PROGRAM = (Stage("refresh", refresh), *REWRITE, Stage("retrace", retrace, writes=True))


@dataclass(frozen=True)
class Outcome:
    """What became of a graph.

    Attributes:
        graph: the rewritten graph, or the given one where nothing is to be rewritten.
        plan: every decision, and the inputs whose values they rest on (``plan.known``).
        needs: settings that Inductor needs for it.
    """

    graph: GraphModule
    plan: Plan
    needs: Mapping[str, Any] = field(default_factory=dict)


def decide(
    gm: GraphModule,
    request: Request,
    host: Host,
    example_inputs: Sequence[Any] = (),
    *,
    constants: Mapping[str, torch.Tensor] | None = None,
    row_of_prompt: bool = False,
) -> Plan:
    """Decide every attention call of a graph, which stays as it is; may guard on a length where the host allows it.

    Args:
        gm: the graph.
        request: what the user asked; its configuration must be there.
        host: who will run the graph.
        example_inputs: they tell the values of the model's buffers, where they are real tensors.
        constants: inputs of the graph, by name, that always have these values.
        row_of_prompt: whether a graph of one row is a chunk of a prompt, not a decode step.
    """
    plan = Plan(gm, request, host, example_inputs, constants or {}, row_of_prompt)
    return _run(DECIDE, plan)


def rewrite(plan: Plan, source: GraphModule) -> Outcome:
    """The graph that a plan decides, or ``source`` where no prompt is long enough for it."""
    if plan.prompt is Prompt.SHORT:
        return Outcome(source, plan)
    plan = _run(REWRITE if plan.host.compiler else REWRITE_PROGRAM, plan)
    return Outcome(plan.gm, plan, inductor_options(plan))


def compile(
    gm: GraphModule,
    request: Request,
    host: Host,
    example_inputs: Sequence[Any] = (),
    *,
    constants: Mapping[str, torch.Tensor] | None = None,
) -> Outcome:
    """Decide and rewrite a graph; arguments as for :func:`decide`.

    Raises:
        LoweringError: the lowering that the user named cannot take a call.
        StrictModeError: in strict mode, a site of a triangle layer that has to stay dense.
        VerificationError: what was written is not what it should be.
    """

    def attempt(asked: Request) -> tuple[Outcome, str]:
        plan = decide(gm, asked, host, example_inputs, constants=constants)
        if host.compiler:
            return rewrite(plan, gm), ""
        with no_guard_added(fake_mode_of(plan.gm)) as asked_of_lengths:
            outcome = rewrite(plan, gm)
        return outcome, asked_of_lengths.guard

    outcome, failed = retried(attempt, request, host, "cannot be shown for every length")
    if failed:
        raise VerificationError(f"the rewritten graph needs {failed}, which cannot be shown for every length")
    return outcome


def explain(gm: GraphModule, request: Request, host: Host, example_inputs: Sequence[Any] = ()) -> Plan:
    """The plan that :func:`compile` would carry out, lowerings included; the graph stays as it is."""
    plan = decide(gm, request, host, example_inputs)
    return plan if plan.prompt is Prompt.SHORT else _run(CHOOSE, plan)


def retried(attempt: Callable[[Request], tuple[_T, str]], request: Request, host: Host, why: str) -> tuple[_T, str]:
    """The one retry: where what "auto" chose needs a guard that must not be, the operator, which guards on nothing.

    Args:
        attempt: gives a result, and the guard that it needs ("" for none).
        request: for the first attempt.
        host: whose lowering "auto" was; torchair has one only.
        why: what keeps the guard from being.

    Raises:
        LoweringError: there is no other lowering to try.
    """
    result, failed = attempt(request)
    if not failed or request.lowering == "operator":
        return result, failed
    if request.lowering != "auto" or host.compiler == "torchair":
        name = "ascend" if host.compiler == "torchair" else request.lowering
        raise LoweringError(f"lowering {name!r} needs {failed}, which {why}")
    return attempt(replace(request, lowering="operator"))


def _run(stages: Iterable[Stage], plan: Plan) -> Plan:
    for stage in stages:
        plan = stage(plan)
    return plan


def _line(item: Any) -> str:
    return f"  {item.layer.path or item.node.name}: {item.role.name} {item.why or 'triangle'}"
