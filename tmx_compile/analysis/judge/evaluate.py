"""``evaluate``: what choices of sparse layers cost a live model in quality, against dense attention."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmx_compile.analysis.capture.capture import CapturedModel, Inputs
from tmx_compile.analysis.journal import Journal
from tmx_compile.analysis.judge.choice import Choice
from tmx_compile.analysis.judge.compare import Change, compare
from tmx_compile.analysis.judge.evaluation import Evaluation, Record, config_of
from tmx_compile.analysis.judge.intervals import interval
from tmx_compile.analysis.judge.language_model import call_arguments
from tmx_compile.analysis.progress import dtype_of, progress_bar
from tmx_compile.bench.layer_times import AttentionShape
from tmx_compile.bench.record import hardware, versions
from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.config.fingerprint import ModelFingerprint
from tmx_compile.mask.geometry import Geometry


def candidates(
    rankings: Mapping[str, Sequence[int]],
    *,
    num_layers: int,
    geometries: Sequence[Geometry],
    counts: Sequence[int],
    streaming: bool = False,
) -> dict[str, Choice]:
    """Choices worth evaluating: the first layers of each ranking, and the deepest, at each geometry and count.

    A choice that another one equals already is left out: the layers that a ranking puts first may be the deepest.

    Args:
        rankings: layers from the one needed least, by name: ``Calibration.ranking``, :func:`read_ranking`. A ranking
            that was made for one geometry is tried at all.
        num_layers: layers of the model.
        geometries: sinks, window and last rows.
        counts: how many layers.
        streaming: evaluate each choice with streaming decode too.

    Returns:
        By name, such as "deepest/8-64-128/9" and "deepest/8-64-128/9/streaming".

    Raises:
        ValueError: no geometry or count; a count over ``num_layers`` or the length of a ranking; layers or geometries
            that no configuration takes.

    >>> from tmx_compile.analysis import candidates
    >>> from tmx_compile.mask import Geometry
    >>> sorted(candidates({"gradient": [2, 3, 1]}, num_layers=4, geometries=[Geometry(8, 64, 128)], counts=[1, 2]))
    ['deepest/8-64-128/1', 'deepest/8-64-128/2', 'gradient/8-64-128/1']
    """
    num_layers = as_count("num_layers", num_layers, minimum=1)
    for name, given in (("geometries", geometries), ("counts", counts)):
        if not given:
            raise ValueError(f"{name} must not be empty")
    if "deepest" in rankings:
        raise ValueError("rankings must not be called 'deepest', which is tried anyway")
    found: dict[Choice, str] = {}
    for label, ranking in {"deepest": range(num_layers - 1, -1, -1), **rankings}.items():
        for geometry in geometries:
            for count in counts:
                if as_count("counts", count, minimum=1) > len(ranking):
                    of = "the model has" if label == "deepest" else f"{label} ranks"
                    raise ValueError(f"counts must be at most the {len(ranking)} layers that {of}, got {count}")
                config = config_of(Choice(geometry, tuple(ranking[:count])), num_layers)
                name = f"{label}/{geometry.slug}/{count}"
                found.setdefault(Choice.of(config), name)
                if streaming:
                    found.setdefault(Choice.of(config, streaming=True), f"{name}/streaming")
    return {name: choice for choice, name in found.items()}


def read_ranking(path: str | os.PathLike[str], *, num_layers: int, model: nn.Module | None = None) -> tuple[int, ...]:
    """The layers of a calibration's profile, from the one needed least.

    Args:
        path: the file that ``Calibration.to_profile`` wrote.
        num_layers: layers of the model.
        model: the model; None: whether the profile is for it cannot be told.

    Raises:
        ValueError: what :meth:`tmx_compile.TriangleMixConfig.from_profile` refuses: with ``model`` a profile for
            another model, a file without a ranking, layers that a model of ``num_layers`` layers lacks.
        OSError: the file cannot be read.

    >>> import tempfile
    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig, calibrate
    >>> from tmx_compile.analysis import read_ranking
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         x = x[:, None]
    ...         return (x + F.scaled_dot_product_attention(x, x, x, is_causal=True))[:, 0]
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 16), Layer(), Layer(), torch.nn.Linear(16, 50))
    >>> batches = [torch.randint(0, 50, (1, 60)) for _ in range(2)]
    >>> with tempfile.NamedTemporaryFile(suffix=".json") as file:
    ...     calibrate(model, batches, config=TriangleMixConfig(2, 6, 5), progress=False).to_profile(file.name, n=1)
    ...     read_ranking(file.name, num_layers=3, model=model)
    (2, 1)
    """
    TriangleMixConfig.from_profile(path, num_layers=num_layers, model=model, num_triangle_layers=0)
    ranking = tuple(json.loads(Path(path).read_bytes())["ranking"])
    TriangleMixConfig.from_profile(path, num_layers=num_layers, num_triangle_layers=len(ranking))
    return ranking


def evaluate(
    model: nn.Module,
    prompts: Sequence[Tensor],
    choices: Mapping[str, Choice],
    *,
    final: int = 64,
    following: int = 128,
    assume_causal: bool = False,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure what each choice of sparse layers changes in a language model's predictions, paired with dense attention.

    The model is captured as :func:`tmx_compile.calibrate` captures it: nothing is compiled for a choice, and
    only what comes after its first sparse layer runs again. The tokens that follow a prompt are given (teacher
    forcing), so they stand for decode steps: dense ones, or streaming ones where the choice says so. ``min_seq_len``
    does not apply.

    Args:
        model: a language model that takes ``input_ids`` and returns ``logits``, on the device and in the dtype it is to
            be measured in.
        prompts: token ids (N + T,) or (1, N + T), int64: a prompt of N tokens as long as those in use, and the T tokens
            that really follow it; two or more, of texts that no ranking was calibrated on. Intervals are over prompts:
            fewer than eight say little.
        choices: what to evaluate, by name; see :func:`candidates` and :func:`mixes`.
        final: how many of a prompt's last tokens are compared.
        following: T.
        assume_causal: as in :func:`tmx_compile.tmx_backend`.
        resume: a file that remembers what is measured. With it an interrupted evaluation goes on where it stopped, and
            one with further choices or prompts measures those alone.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: a bad argument; layers that the model lacks, or whose attention cannot go sparse; logits that are
            not finite.
        TriangleMixError: no attention of the model could be proven.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tmx_compile.analysis import candidates, evaluate
    >>> from tmx_compile.mask import Geometry
    >>> shape = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()
    >>> choices = candidates({}, num_layers=2, geometries=[Geometry(2, 6, 5)], counts=[1, 2])
    >>> prompts = torch.randint(0, 50, (3, 60))
    >>> found = evaluate(model, prompts, choices, final=8, following=4, progress=False)
    >>> sorted(found.records)
    ['deepest/2-6-5/1', 'deepest/2-6-5/2']
    >>> found.records["deepest/2-6-5/1"].kl_final.mean > 0
    True
    """
    final, following = as_count("final", final, minimum=1), as_count("following", following, minimum=1)
    sequences = _sequences(prompts, final + following)
    ways = _choices(choices)
    fingerprint = ModelFingerprint.of(model)
    header = {"model": fingerprint.to_dict(), "dtype": dtype_of(model), "final": final, "following": following}
    journal = Journal(resume, header, "evaluation")
    # The smallest geometry: a layer with a window of its own has a switch only where ours is shorter, and a choice that
    # leaves such a layer as it is changes nothing there.
    captured = CapturedModel(model, TriangleMixConfig(0, 0, 0), assume_causal=assume_causal)
    depth, shapes = _layers(captured, sequences[0], journal)
    for name, choice in ways.items():
        unknown = sorted({*choice.layers, *choice.dynamic.layers} - set(shapes))
        if unknown:
            raise ValueError(
                f"choices[{name!r}] must have layers whose attention can go sparse, {sorted(shapes)}, got {unknown}"
            )
        windowed = [i for i in choice.dynamic.layers if any(call.reach is not None for call in shapes[i])]
        if windowed:
            raise ValueError(
                f"choices[{name!r}] must have no dynamic layers with a window of their own, got {windowed}"
            )
    changes: dict[str, list[Change]] = {name: [] for name in ways}
    with progress_bar("choices", len(ways) * len(sequences), progress) as tick:
        for ids in sequences:
            for name, change in _changes(captured, ids, ways, final, following, journal, tick).items():
                changes[name].append(change)
    first = next(iter(changes.values()))
    lengths = {ids.shape[1] - following for ids in sequences}
    return Evaluation(
        depth,
        fingerprint,
        shapes,
        dtype_of(model),
        next(model.parameters()).device.type,
        (min(lengths), max(lengths)),
        len(sequences),
        final,
        following,
        {
            "ppl_final": math.exp(statistics.fmean(x.dense_nll_final for x in first)),
            "ppl_following": math.exp(statistics.fmean(x.dense_nll_following for x in first)),
            "right": statistics.fmean(x.dense_right for x in first),
        },
        {name: _summary(ways[name], found) for name, found in changes.items()},
        {"class": type(captured.model).__name__, "versions": versions(), "hardware": hardware()},
    )


