"""What the user asks for: which layers are triangle layers, and the shape of the triangle.

TriangleMix (arXiv 2507.21526) keeps attention dense in some layers and, in the others, skips the Middle
section of the causal score matrix. The paper counts rows, columns and layers from 1; everything here counts
from 0, and every length is in tokens. For a prompt of N tokens, row i of a triangle layer attends to column j
exactly when::

    j <= i  and  (j < num_sink_tokens  or  i - j <= sliding_window_size  or  i >= N - num_last_tokens)

A row thus sees ``num_sink_tokens`` sinks and ``sliding_window_size + 1`` window keys, its own key included.
Code that writes the window as ``i - j < n_local`` has ``sliding_window_size = n_local - 1``.

Recommended values. They are advice, never limits; any geometry that a mask can express is legal:

=====================  ============  ==========  =====================================
parameter              usual         range       prompts over 4K / the paper's serving
=====================  ============  ==========  =====================================
num_sink_tokens        4-8           2-16        8 / 8
sliding_window_size    32-64         8-128       64 / 512
num_last_tokens        64-128        32-256      128 / 128
triangle layers        12 for a 14B  4-20        16 / measured per model
                       16 for a 32B
npu_block_size         64            32-256
=====================  ============  ==========  =====================================

*Which* layers matters far more than how many. The deep layers are the skippable ones: start from
:meth:`TriangleMixConfig.deepest`, :meth:`TriangleMixConfig.from_layer` or a calibration of your own model
(:meth:`TriangleMixConfig.from_profile`). A bare ``num_triangle_layers`` means the *first* n layers; that
reading is kept for compatibility and is the worst choice there is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import operator
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmx_compile.environment import VARIABLES

if TYPE_CHECKING:
    from torch import nn

PROFILE_FORMAT = "tmx-profile-1"

# Counts become 32-bit kernel arguments.
_COUNT_LIMIT = 2**31
_GEOMETRY = ("num_sink_tokens", "sliding_window_size", "num_last_tokens")
# What the explicit constructors accept beside the layers, which they choose themselves.
_OVERRIDABLE = (*_GEOMETRY, "min_seq_len")


def as_count(name: str, value: Any, minimum: int = 0) -> int:
    """Return ``value`` as a plain ``int``, at least ``minimum`` (0 or 1) and below 2**31.

    Accepts whatever implements ``__index__`` (NumPy integers too), except booleans. Anything else is a
    ``ValueError`` that names the parameter and shows the value.
    """
    # A boolean tensor implements __index__, so the type alone does not give it away.
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    try:
        count = None if is_bool else int(operator.index(value))
    except TypeError:
        count = None
    if count is None or count < minimum:
        kind = "a positive integer" if minimum else "a non-negative integer"
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    if count >= _COUNT_LIMIT:
        raise ValueError(f"{name} must be less than 2**31, got {count}")
    return count


def _as_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be a bool, got {value!r}")


def _as_layer_indices(name: str, value: Any) -> tuple[int, ...]:
    try:
        if isinstance(value, (str, bytes, bytearray, Mapping)):
            raise TypeError
        items = list(value)
    except TypeError:
        raise ValueError(f"{name} must be a sequence of layer indices, got {value!r}") from None
    indices = sorted(as_count(f"{name}[{place}]", index) for place, index in enumerate(items))
    repeated = sorted({index for index, following in itertools.pairwise(indices) if index == following})
    if repeated:
        listed = ", ".join(map(str, repeated))
        raise ValueError(f"{name} must not repeat a layer, got {listed} more than once")
    return tuple(indices)


def _refuse_unknown(names: Iterable[str], known: Collection[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}; known here: {', '.join(known)}")


@dataclass(frozen=True)
class TriangleMixConfig:
    """The triangle layers and their geometry; immutable, hashable, validated on construction.

    Args:
        num_sink_tokens: keys at the start of the sequence that every row attends to (tokens).
        sliding_window_size: how far back a row looks: ``i - j <= sliding_window_size``, so one key more than
            this, the row's own included (tokens).
        num_last_tokens: rows at the end of the prompt that attend to all earlier keys (tokens).
        num_triangle_layers: make the first n layers triangle layers. Kept for compatibility and the worst
            choice; ignored when ``triangle_layer_indices`` is given.
        triangle_layer_indices: the triangle layers, counted from 0, from any iterable of integers; stored as
            a sorted tuple. None means not given; an empty one means that no layer is a triangle layer.
        min_seq_len: prompts of this length or shorter stay dense (tokens).

    Raises:
        ValueError: a count that is negative, no integer or not below 2**31, a layer that is negative or
            repeated; the message names the parameter and the value.
    """

    num_sink_tokens: int = 4
    sliding_window_size: int = 32
    num_last_tokens: int = 64
    num_triangle_layers: int | None = None
    triangle_layer_indices: Sequence[int] | None = None
    min_seq_len: int = 2048

    def __post_init__(self) -> None:
        for name in _OVERRIDABLE:
            object.__setattr__(self, name, as_count(name, getattr(self, name)))
        if self.num_triangle_layers is not None:
            count = as_count("num_triangle_layers", self.num_triangle_layers)
            object.__setattr__(self, "num_triangle_layers", count)
        if self.triangle_layer_indices is not None:
            indices = _as_layer_indices("triangle_layer_indices", self.triangle_layer_indices)
            object.__setattr__(self, "triangle_layer_indices", indices)

    @classmethod
    def deepest(cls, n: int, *, num_layers: int, **geometry: int) -> TriangleMixConfig:
        """Make the deepest ``n`` layers of a model with ``num_layers`` layers the triangle layers.

        ``geometry`` takes num_sink_tokens, sliding_window_size, num_last_tokens and min_seq_len.
        ``ValueError`` when ``n`` exceeds ``num_layers`` or a name is unknown.
        """
        _refuse_unknown(geometry, _OVERRIDABLE)
        num_layers = as_count("num_layers", num_layers, minimum=1)
        n = as_count("n", n)
        if n > num_layers:
            raise ValueError(f"n must be at most num_layers={num_layers}, got {n}")
        return cls(triangle_layer_indices=range(num_layers - n, num_layers), **geometry)

    @classmethod
    def from_layer(cls, start: int, *, num_layers: int, **geometry: int) -> TriangleMixConfig:
        """Make layers ``start`` to ``num_layers - 1`` (counted from 0) the triangle layers.

        ``geometry`` as in :meth:`deepest`. ``ValueError`` when ``start`` is no layer of the model.
        """
        _refuse_unknown(geometry, _OVERRIDABLE)
        num_layers = as_count("num_layers", num_layers, minimum=1)
        start = as_count("start", start)
        if start >= num_layers:
            raise ValueError(f"start must be less than num_layers={num_layers}, got {start}")
        return cls(triangle_layer_indices=range(start, num_layers), **geometry)

    @classmethod
    def from_profile(
        cls,
        path: str | os.PathLike[str],
        *,
        num_layers: int,
        model: nn.Module | None = None,
        num_triangle_layers: int | None = None,
        **overrides: int,
    ) -> TriangleMixConfig:
        """Read a saved calibration: the JSON file that :meth:`to_profile` or ``Calibration.to_profile`` writes.

        Args:
            path: the file.
            num_layers: the layer count of the model at hand: a choice for another depth is refused.
            model: the model at hand. With it the profile must have the model's fingerprint (names and shapes of all
                parameters, and a sample of their values); without it only the number of layers is checked, since
                nothing else is known here.
            num_triangle_layers: take this many layers of the profile's ``ranking``, from the one needed least, in place
                of its ``triangle_layer_indices``.
            overrides: values in place of the file's; the names are those of :meth:`deepest`.

        Keys of the file beside these and those listed at :meth:`to_profile` are ignored, so a calibration may say how
        it was made.

        Raises:
            ValueError: not JSON, another format, another number of layers, another model, no ranking or fingerprint
                where one is needed, a missing or bad value; the message carries the path and the reason. Also an
                unknown or bad override.
            OSError: the file cannot be read.
        """
        _refuse_unknown(overrides, _OVERRIDABLE)
        num_layers = as_count("num_layers", num_layers, minimum=1)
        if num_triangle_layers is not None:
            num_triangle_layers = as_count("num_triangle_layers", num_triangle_layers)
        text = Path(path).read_bytes()
        try:
            try:
                profile = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"not a JSON file ({error})") from error
            config = cls(**_profile_values(profile, num_layers, num_triangle_layers))
            config.check_layers(num_layers)
            if model is not None:
                _check_model(profile["model"], model)
        except ValueError as error:
            raise ValueError(f"cannot use profile {os.fspath(path)}: {error}") from error
        return config.replace(**overrides)

    def to_profile(self, path: str | os.PathLike[str], *, num_layers: int) -> None:
        """Save this configuration for a model of ``num_layers`` layers, for :meth:`from_profile`.

        The file is JSON with the keys ``format``, ``model.num_layers``, ``geometry``, ``min_seq_len``
        (optional on reading) and ``triangle_layer_indices``, which spells out the effective layers even where
        they came from ``num_triangle_layers``. ``ValueError`` when a layer lies outside the model.
        """
        num_layers = as_count("num_layers", num_layers, minimum=1)
        self.check_layers(num_layers)
        profile = {
            "format": PROFILE_FORMAT,
            "model": {"num_layers": num_layers},
            "geometry": {name: getattr(self, name) for name in _GEOMETRY},
            "min_seq_len": self.min_seq_len,
            "triangle_layer_indices": list(self.layers()),
        }
        Path(path).write_text(json.dumps(profile, indent=2) + "\n", encoding="utf-8")

    @property
    def geometry(self) -> tuple[int, int, int]:
        """``(num_sink_tokens, sliding_window_size, num_last_tokens)``, in tokens."""
        return self.num_sink_tokens, self.sliding_window_size, self.num_last_tokens

    @property
    def uses_first_n(self) -> bool:
        """Whether the triangle layers are the first n, for want of ``triangle_layer_indices``."""
        return self.triangle_layer_indices is None and bool(self.num_triangle_layers)

    def layers(self) -> tuple[int, ...]:
        """Return the effective triangle layers, ascending, counted from 0."""
        if self.triangle_layer_indices is not None:
            return tuple(self.triangle_layer_indices)
        return tuple(range(self.num_triangle_layers or 0))

    def is_triangle_layer(self, layer_idx: int) -> bool:
        """Whether layer ``layer_idx`` (counted from 0) is among :meth:`layers`."""
        if self.triangle_layer_indices is not None:
            return layer_idx in self.triangle_layer_indices
        return 0 <= layer_idx < (self.num_triangle_layers or 0)

    def check_layers(self, num_layers: int) -> None:
        """Raise ``ValueError`` unless every layer named here exists in a model of ``num_layers`` layers."""
        num_layers = as_count("num_layers", num_layers, minimum=1)
        if self.num_triangle_layers is not None and self.num_triangle_layers > num_layers:
            raise ValueError(
                f"num_triangle_layers must be at most num_layers={num_layers}, got {self.num_triangle_layers}"
            )
        outside = [index for index in self.triangle_layer_indices or () if index >= num_layers]
        if outside:
            listed = ", ".join(map(str, outside))
            raise ValueError(f"triangle_layer_indices must be less than num_layers={num_layers}, got {listed}")

    def fingerprint(self) -> str:
        """Return a hex digest of every field, the same in every process: a cache key."""
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(fields.encode()).hexdigest()

    def replace(self, **changes: Any) -> TriangleMixConfig:
        """Return a copy with some fields changed; an unknown name is a ``ValueError``."""
        _refuse_unknown(changes, [field.name for field in dataclasses.fields(self)])
        return dataclasses.replace(self, **changes)


def _profile_values(profile: Any, num_layers: int, wanted: int | None) -> dict[str, Any]:
    """Constructor arguments out of a parsed profile; the caller adds the path to a refusal."""
    if not isinstance(profile, dict) or profile.get("format") != PROFILE_FORMAT:
        found = profile.get("format") if isinstance(profile, dict) else type(profile).__name__
        raise ValueError(f"format must be {PROFILE_FORMAT!r}, got {found!r}")
    model, geometry = profile.get("model"), profile.get("geometry")
    if not isinstance(model, dict) or not isinstance(geometry, dict):
        raise ValueError("it lacks a model or a geometry section")
    made_for = as_count("model.num_layers", model.get("num_layers"), minimum=1)
    if made_for != num_layers:
        raise ValueError(f"it is for a model of {made_for} layers, this one has num_layers={num_layers}")
    if set(geometry) != set(_GEOMETRY):
        raise ValueError(f"geometry must hold {', '.join(_GEOMETRY)} and no more, got {', '.join(geometry)}")
    name = "triangle_layer_indices" if wanted is None else "ranking"
    layers = profile.get(name)
    if not isinstance(layers, list):
        raise ValueError(f"{name} must be a list, got {layers!r}")
    if wanted is not None:
        if wanted > len(layers):
            raise ValueError(f"num_triangle_layers must be at most the {len(layers)} layers it ranks, got {wanted}")
        layers = layers[:wanted]
    optional = {"min_seq_len": profile["min_seq_len"]} if "min_seq_len" in profile else {}
    return {**geometry, **optional, "triangle_layer_indices": layers}


def _check_model(described: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a profile whose ``model`` section describes another model than the one at hand."""
    # Here and not above: only this needs more than the standard library.
    from tmx_compile.identity import ModelFingerprint

    if "fingerprint" not in described:
        raise ValueError("it has no fingerprint, so whether it is for this model cannot be told")
    ModelFingerprint.from_dict(described["fingerprint"]).check(model)


