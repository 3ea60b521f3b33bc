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
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tmx_compile.config.dynamic import DYNAMIC, checked, from_profile_section, profile_section
from tmx_compile.config.profile import GEOMETRY, PROFILE_FORMAT, check_model, profile_values
from tmx_compile.config.values import as_count, as_layer_indices, refuse_unknown
from tmx_compile.mask.geometry import Geometry
from tmx_compile.mask.selection import Selection

if TYPE_CHECKING:
    from torch import nn

# What the explicit constructors accept beside the layers, which they choose themselves.
_OVERRIDABLE = (*GEOMETRY, "min_seq_len")


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
        dynamic_layer_indices: layers whose prompts attend to blocks of keys that are chosen while they run
            (docs/dynamic.md); from any iterable of integers, none of them a triangle layer. None: no layer.
        dynamic_share: how much of the estimated attention of a block of rows these keep, above 0 and at most 1; or a
            list of one for each of these layers, in their order.
        dynamic_method: how it is estimated: "pooled", "antidiagonal" or "sampled".
        dynamic_block: rows and keys of a block: 16, 32, 64 or 128 (tokens).
        dynamic_group: tokens that the estimate takes together, or samples one row of, 16 to ``dynamic_block``: larger
            groups are chosen from faster, and know less. None: 16; a quarter of a block for sampled rows, if more.

    Raises:
        ValueError: a count that is negative, no integer or not below 2**31, a layer that is negative,
            repeated or of both kinds, an unknown method; the message names the parameter and the value.

    >>> from tmx_compile import TriangleMixConfig
    >>> config = TriangleMixConfig(8, 512, 128, triangle_layer_indices=[30, 31])
    >>> config.layers(), config.geometry.counts
    ((30, 31), (8, 512, 128))
    >>> TriangleMixConfig(num_sink_tokens=-1)
    Traceback (most recent call last):
    ...
    ValueError: num_sink_tokens must be a non-negative integer, got -1
    """

    num_sink_tokens: int = 4
    sliding_window_size: int = 32
    num_last_tokens: int = 64
    num_triangle_layers: int | None = None
    triangle_layer_indices: Sequence[int] | None = None
    min_seq_len: int = 2048
    dynamic_layer_indices: Sequence[int] | None = None
    dynamic_share: float | Sequence[float] = 0.95
    dynamic_method: str = "sampled"
    dynamic_block: int = 128
    dynamic_group: int | None = None

    def __post_init__(self) -> None:
        for name in _OVERRIDABLE:
            object.__setattr__(self, name, as_count(name, getattr(self, name)))
        if self.num_triangle_layers is not None:
            count = as_count("num_triangle_layers", self.num_triangle_layers)
            object.__setattr__(self, "num_triangle_layers", count)
        if self.triangle_layer_indices is not None:
            indices = as_layer_indices("triangle_layer_indices", self.triangle_layer_indices)
            object.__setattr__(self, "triangle_layer_indices", indices)
        for name, value in checked(self._dynamic, self._named).items():
            object.__setattr__(self, name, value)

    @classmethod
    def deepest(cls, n: int, *, num_layers: int, **geometry: int) -> TriangleMixConfig:
        """Make the deepest ``n`` layers of a model with ``num_layers`` layers the triangle layers.

        Deep layers need the Middle section least (TriangleMix, arXiv 2507.21526).

        Args:
            n: how many layers.
            num_layers: layers of the model.
            geometry: num_sink_tokens, sliding_window_size, num_last_tokens and min_seq_len (tokens).

        Raises:
            ValueError: ``n`` exceeds ``num_layers``, or a name is unknown.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig.deepest(3, num_layers=32, sliding_window_size=512).layers()
        (29, 30, 31)
        """
        refuse_unknown(geometry, _OVERRIDABLE)
        num_layers = as_count("num_layers", num_layers, minimum=1)
        n = as_count("n", n)
        if n > num_layers:
            raise ValueError(f"n must be at most num_layers={num_layers}, got {n}")
        values: dict[str, Any] = {**geometry}
        return cls(triangle_layer_indices=range(num_layers - n, num_layers), **values)

    @classmethod
    def from_layer(cls, start: int, *, num_layers: int, **geometry: int) -> TriangleMixConfig:
        """Make layers ``start`` to ``num_layers - 1`` (counted from 0) the triangle layers.

        Args:
            start: the first of them.
            num_layers: layers of the model.
            geometry: as in :meth:`deepest`.

        Raises:
            ValueError: ``start`` is no layer of the model, or a name is unknown.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig.from_layer(28, num_layers=32).layers()
        (28, 29, 30, 31)
        """
        refuse_unknown(geometry, _OVERRIDABLE)
        num_layers = as_count("num_layers", num_layers, minimum=1)
        start = as_count("start", start)
        if start >= num_layers:
            raise ValueError(f"start must be less than num_layers={num_layers}, got {start}")
        values: dict[str, Any] = {**geometry}
        return cls(triangle_layer_indices=range(start, num_layers), **values)

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

        >>> import tempfile
        >>> from tmx_compile import TriangleMixConfig
        >>> with tempfile.NamedTemporaryFile(suffix=".json") as file:
        ...     TriangleMixConfig.deepest(2, num_layers=4).to_profile(file.name, num_layers=4)
        ...     config = TriangleMixConfig.from_profile(file.name, num_layers=4, num_sink_tokens=8)
        >>> config.layers(), config.num_sink_tokens
        ((2, 3), 8)
        """
        refuse_unknown(overrides, _OVERRIDABLE)
        num_layers = as_count("num_layers", num_layers, minimum=1)
        if num_triangle_layers is not None:
            num_triangle_layers = as_count("num_triangle_layers", num_triangle_layers)
        text = Path(path).read_bytes()
        try:
            try:
                profile = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"not a JSON file ({error})") from error
            values = profile_values(profile, num_layers, num_triangle_layers)
            config = cls(**values, **from_profile_section(profile))
            config.check_layers(num_layers)
            if model is not None:
                check_model(profile["model"], model)
        except ValueError as error:
            raise ValueError(f"cannot use profile {os.fspath(path)}: {error}") from error
        return config.replace(**overrides)

    def to_profile(self, path: str | os.PathLike[str], *, num_layers: int) -> None:
        """Save this configuration for a model of ``num_layers`` layers, for :meth:`from_profile`.

        The file is JSON with the keys ``format``, ``model.num_layers``, ``geometry``, ``min_seq_len``
        (optional on reading) and ``triangle_layer_indices``, which spells out the effective layers even where
        they came from ``num_triangle_layers``; and ``dynamic``, where there are such layers, with their
        parameters. :meth:`from_profile` shows an example.

        Args:
            path: the file; one that exists is written over.
            num_layers: layers of the model.

        Raises:
            ValueError: a layer lies outside the model.
            OSError: the file cannot be written.
        """
        num_layers = as_count("num_layers", num_layers, minimum=1)
        self.check_layers(num_layers)
        profile = {
            "format": PROFILE_FORMAT,
            "model": {"num_layers": num_layers},
            "geometry": {name: getattr(self, name) for name in GEOMETRY},
            "min_seq_len": self.min_seq_len,
            "triangle_layer_indices": list(self.layers()),
            **profile_section(self._dynamic),
        }
        Path(path).write_text(json.dumps(profile, indent=2) + "\n", encoding="utf-8")

    @property
    def geometry(self) -> Geometry:
        """``num_sink_tokens``, ``sliding_window_size`` and ``num_last_tokens`` as one value, in tokens.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig().geometry.counts
        (4, 32, 64)
        """
        return Geometry(self.num_sink_tokens, self.sliding_window_size, self.num_last_tokens)

    @property
    def uses_first_n(self) -> bool:
        """Whether the triangle layers are the first n, for want of ``triangle_layer_indices``.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig(num_triangle_layers=12).uses_first_n
        True
        """
        return self.triangle_layer_indices is None and bool(self.num_triangle_layers)

    def layers(self) -> tuple[int, ...]:
        """Return the effective triangle layers, ascending, counted from 0.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig(triangle_layer_indices=[5, 3]).layers()
        (3, 5)
        """
        return tuple(self._named)

    def dynamic_layers(self) -> tuple[int, ...]:
        """Return the layers whose blocks are chosen at run time, ascending, counted from 0.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig(triangle_layer_indices=[2, 3], dynamic_layer_indices=[1, 0]).dynamic_layers()
        (0, 1)
        """
        return tuple(self.dynamic_layer_indices or ())

    def selection(self, layer: int) -> Selection:
        """How the dynamic ``layer`` chooses its blocks; ``ValueError`` for one that is none.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig(dynamic_layer_indices=[4, 2], dynamic_share=[0.8, 0.95]).selection(2).share
        0.95
        """
        layers, share = self.dynamic_layers(), self.dynamic_share
        if layer not in layers:
            raise ValueError(f"layer must be one of dynamic_layer_indices={layers}, got {layer!r}")
        share = share[layers.index(layer)] if isinstance(share, Sequence) else share
        # Known since the configuration was made.
        group = cast("int", self.dynamic_group)
        words = self.dynamic_method, share, self.dynamic_block, group
        return Selection(*words, self.num_sink_tokens, self.num_last_tokens)

    @property
    def _named(self) -> Sequence[int]:
        # A count takes no memory here: it may be of any size.
        indices = self.triangle_layer_indices
        return range(self.num_triangle_layers or 0) if indices is None else indices

    @property
    def _dynamic(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in DYNAMIC}

    def is_triangle_layer(self, layer_idx: int) -> bool:
        """Whether layer ``layer_idx`` (counted from 0) is among :meth:`layers`.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig.deepest(1, num_layers=4).is_triangle_layer(3)
        True
        """
        if self.triangle_layer_indices is not None:
            return layer_idx in self.triangle_layer_indices
        return 0 <= layer_idx < (self.num_triangle_layers or 0)

    def check_layers(self, num_layers: int) -> None:
        """Raise ``ValueError`` unless every layer named here exists in a model of ``num_layers`` layers.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig(triangle_layer_indices=[3, 4]).check_layers(4)
        Traceback (most recent call last):
        ...
        ValueError: triangle_layer_indices must be less than num_layers=4, got 4
        """
        num_layers = as_count("num_layers", num_layers, minimum=1)
        if self.num_triangle_layers is not None and self.num_triangle_layers > num_layers:
            raise ValueError(
                f"num_triangle_layers must be at most num_layers={num_layers}, got {self.num_triangle_layers}"
            )
        for name in ("triangle_layer_indices", "dynamic_layer_indices"):
            outside = [index for index in getattr(self, name) or () if index >= num_layers]
            if outside:
                listed = ", ".join(map(str, outside))
                raise ValueError(f"{name} must be less than num_layers={num_layers}, got {listed}")

    def fingerprint(self) -> str:
        """Return a hex digest of every field, the same in every process: a cache key.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig().fingerprint() == TriangleMixConfig(min_seq_len=2048).fingerprint()
        True
        """
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(fields.encode()).hexdigest()

    def replace(self, **changes: Any) -> TriangleMixConfig:
        """Return a copy with ``changes`` of fields by name; an unknown name is a ``ValueError``.

        >>> from tmx_compile import TriangleMixConfig
        >>> TriangleMixConfig().replace(num_last_tokens=128).geometry.counts
        (4, 32, 128)
        """
        refuse_unknown(changes, [field.name for field in dataclasses.fields(self)])
        return dataclasses.replace(self, **changes)
