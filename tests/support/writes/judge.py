"""One case: a drawn program run eagerly and compiled, call after call, with everything that it may write compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.support.writes.generator import Program, draw
from tests.support.writes.watch import WATCH
from tmx_compile import Report, TriangleMixConfig, rewrite, tmx_backend

TOLERANCE = 1e-3
FAILURES = ("wrong", "state", "crash")


@dataclass
class Outcome:
    """What became of a case. ``kind``:

    "equal"; "wrong": other numbers than eager; "state": the inputs or buffers it leaves behind are others; "crash":
    it raises where the reference runs; "told": a buffer that the user changed is refused when the model runs, as
    documented; "reference": the reference backend fails as well, so that nothing is said about ours.
    """

    seed: str
    kind: str
    program: Program
    way: str
    message: str = ""
    decisions: list[tuple[str, str]] = field(default_factory=list)
    redrawn: int = 0


@dataclass
class Called:
    """The results of a program's calls and the state after each."""

    results: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    undefined: list[Tensor | None] = field(default_factory=list)


class Unfit(Exception):
    """A draw that eager rejects, or in which no result is defined."""


class Differs(Exception):
    """Not what eager does. ``kind`` as in :class:`Outcome`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _called(
    program: Program, model: Any, run: Callable[..., Any], check: Called | None = None, noise: float = 0.0
) -> Called:
    """Run every call. With ``check`` each is compared with what eager did; ``noise`` is put on the inputs."""
    done = Called()
    given = program.state()
    for number in range(len(program.lengths)):
        if number and program.outside:
            exec(program.outside, {"model": model, "torch": torch})
        x = program.inputs(number)
        x *= 1 + noise * torch.randn_like(x)
        WATCH.start()
        result = run(x, *given.values()).detach().clone()
        state = {"x": x, **given, **dict(model.named_buffers())}
        done.results.append(result)
        done.states.append({name: value.detach().clone() for name, value in state.items()})
        done.undefined.append(WATCH.undefined)
        if WATCH.lost:
            raise Unfit("a row without keys and a cache")
        if check is not None:
            _compare(done, check, number)
    return done


def _compare(done: Called, wanted: Called, call: int) -> None:
    undefined = wanted.undefined[call]
    got, want = done.results[call], wanted.results[call]
    if got.shape != want.shape:
        raise Differs("wrong", f"call {call}: shape {tuple(got.shape)}, eager {tuple(want.shape)}")
    off = (got - want).abs()
    if undefined is not None:
        off = off.masked_fill(undefined[:, :, None], 0.0)
    if not bool((off <= TOLERANCE).all()):
        raise Differs("wrong", f"call {call}: off by {float(off.max()):.3g}")
    for name, value in wanted.states[call].items():
        mine = done.states[call].get(name)
        if mine is None or mine.shape != value.shape or mine.dtype != value.dtype:
            raise Differs("state", f"call {call}: {name} is another tensor")
        if not torch.allclose(mine.double(), value.double(), atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True):
            raise Differs("state", f"call {call}: {name} afterwards")


def _eager(program: Program) -> Called:
    model = program.model()
    try:
        done = _called(program, model, model)
        again = program.model()
        moved = _called(program, again, again, noise=1e-6)
    except Unfit:
        raise
    except Exception as error:
        raise Unfit(str(error)) from error
    for result, undefined, other in zip(done.results, done.undefined, moved.results, strict=True):
        bad = ~result.isfinite()
        if undefined is not None:
            if undefined.shape != result.shape[:2]:
                raise Unfit("rows change places")
            bad = bad & ~undefined[:, :, None]
            if bool(undefined.all()) or (bool(undefined.any()) and _moves_rows(program.source)):
                raise Unfit("rows without keys move")
        if bool(bad.any()) or float(result.nan_to_num(0.0, 0.0, 0.0).abs().max()) > 1e3:
            raise Unfit("not finite, or too large to compare")
        off = (result - other).abs().masked_fill(bad | ~(result - other).isfinite(), 0.0)
        if float(off.max()) > TOLERANCE / 10:
            raise Unfit("rounding alone makes other numbers")
    return done


def _moves_rows(source: str) -> bool:
    return any(word in source for word in ("roll(", "t_()", "transpose_(", "swapdims_(", "cumsum_"))


@contextmanager
def uncompiled() -> Iterator[None]:
    """What the backend hands to Inductor runs as it is."""
    with mock.patch("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, *args, **kwargs: gm.forward):
        yield


def _config(program: Program) -> TriangleMixConfig:
    sinks, window, last = program.geometry or (4, 4096, 64)
    return TriangleMixConfig(
        num_sink_tokens=sinks,
        sliding_window_size=window,
        num_last_tokens=last,
        triangle_layer_indices=list(program.layered),
        min_seq_len=program.min_seq_len,
    )


def _compiled(program: Program, backend: Any, wanted: Called | None) -> Called:
    torch._dynamo.reset()
    model = program.model()
    compiled = torch.compile(model, backend=backend, dynamic=program.dynamic)
    return _called(program, model, compiled, wanted)


def _exported(program: Program, wanted: Called | None, report: Report | None) -> Called:
    """The exported program by itself, and with a report its rewriting."""
    torch._dynamo.reset()
    model = program.model()
    inputs = (program.inputs(0), *program.state().values())
    exported: Any = torch.export.export(model, inputs, strict=False)
    if report is not None:
        exported, told = rewrite(exported, _config(program), lowering=program.lowering)
        report.sites.extend(told.sites)
    module = exported.module()
    return _called(program, module, module, wanted)


def judge(seed: str, *, inductor: bool = False, export: bool = False) -> Outcome:
    """Draw the case of a seed and run it. Draws that eager rejects are drawn again."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        WATCH.limits = {}
        for attempt in range(200):
            program = draw(f"{seed}.{attempt}", inductor=inductor)
            if program is None:
                continue
            try:
                wanted = _eager(program)
            except Unfit:
                continue
            return _judged(seed, program, wanted, attempt, inductor, export)
    raise AssertionError(f"seed {seed}: no draw that eager runs")


