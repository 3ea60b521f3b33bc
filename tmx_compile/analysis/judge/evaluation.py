"""The outcome of an evaluation: what each choice of sparse layers costs a model, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tmx_compile.analysis.choose.calibration import readable
from tmx_compile.analysis.judge.choice import Choice, DynamicLayers
from tmx_compile.analysis.judge.intervals import Interval
from tmx_compile.bench.layer_times import AttentionShape
from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.config.dynamic import ONLY_GROUP
from tmx_compile.config.fingerprint import ModelFingerprint
from tmx_compile.mask.geometry import Geometry

FORMAT = "tmx-evaluation-1"
METRICS = ("kl_final", "kl_following", "ppl_final", "ppl_following")
"""What a choice can cost: the divergence (KL, nats) of the next-token distributions, dense to sparse, and perplexity
over dense perplexity less 1; of the prompt's final tokens and of those that follow it."""


@dataclass(frozen=True)
class Record:
    """What one choice costs, each as a mean with its 95% interval over prompts, paired with dense.

    Attributes:
        choice: the layers, their geometry, and how they decode.
        kl_final: divergence (KL, nats) of the next-token distributions, dense to sparse, of the prompt's final tokens.
        kl_following: likewise, of the tokens that follow it.
        ppl_final: perplexity over dense perplexity less 1, of the prompt's final tokens.
        ppl_following: likewise, of the tokens that follow it.
        right: the share of the following tokens that is the most likely one, less that of dense attention.
        densities: of each dynamic layer of the choice, in order, the share of blocks that it visited.

    >>> from tmx_compile.analysis import Choice, Interval, Record
    >>> from tmx_compile.mask import Geometry
    >>> nothing, little = Interval(0.0, 0.0, 0.0), Interval(0.01, 0.005, 0.02)
    >>> record = Record(Choice(Geometry(8, 512, 128), (30, 31)), little, little, little, nothing, nothing)
    >>> record.cost("ppl_final").upper
    0.02
    """

    choice: Choice
    kl_final: Interval
    kl_following: Interval
    ppl_final: Interval
    ppl_following: Interval
    right: Interval
    densities: tuple[Interval, ...] = ()

    def cost(self, metric: str) -> Interval:
        """The cost by a ``metric``: "kl_final", "kl_following", "ppl_final" or "ppl_following".

        ``ValueError`` for another name.
        """
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        found: Interval = getattr(self, metric)
        return found