def _sequences(prompts: Sequence[Tensor], compared: int) -> list[Tensor]:
    """The prompts as (1, N + T)."""
    if isinstance(prompts, Tensor) and prompts.dim() != 2:
        raise ValueError(f"prompts must be a sequence of token ids, got a tensor of shape {tuple(prompts.shape)}")
    found = []
    for place, ids in enumerate(prompts):
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"prompts[{place}] must be a tensor of int64 token ids, got {got}")
        row = ids[None] if ids.dim() == 1 else ids
        if row.dim() != 2 or row.shape[0] != 1 or row.shape[1] <= compared:
            raise ValueError(
                f"prompts[{place}] must be one sequence of more than the {compared} tokens that are compared, "
                f"got {tuple(ids.shape)}"
            )
        # A copy: a slice with a storage offset of its own would be another kind of tensor to the compiler.
        found.append(row.clone())
    if len(found) < 2:
        raise ValueError(f"prompts must be at least 2, or intervals say nothing, got {len(found)}")
    return found


def _choices(choices: Mapping[str, Choice]) -> dict[str, Choice]:
    if not isinstance(choices, Mapping) or not choices:
        raise ValueError(f"choices must be a mapping of names to Choice with at least one, got {choices!r}")
    found = {}
    for name, choice in choices.items():
        # A continued conversation would be stored without its turn.
        if not isinstance(name, str) or type(choice) is not Choice:
            raise ValueError(f"choices must be a mapping of names to Choice, got {name!r}: {choice!r}")
        try:
            config = choice.config()
        except (ValueError, TypeError) as error:
            raise ValueError(f"choices[{name!r}] is no choice: {error}") from error
        if not config.layers() and not config.dynamic_layers():
            raise ValueError(f"choices[{name!r}] must have at least one sparse layer, got none")
        found[name] = Choice.of(config, streaming=choice.streaming)
    return found