def _judged(seed: str, program: Program, wanted: Called, redrawn: int, inductor: bool, export: bool) -> Outcome:
    way = "inductor" if inductor else "eager"
    if export and not program.outside and len(set(program.lengths)) == 1:
        way = "export"
    report = Report()
    sparse = program.geometry is not None
    failure: Differs | None = None
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            if way == "export":
                got = _exported(program, None if sparse else wanted, report)
            else:
                chosen = "auto" if inductor else program.lowering
                backend = tmx_backend(_config(program), lowering=chosen, report=report)
                with nullcontext() if inductor else uncompiled():
                    got = _compiled(program, backend, None if sparse else wanted)
        if sparse:
            dense, wanted = wanted, _oracle(program, wanted, report)
            # A graph whose constants have changed says so, and is dense from then on.
            changed = any("has changed since the model was compiled" in str(w.message) for w in heard)
            for call in range(len(wanted.results)):
                try:
                    _compare(got, wanted, call)
                except Differs:
                    if not changed or not call:
                        raise
                    _compare(got, dense, call)
    except Differs as error:
        failure = error
    except Unfit as error:
        failure = Differs("reference", str(error))
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        told = type(inner).__name__ == "TriangleMixError" and bool(program.outside)
        first = (str(inner).strip().splitlines() or [""])[0]
        failure = Differs("told" if told else "crash", f"{type(inner).__name__}: {first[:200]}")
    outcome = Outcome(seed, "equal", program, way, redrawn=redrawn)
    outcome.decisions = [(site.decision, site.reason) for site in report]
    if failure is not None:
        outcome.kind, outcome.message = failure.kind, str(failure)
        if failure.kind in FAILURES:
            again = _reference(program, way)
            if again:
                outcome.kind, outcome.message = "reference", f"{failure} | reference: {again}"
    return outcome


def _oracle(program: Program, dense: Called, report: Report) -> Called:
    """Eager with the triangle written out in the layers that went sparse."""
    decided = {(site.layer, site.decision) for site in report if site.layer is not None}
    sparse = {layer for layer, decision in decided if decision == "triangle"}
    if any((layer, "dense") in decided for layer in sparse):
        raise Unfit("a layer is both sparse and dense, by the graph")
    if not sparse:
        return dense
    assert program.geometry is not None
    WATCH.limits = dict.fromkeys(sparse, program.geometry)
    try:
        return _eager(program)
    finally:
        WATCH.limits = {}


def _reference(program: Program, way: str) -> str:
    """How the reference fails on the program: empty where it does not."""
    try:
        wanted = _eager(program)
        if way == "export":
            _exported(program, wanted, None)
        else:
            _compiled(program, "inductor" if way == "inductor" else "eager", wanted)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""