@dataclass(frozen=True)
class Evaluation:
    """What sparse layers cost a model.

    Attributes:
        num_layers: layers of the model.
        fingerprint: of the model.
        shapes: by layer, of each of its attention calls that can go sparse.
        dtype: of the weights.
        device: the kind of device it ran on: "cpu" or "cuda".
        tokens: lengths of the shortest and the longest prompt.
        prompts: how many.
        final: how many of a prompt's last tokens are compared.
        following: how many tokens follow each prompt.
        dense: perplexity of the final and of the following tokens with dense attention (``ppl_final``,
            ``ppl_following``), and the share of the latter that is the most likely one (``right``).
        records: by the name of the choice.
        about: plain data on how it was made: versions, hardware, the model's class.

    What :func:`evaluate` would give, written out:

    >>> import tempfile
    >>> from tmx_compile.analysis import Choice, Evaluation, Interval, Record
    >>> from tmx_compile.bench.layer_times import AttentionShape
    >>> from tmx_compile.config.fingerprint import ModelFingerprint
    >>> from tmx_compile.mask import Geometry
    >>> cost, shape = Interval(0.01, 0.005, 0.02), AttentionShape(32, 8, 128, 128)
    >>> record = Record(Choice(Geometry(8, 512, 128), (30, 31)), cost, cost, cost, cost, cost)
    >>> found = Evaluation(
    ...     32, ModelFingerprint("", ""), {30: (shape,), 31: (shape,)}, "bfloat16", "cuda", (32768, 32768), 8, 64, 128,
    ...     {}, {"deepest/8-512-128/2": record}, {}
    ... )
    >>> with tempfile.NamedTemporaryFile(suffix=".json") as file:
    ...     found.save(file.name)
    ...     Evaluation.load(file.name) == found
    True
    """

    num_layers: int
    fingerprint: ModelFingerprint
    shapes: Mapping[int, tuple[AttentionShape, ...]]
    dtype: str
    device: str
    tokens: tuple[int, int]
    prompts: int
    final: int
    following: int
    dense: Mapping[str, float]
    records: Mapping[str, Record]
    about: Mapping[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON to the file ``path``, for :meth:`load`; ``OSError`` where that is not possible."""
        # Layers with equal shapes, which is most of them, share a line.
        groups: dict[tuple[AttentionShape, ...], list[int]] = {}
        for layer, calls in sorted(self.shapes.items()):
            groups.setdefault(calls, []).append(layer)
        model = {"num_layers": self.num_layers, "fingerprint": self.fingerprint.to_dict()}
        attention = [{"layers": layers, "calls": [asdict(x) for x in calls]} for calls, layers in groups.items()]
        content = {
            "format": FORMAT,
            "model": model | {"dtype": self.dtype},
            "attention": attention,
            "device": self.device,
            "tokens": list(self.tokens),
            "prompts": self.prompts,
            "final": self.final,
            "following": self.following,
            "dense": dict(self.dense),
            "records": {name: _record_data(record) for name, record in self.records.items()},
            "about": dict(self.about),
        }
        Path(path).write_text(readable(content), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read the file ``path``, which :meth:`save` wrote.

        Raises:
            ValueError: another format, or a missing or bad value; the message carries the path and the reason.
            OSError: the file cannot be read.
        """
        text = Path(path).read_bytes()
        try:
            return cls._read(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"cannot use evaluation {os.fspath(path)}: {why}") from error

    @classmethod
    def _read(cls, content: Any) -> Evaluation:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"format must be {FORMAT!r}, got {found!r}")
        num_layers = as_count("num_layers", content["model"]["num_layers"], minimum=1)
        shapes: dict[int, tuple[AttentionShape, ...]] = {}
        for group in content["attention"]:
            calls = tuple(AttentionShape(**call) for call in group["calls"])
            shapes |= {as_count("layer", layer): calls for layer in group["layers"]}
        records = {str(name): _record(data, num_layers) for name, data in content["records"].items()}
        unknown = sorted(
            {layer for x in records.values() for layer in (*x.choice.layers, *x.choice.dynamic.layers)} - set(shapes)
        )
        if unknown:
            raise ValueError(f"records have layers {unknown}, of which nothing is said under attention")
        shortest, longest = content["tokens"]
        return cls(
            num_layers,
            ModelFingerprint.from_dict(content["model"]["fingerprint"]),
            shapes,
            str(content["model"]["dtype"]),
            str(content["device"]),
            (as_count("tokens", shortest, minimum=1), as_count("tokens", longest, minimum=1)),
            as_count("prompts", content["prompts"], minimum=1),
            as_count("final", content["final"], minimum=1),
            as_count("following", content["following"], minimum=1),
            {name: float(value) for name, value in content["dense"].items()},
            records,
            dict(content["about"]),
        )


def config_of(choice: Choice, num_layers: int) -> TriangleMixConfig:
    """The configuration of a choice; ``ValueError`` for counts or layers that a model of that depth cannot have."""
    config = choice.config()
    config.check_layers(num_layers)
    return config


def _record_data(record: Record) -> dict[str, Any]:
    choice = record.choice
    return {
        "geometry": list(choice.geometry.counts),
        "layers": list(choice.layers),
        "streaming": choice.streaming,
        **{name: getattr(record, name).as_list() for name in (*METRICS, "right")},
        **({"dynamic": _dynamic_data(record)} if choice.dynamic.layers else {}),
    }


def _dynamic_data(record: Record) -> dict[str, Any]:
    x = record.choice.dynamic
    densities = [found.as_list() for found in record.densities]
    layers, shares = list(x.layers), list(x.shares)
    how = {"method": x.method, "block": x.block, "group": x.group}
    return {"layers": layers, "shares": shares, **how, "densities": densities}


def _record(data: Mapping[str, Any], num_layers: int) -> Record:
    sink, window, last = data["geometry"]
    if not isinstance(data["streaming"], bool):
        raise ValueError(f"streaming must be a bool, got {data['streaming']!r}")
    dynamic, densities = DynamicLayers(), []
    if "dynamic" in data:
        words = {"group": ONLY_GROUP, **data["dynamic"]}
        densities = [Interval(*map(float, found)) for found in words.pop("densities")]
        dynamic = DynamicLayers(tuple(words.pop("layers")), tuple(words.pop("shares")), **words)
        if len(densities) != len(dynamic.layers):
            raise ValueError(f"densities must be one for each of {len(dynamic.layers)} layers, got {len(densities)}")
    choice = Choice(Geometry(sink, window, last), tuple(data["layers"]), data["streaming"], dynamic)
    config = config_of(choice, num_layers)
    intervals = {name: Interval(*map(float, data[name])) for name in (*METRICS, "right")}
    for name, found in (*intervals.items(), *(("densities", x) for x in densities)):
        if not found.lower <= found.mean <= found.upper:
            raise ValueError(f"{name} must be mean, lower and upper end, got {found.as_list()}")
    return Record(Choice.of(config, streaming=data["streaming"]), **intervals, densities=tuple(densities))
