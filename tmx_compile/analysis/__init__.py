"""Which layers can go sparse: each layer's Middle contribution, measured rather than assumed."""

from __future__ import annotations

from tmx_compile.analysis.calibration import Calibration
from tmx_compile.analysis.capture import CapturedModel, Inputs, Trace
from tmx_compile.analysis.compare import Change, Choice, compare
from tmx_compile.analysis.estimate import calibrate
from tmx_compile.analysis.recorder import TriangleMixAnalyzer
from tmx_compile.analysis.samples import Sample

__all__ = [
    "Calibration",
    "CapturedModel",
    "Change",
    "Choice",
    "Inputs",
    "Sample",
    "Trace",
    "TriangleMixAnalyzer",
    "calibrate",
    "compare",
]