def _layers(
    captured: CapturedModel, ids: Tensor, journal: Journal
) -> tuple[int, dict[int, tuple[AttentionShape, ...]]]:
    """The model's depth and the layers that can go sparse; runs the model once where the journal does not know them."""
    known = journal.get("layers")
    if known is None:
        model = captured.model
        kwargs = {"input_ids": ids.to(next(model.parameters()).device), **call_arguments(model, 1)}
        captured.run(Inputs(kwargs=kwargs))
        seen = [site.layer for site in captured.report if site.layer is not None]
        shapes = {str(layer): [list(call) for call in calls] for layer, calls in captured.shapes.items()}
        known = {"depth": 1 + max(seen), "shapes": shapes}
        journal.put("layers", known)
    shapes = known["shapes"].items()
    return int(known["depth"]), {int(i): tuple(AttentionShape(*call) for call in calls) for i, calls in shapes}


def _changes(
    captured: CapturedModel,
    ids: Tensor,
    ways: Mapping[str, Choice],
    final: int,
    following: int,
    journal: Journal,
    tick: Callable[[], None],
) -> dict[str, Change]:
    """What every choice changes in one sequence: as the journal knows it, or measured."""
    values = hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()[:16]
    keys = {name: f"{values}/{_key(choice)}" for name, choice in ways.items()}
    missing = [name for name, key in keys.items() if journal.get(key) is None]
    # With nothing to run, not even the dense pass is made.
    found = compare(captured, ids, [ways[name] for name in missing], final=final, following=following)
    for name, change in zip(missing, found if missing else (), strict=True):
        journal.put(keys[name], asdict(change))
        tick()
    for _ in range(len(ways) - len(missing)):
        tick()
    return {name: _read(journal.get(key)) for name, key in keys.items()}


def _read(change: Mapping[str, Any]) -> Change:
    return Change(**{**change, "densities": tuple(change.get("densities", ()))})


def _key(choice: Choice) -> str:
    key = f"{choice.geometry.slug}/{','.join(map(str, choice.layers))}/{'streaming' if choice.streaming else 'dense'}"
    x = choice.dynamic
    ways = ",".join(f"{layer}:{share}" for layer, share in zip(x.layers, x.shares, strict=True))
    return f"{key}/{x.method}-{x.block}/{ways}" if ways else key


def _summary(choice: Choice, changes: Sequence[Change]) -> Record:
    def paired(value: Callable[[Change], Any], *, exponent: bool = False) -> Any:
        return interval([value(change) for change in changes], exponent=exponent)

    return Record(
        choice,
        paired(lambda x: x.kl_final),
        paired(lambda x: x.kl_following),
        paired(lambda x: x.nll_final - x.dense_nll_final, exponent=True),
        paired(lambda x: x.nll_following - x.dense_nll_following, exponent=True),
        paired(lambda x: x.right - x.dense_right),
        tuple(interval([x.densities[i] for x in changes]) for i in range(len(choice.dynamic.layers))),
    )
