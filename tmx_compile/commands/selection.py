"""Options that say which layers go sparse and how, for the commands that compile a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tmx_compile.commands.values import count, geometry, layers
from tmx_compile.config import TriangleMixConfig
from tmx_compile.config.profile import GEOMETRY


def selection_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add ``--deepest``, ``--layers``, ``--profile``, ``--geometry`` and ``--min-seq-len``, for :func:`selected`.

    ``required``: one of the first three has to be given; else the deepest half is taken.
    """
    default = TriangleMixConfig()
    none = argparse.SUPPRESS
    which = parser.add_mutually_exclusive_group(required=required)
    half = "" if required else "; without any choice, half of the layers"
    which.add_argument("--deepest", type=count, metavar="N", default=none, help=f"the deepest N layers go sparse{half}")
    listed = "these layers go sparse, counted from 0, as in 20,21,24-27"
    which.add_argument("--layers", type=layers, metavar="I,J-K", default=none, help=listed)
    saved = "the layers and the geometry that `tmx calibrate` or `tmx advise` saved"
    which.add_argument("--profile", type=Path, metavar="FILE", default=none, help=saved)
    shape = f"sinks/window/last rows (default: the profile's, else {default.geometry})"
    parser.add_argument("--geometry", type=geometry, metavar="S/W/L", default=none, help=shape)
    short = f"prompts up to here stay dense (default: the profile's, else {default.min_seq_len})"
    parser.add_argument("--min-seq-len", type=_length, metavar="N", default=none, help=short)


def selected(options: argparse.Namespace, num_layers: int) -> TriangleMixConfig:
    """The configuration that the options name for a model of ``num_layers`` layers.

    ``ValueError`` for a layer outside of the model or a profile that does not fit; ``OSError`` for one that cannot be
    read. A profile is checked by the number of layers alone: there may be no weights to know the model by.
    """
    given = vars(options)
    changes: dict[str, Any] = {}
    if "geometry" in given:
        changes.update(zip(GEOMETRY, options.geometry.counts, strict=True))
    if "min_seq_len" in given:
        changes["min_seq_len"] = options.min_seq_len
    if "profile" in given:
        return TriangleMixConfig.from_profile(options.profile, num_layers=num_layers, **changes)
    if "layers" in given:
        outside = [layer for layer in options.layers if layer >= num_layers]
        if outside:
            listed = ", ".join(map(str, outside))
            raise ValueError(f"layers must be among the model's 0 to {num_layers - 1}, got {listed}")
        return TriangleMixConfig(triangle_layer_indices=options.layers, **changes)
    deepest = given.get("deepest", num_layers // 2)
    if deepest > num_layers:
        raise ValueError(f"deepest must be at most the model's {num_layers} layers, got {deepest}")
    return TriangleMixConfig.deepest(deepest, num_layers=num_layers, **changes)


def _length(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)