# Decoder layers of the published Qwen3 models (num_hidden_layers of their configurations).
_QWEN3_LAYERS = {
    "0.6B": 28,
    "1.7B": 28,
    "4B": 36,
    "8B": 36,
    "14B": 40,
    "32B": 64,
    "30B-A3B": 48,
    "235B-A22B": 94,
}
# Sizes with a recommendation of their own; the rest follow the rule in for_qwen3.
_QWEN3_RECOMMENDED = {"14B": 12, "32B": 16}


@dataclass(frozen=True)
class TriangleMixInferenceConfig:
    """The serving form of the configuration: a switch, the triangle parameters and the NPU options.

    Args:
        enable_trianglemix: the switch; while False, :meth:`to_trianglemix_config` returns None.
        num_triangle_layers: as in :class:`TriangleMixConfig`.
        triangle_layer_indices: as in :class:`TriangleMixConfig`, except that an empty one means not given.
            Stored as a sorted tuple.
        num_sink_tokens: as in :class:`TriangleMixConfig`.
        sliding_window_size: as in :class:`TriangleMixConfig`.
        num_last_tokens: as in :class:`TriangleMixConfig`.
        use_npu_optimization: compile models on an NPU with torchair, to CANN's fused attention. With False an NPU is
            like any other device.
        npu_block_size: rows and columns of a block on NPU (tokens, positive; 32-256 recommended).
        use_gradient_analysis: ask for the layers to be chosen by recorded Middle gradients rather than by position:
            :func:`tmx_compile.calibrate` takes such a configuration, and its result gives it back with the layers. A
            backend that gets it without layers warns.
        analysis_warmup_steps: batches to record before that choice.

    Raises:
        ValueError: as :class:`TriangleMixConfig`; also a switch that is no bool, or a block size of 0.
    """

    enable_trianglemix: bool = False
    num_triangle_layers: int | None = None
    triangle_layer_indices: Sequence[int] = ()
    num_sink_tokens: int = TriangleMixConfig.num_sink_tokens
    sliding_window_size: int = TriangleMixConfig.sliding_window_size
    num_last_tokens: int = TriangleMixConfig.num_last_tokens
    use_npu_optimization: bool = True
    npu_block_size: int = 64
    use_gradient_analysis: bool = False
    analysis_warmup_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("enable_trianglemix", "use_npu_optimization", "use_gradient_analysis"):
            _as_bool(name, getattr(self, name))
        indices = () if self.triangle_layer_indices is None else self.triangle_layer_indices
        checked: dict[str, Any] = {
            "triangle_layer_indices": _as_layer_indices("triangle_layer_indices", indices),
            "npu_block_size": as_count("npu_block_size", self.npu_block_size, minimum=1),
            "analysis_warmup_steps": as_count("analysis_warmup_steps", self.analysis_warmup_steps),
        }
        if self.num_triangle_layers is not None:
            checked["num_triangle_layers"] = as_count("num_triangle_layers", self.num_triangle_layers)
        for name in _GEOMETRY:
            checked[name] = as_count(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def to_trianglemix_config(self) -> TriangleMixConfig | None:
        """Return the triangle parameters as a :class:`TriangleMixConfig`, or None while disabled."""
        if not self.enable_trianglemix:
            return None
        return TriangleMixConfig(
            num_sink_tokens=self.num_sink_tokens,
            sliding_window_size=self.sliding_window_size,
            num_last_tokens=self.num_last_tokens,
            num_triangle_layers=self.num_triangle_layers,
            triangle_layer_indices=self.triangle_layer_indices or None,
        )

    @classmethod
    def for_ascend_npu(
        cls, num_triangle_layers: int = 12, enable_gradient_analysis: bool = False
    ) -> TriangleMixInferenceConfig:
        """Return an enabled configuration for Ascend NPUs; the *first* n layers are triangle layers."""
        _as_bool("enable_gradient_analysis", enable_gradient_analysis)
        return cls(
            enable_trianglemix=True,
            num_triangle_layers=num_triangle_layers,
            use_npu_optimization=True,
            use_gradient_analysis=enable_gradient_analysis,
        )

    @classmethod
    def for_qwen3(cls, model_size: str = "14B", num_triangle_layers: int | None = None) -> TriangleMixInferenceConfig:
        """Return an enabled configuration for a published Qwen3 model, with its *first* n layers sparse.

        n is 12 for 14B, 16 for 32B and about three layers in ten, within 4-20, for the other sizes;
        ``num_triangle_layers`` overrides it. ``ValueError`` for an unknown size or a count beyond the model.
        """
        size = model_size.upper() if isinstance(model_size, str) else None
        if size not in _QWEN3_LAYERS:
            raise ValueError(f"model_size must be one of {', '.join(_QWEN3_LAYERS)}, got {model_size!r}")
        depth = _QWEN3_LAYERS[size]
        if num_triangle_layers is None:
            num_triangle_layers = _QWEN3_RECOMMENDED.get(size, min(max(round(0.3 * depth), 4), 20))
        config = cls(enable_trianglemix=True, num_triangle_layers=num_triangle_layers)
        TriangleMixConfig(num_triangle_layers=config.num_triangle_layers).check_layers(depth)
        return config

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> TriangleMixInferenceConfig:
        """Return the configuration that the environment (``os.environ`` unless given) describes.

        - ``VLLM_TRIANGLEMIX_ENABLED``, ``VLLM_NPU_OPTIMIZATION``: 1/true/yes/on or 0/false/no/off, any case.
        - ``VLLM_TRIANGLEMIX_LAYERS``: a lone integer is a *count*, ``12`` = the first 12 layers. With a comma
          or a range it is a *list* of layers counted from 0: ``20,21,22``, ``16-31``, ``0,16-31``, and
          ``12,`` = layer 12 alone.
        - ``VLLM_NPU_BLOCK_SIZE``: a positive integer.
        - ``VLLM_TRIANGLEMIX_GRADIENT_ANALYSIS``: as the first; ``use_gradient_analysis``.

        A variable that is unset or empty leaves the default; a bad value is a ``ValueError`` that names both.
        """
        source = os.environ if environ is None else environ
        settings: dict[str, Any] = {}
        for variable, read in VARIABLES.items():
            text = source.get(variable, "").strip()
            if not text:
                continue
            try:
                name, value = read(text)
                settings[name] = value
                # One setting alone, so that a refusal is blamed on the variable it came from.
                cls(**{name: value})
            except ValueError as error:
                raise ValueError(f"{variable}={text!r}: {error}") from error
        return cls(**settings)
