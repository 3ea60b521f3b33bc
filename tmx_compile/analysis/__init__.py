"""Which layers can go sparse: each layer's Middle contribution, measured rather than assumed."""

from __future__ import annotations

from tmx_compile.analysis.advise import Advice, Candidate, advise
from tmx_compile.analysis.calibration import Calibration
from tmx_compile.analysis.capture import CapturedModel, Inputs, Trace
from tmx_compile.analysis.compare import Change, Choice, Continued, compare
from tmx_compile.analysis.estimate import calibrate
from tmx_compile.analysis.evaluate import candidates, evaluate, read_ranking
from tmx_compile.analysis.evaluation import Evaluation, Record
from tmx_compile.analysis.intervals import Interval, interval
from tmx_compile.analysis.recorder import TriangleMixAnalyzer
from tmx_compile.analysis.samples import Sample

__all__ = [
    "Advice",
    "Calibration",
    "Candidate",
    "CapturedModel",
    "Change",
    "Choice",
    "Continued",
    "Evaluation",
    "Inputs",
    "Interval",
    "Record",
    "Sample",
    "Trace",
    "TriangleMixAnalyzer",
    "advise",
    "calibrate",
    "candidates",
    "compare",
    "evaluate",
    "interval",
    "read_ranking",
]
