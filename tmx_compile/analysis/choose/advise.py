"""``advise``: the fastest of the evaluated choices whose cost is within a budget."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tmx_compile.analysis.choose.calibration import readable
from tmx_compile.analysis.choose.clock import Clock, found_in, measured
from tmx_compile.analysis.judge.evaluation import METRICS, Evaluation, Record, config_of
from tmx_compile.analysis.judge.intervals import Interval
from tmx_compile.bench.dynamic_times import DynamicTimes
from tmx_compile.bench.layer_times import LayerTime
from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.config.dynamic import DYNAMIC

BOUNDS = ("upper", "mean")


@dataclass(frozen=True)
class Candidate:
    """One evaluated choice, judged.

    Attributes:
        name: of the choice.
        record: what it costs.
        cost: by the metric that was asked for.
        fits: whether that is within the budget.
        saved_ms: the attention time that its sparse layers save in one prompt, milliseconds; None: it does not fit, and
            nothing was timed for it.

    >>> from tmx_compile.analysis import Candidate, Choice, Interval, Record
    >>> from tmx_compile.mask import Geometry
    >>> cost = Interval(0.01, 0.005, 0.02)
    >>> record = Record(Choice(Geometry(8, 512, 128), (30, 31)), cost, cost, cost, cost, cost)
    >>> Candidate("deepest/8-512-128/2", record, cost, fits=True, saved_ms=12.5).saved_ms
    12.5
    """

    name: str
    record: Record
    cost: Interval
    fits: bool
    saved_ms: float | None = None


@dataclass(frozen=True)
class Advice:
    """The fastest choice within a budget, or that there is none.

    Attributes:
        evaluation: the measurements it rests on.
        metric: of the cost.
        budget: the most that may cost.
        bound: "upper": the upper end of the cost's 95% interval has to be within the budget; "mean": its mean.
        tokens: the prompt length that times are of.
        min_seq_len: of the configuration.
        candidates: all choices of the kind of decoding that was asked for; those that fit come first and by time saved,
            the others by cost.
        times: of the layers, by which the choices that fit were compared.
        dtype: of those times.
        notes: what the estimate leaves out.

    From what :func:`evaluate` would give, written out:

    >>> from tmx_compile.analysis import Choice, Evaluation, Interval, Record, advise
    >>> from tmx_compile.bench.layer_times import AttentionShape, LayerTime
    >>> from tmx_compile.config.fingerprint import ModelFingerprint
    >>> from tmx_compile.mask import Geometry
    >>> cost, shape = Interval(0.01, 0.005, 0.02), AttentionShape(32, 8, 128, 128)
    >>> record = Record(Choice(Geometry(8, 512, 128), (30, 31)), cost, cost, cost, cost, cost)
    >>> found = Evaluation(
    ...     32, ModelFingerprint("", ""), {30: (shape,), 31: (shape,)}, "bfloat16", "cuda", (32768, 32768), 8, 64, 128,
    ...     {}, {"deepest/8-512-128/2": record}, {}
    ... )
    >>> times = [LayerTime(shape, Geometry(8, 512, 128), 32768, "bfloat16", 10.0, 2.5, "triton", "a GPU")]
    >>> advice = advise(found, budget=0.03, tokens=32768, times=times)
    >>> advice.best.name, advice.best.saved_ms, advice.dense_ms, advice.config.layers()
    ('deepest/8-512-128/2', 15.0, 20.0, (30, 31))
    >>> advice.verdict.split(";")[0]
    'deepest/8-512-128/2: ppl_final 0.01 [0.005, 0.02], within 0.03 by the upper end of the 95% interval'
    >>> print(advice.code())  # doctest: +ELLIPSIS
    import torch
    <BLANKLINE>
    from tmx_compile import TriangleMixConfig, tmx_backend
    <BLANKLINE>
    cfg = TriangleMixConfig(
        triangle_layer_indices=(30, 31),
    ...
    """

    evaluation: Evaluation
    metric: str
    budget: float
    bound: str
    tokens: int
    min_seq_len: int
    candidates: tuple[Candidate, ...]
    times: tuple[LayerTime, ...]
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate | None:
        """The fastest choice that fits; None where none does, or none of those is faster than dense attention."""
        first = self.candidates[0]
        return first if first.fits and (first.saved_ms or 0.0) > 0 else None

    @property
    def nearest(self) -> Candidate:
        """The choice that costs least, whether it fits or not."""
        return min(self.candidates, key=lambda x: (_bound(x.cost, self.bound), x.name))

    @property
    def config(self) -> TriangleMixConfig | None:
        """The configuration of :attr:`best`."""
        best = self.best
        if best is None:
            return None
        return config_of(best.record.choice, self.evaluation.num_layers).replace(min_seq_len=self.min_seq_len)

    @property
    def dense_ms(self) -> float | None:
        """Dense attention in all layers that can go sparse, milliseconds; None where the times do not cover them."""
        known = {time.shape: time.dense_ms for time in self.times}
        calls = [call for layer in self.evaluation.shapes.values() for call in layer]
        return sum(known[call] for call in calls) if all(call in known for call in calls) else None

    @property
    def verdict(self) -> str:
        """The answer in one or two sentences."""
        best = self.best
        rule = "the upper end of the 95% interval" if self.bound == "upper" else "the mean"
        if best is not None:
            saved = f"saves about {best.saved_ms:.3g} ms"
            if self.dense_ms is not None:
                saved += f" of {self.dense_ms:.3g} ms"
            return (
                f"{best.name}: {self.metric} {_shown(best.cost)}, within {self.budget:g} by {rule}; it {saved} of "
                f"attention in a prompt of {self.tokens:,} tokens"
            )
        near = self.nearest
        if not near.fits:
            return (
                f"nothing fits: no choice has {self.metric} within {self.budget:g} by {rule}. The nearest is "
                f"{near.name} with {_shown(near.cost)}"
            )
        return (
            f"nothing is faster: of {sum(x.fits for x in self.candidates)} choices within {self.budget:g} none saves "
            f"attention time in a prompt of {self.tokens:,} tokens"
        )

    def code(self) -> str:
        """The choice as Python text to paste. ``ValueError``, with the verdict, where there is none."""
        best, config = self._chosen()
        names = DYNAMIC if config.dynamic_layers() else ()
        dynamic = "".join(f"    {name}={getattr(config, name)!r},\n" for name in names)
        backend = 'tmx_backend(cfg, decode="streaming")' if best.record.choice.streaming else "tmx_backend(cfg)"
        return (
            "import torch\n\n"
            "from tmx_compile import TriangleMixConfig, tmx_backend\n\n"
            "cfg = TriangleMixConfig(\n"
            f"    triangle_layer_indices={config.layers()},\n"
            f"    num_sink_tokens={config.num_sink_tokens},\n"
            f"    sliding_window_size={config.sliding_window_size},\n"
            f"    num_last_tokens={config.num_last_tokens},\n"
            f"    min_seq_len={config.min_seq_len},\n"
            f"{dynamic})\n"
            f"model = torch.compile(model, backend={backend})\n"
            f"# where generate is called: model.compile(backend={backend})\n"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the choice as a profile for :meth:`tmx_compile.TriangleMixConfig.from_profile`.

        The profile has the model's fingerprint. Under ``advice`` it says what was asked, the cost, the saving and the
        times it follows from.

        Args:
            path: the file; one that exists is written over.

        Raises:
            ValueError: there is no choice; the message is the verdict.
            OSError: the file cannot be written.
        """
        best, config = self._chosen()
        found = self.evaluation
        config.to_profile(path, num_layers=found.num_layers)
        profile = json.loads(Path(path).read_text(encoding="utf-8"))
        profile["model"]["fingerprint"] = found.fingerprint.to_dict()
        profile["advice"] = {
            "choice": best.name,
            "decode": "streaming" if best.record.choice.streaming else "dense",
            "metric": self.metric,
            "budget": self.budget,
            "bound": self.bound,
            "densities": [found.as_list() for found in best.record.densities],
            "costs": {name: best.record.cost(name).as_list() for name in METRICS},
            "evaluated": {
                "tokens": list(found.tokens),
                "prompts": found.prompts,
                "final": found.final,
                "following": found.following,
                "dtype": found.dtype,
                **found.about,
            },
            "tokens": self.tokens,
            "saved_ms": best.saved_ms,
            "dense_ms": self.dense_ms,
            "times": [time.to_dict() for time in self.times if time.geometry == best.record.choice.geometry],
            "notes": list(self.notes),
        }
        Path(path).write_text(readable(profile), encoding="utf-8")

    def _chosen(self) -> tuple[Candidate, TriangleMixConfig]:
        best, config = self.best, self.config
        if best is None or config is None:
            raise ValueError(self.verdict)
        return best, config


def advise(
    evaluation: Evaluation,
    *,
    budget: float,
    tokens: int,
    metric: str = "ppl_final",
    bound: str = "upper",
    streaming: bool = False,
    times: Sequence[LayerTime] | None = None,
    dynamic: DynamicTimes | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seconds: float = 5.0,
    min_seq_len: int = TriangleMixConfig.min_seq_len,
    note: Callable[[str], object] = str,
) -> Advice:
    """Among the evaluated choices whose cost is within a budget, the one that saves most attention time.

    What a choice saves is the sum over its sparse layers of the time of dense attention less that of triangle attention
    in one layer of that shape, at ``tokens``; the times are measured here (as ``tmx bench`` does) or given, and never
    taken from another length. A dynamic layer takes a part of the dense time by its density, as measured on one GPU
    (``tmx_compile.bench.dynamic_times``); with ``bound`` "upper" the upper end of its density counts. Outside of what
    was measured, on a CPU too, it counts as saving nothing. Of choices that save the same, the one that costs less.

    Args:
        evaluation: what each choice costs.
        budget: the most it may cost: nats for "kl_...", perplexity over dense perplexity less 1 for "ppl_...".
        tokens: the prompt length to be fast at, over ``min_seq_len``.
        metric: which cost: "kl_final", "kl_following", "ppl_final" or "ppl_following", as in :class:`Record`.
        bound: "upper": the upper end of the cost's 95% interval has to be within the budget, so that noise does not
            pass for quality; "mean": its mean.
        streaming: choose among the choices that were evaluated with streaming decode; otherwise among the others. The
            prompt's final tokens say nothing about streaming, so the metric has to be of the following ones.
        times: measured ones, of any machine (``tmx_compile.bench.layer_times.read_times``); None: measure those of the
            choices that fit.
        dynamic: what dynamic layers take of the dense time, by density; None: what this project measured.
        device: where to measure, "cpu" or "cuda"; None: where the evaluation ran.
        dtype: of the times; None: that of the evaluation.
        seconds: to spend on the timed rounds of each geometry.
        min_seq_len: of the configuration: prompts of this length or shorter stay dense.
        note: told where the measurement stands.

    Raises:
        ValueError: a bad argument; no choices of the kind that is asked for; times that are not among ``times``, or
            that cannot be measured here.
        RuntimeError: a layer could not be timed.

    From what :func:`evaluate` would give, written out; the budget is a loss of 3%, then of 1%:

    >>> from tmx_compile.analysis import Choice, Evaluation, Interval, Record, advise
    >>> from tmx_compile.bench.layer_times import AttentionShape, LayerTime
    >>> from tmx_compile.config.fingerprint import ModelFingerprint
    >>> from tmx_compile.mask import Geometry
    >>> cost, shape = Interval(0.01, 0.005, 0.02), AttentionShape(32, 8, 128, 128)
    >>> record = Record(Choice(Geometry(8, 512, 128), (30, 31)), cost, cost, cost, cost, cost)
    >>> found = Evaluation(
    ...     32, ModelFingerprint("", ""), {30: (shape,), 31: (shape,)}, "bfloat16", "cuda", (32768, 32768), 8, 64, 128,
    ...     {}, {"deepest/8-512-128/2": record}, {}
    ... )
    >>> times = [LayerTime(shape, Geometry(8, 512, 128), 32768, "bfloat16", 10.0, 2.5, "triton", "a GPU")]
    >>> advise(found, budget=0.03, tokens=32768, times=times).config.layers()
    (30, 31)
    >>> advise(found, budget=0.01, tokens=32768, times=times).verdict.split(".")[0]
    'nothing fits: no choice has ppl_final within 0'
    """
    tokens, min_seq_len = as_count("tokens", tokens, minimum=1), as_count("min_seq_len", min_seq_len)
    _check(evaluation, budget, metric, bound, streaming)
    if tokens <= min_seq_len:
        raise ValueError(f"tokens must be over min_seq_len={min_seq_len}, up to which prompts stay dense, got {tokens}")
    if times is not None and device is not None:
        raise ValueError(f"device must not be given with times, which have their own, got {device!r}")
    dtype = dtype or evaluation.dtype
    judged = []
    for name, record in evaluation.records.items():
        if record.choice.streaming == streaming:
            cost = record.cost(metric)
            judged.append(Candidate(name, record, cost, _bound(cost, bound) <= budget))
    shapes = sorted({call for layer in evaluation.shapes.values() for call in layer if call.can_be_timed}, key=str)
    geometries = list(dict.fromkeys(x.record.choice.geometry for x in judged if x.fits))
    if times is None:
        times = measured(shapes, geometries, tokens, dtype, device or evaluation.device, seconds, note)
    known = found_in(times, shapes, geometries, tokens, dtype)
    clock = Clock(evaluation, known, dynamic or DynamicTimes.measured(), tokens, bound == "upper")
    candidates = []
    for x in judged:
        saved = clock.saved(x.record) if x.fits else None
        candidates.append(Candidate(x.name, x.record, x.cost, x.fits, saved))
    candidates.sort(key=lambda x: (not x.fits, -(x.saved_ms or 0.0), _bound(x.cost, bound), x.name))
    fitting = [x.record.choice.dynamic for x in candidates if x.fits and x.record.choice.dynamic.layers]
    notes = (*_notes(evaluation, tokens), *clock.notes(fitting))
    used = tuple(known.values())
    return Advice(evaluation, metric, budget, bound, tokens, min_seq_len, tuple(candidates), used, dtype, notes)


def _check(evaluation: Evaluation, budget: float, metric: str, bound: str, streaming: bool) -> None:
    if not isinstance(evaluation, Evaluation):
        raise ValueError(f"evaluation must be an Evaluation, got {type(evaluation).__name__}")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget < math.inf:
        raise ValueError(f"budget must be a finite number of at least 0, got {budget!r}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
    if not isinstance(streaming, bool):
        raise ValueError(f"streaming must be a bool, got {streaming!r}")
    if streaming and not metric.endswith("following"):
        raise ValueError(f"metric must be kl_following or ppl_following for streaming decode, got {metric!r}")
    if not any(record.choice.streaming == streaming for record in evaluation.records.values()):
        raise ValueError(f"streaming must be what some choice was evaluated with, and none has streaming={streaming}")


def _bound(cost: Interval, bound: str) -> float:
    return cost.upper if bound == "upper" else cost.mean


def _shown(cost: Interval) -> str:
    return f"{cost.mean:.4g} [{cost.lower:.4g}, {cost.upper:.4g}]"


def _notes(evaluation: Evaluation, tokens: int) -> tuple[str, ...]:
    notes = []
    shortest, longest = evaluation.tokens
    if tokens > longest:
        notes.append(
            f"the cost was measured with prompts of {shortest:,} to {longest:,} tokens; it is not known at {tokens:,}"
        )
    untimed = sorted(i for i, calls in evaluation.shapes.items() if not all(call.can_be_timed for call in calls))
    if untimed:
        notes.append(
            f"layers {untimed} have a window of their own, or values of another head dim than keys: they cannot be "
            "timed, and count as saving nothing"
        )
    return tuple(notes)
