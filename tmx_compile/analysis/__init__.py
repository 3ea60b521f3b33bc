"""Which layers can go sparse: each layer's Middle contribution, measured rather than assumed.

:func:`calibrate` ranks a model's layers, :func:`candidates` lists choices worth trying, :func:`evaluate` measures what
they cost in quality, and :func:`advise` picks the fastest within a budget. The commands ``tmx calibrate``, ``tmx
evaluate`` and ``tmx advise`` do the same for models on disk. Below them stand :class:`CapturedModel`, a model whose
layers can be switched, and :func:`compare`.
"""

from __future__ import annotations

from tmx_compile.analysis.capture.capture import CapturedModel, Inputs, Trace
from tmx_compile.analysis.capture.samples import Sample
from tmx_compile.analysis.choose.advise import Advice, Candidate, advise
from tmx_compile.analysis.choose.calibration import Calibration
from tmx_compile.analysis.choose.direct import ShareScores
from tmx_compile.analysis.choose.estimate import calibrate
from tmx_compile.analysis.choose.mix import Scores, mixes, read_scores
from tmx_compile.analysis.choose.recorder import TriangleMixAnalyzer
from tmx_compile.analysis.judge.choice import Choice, Continued, DynamicLayers
from tmx_compile.analysis.judge.compare import Change, compare
from tmx_compile.analysis.judge.evaluate import candidates, evaluate, read_ranking
from tmx_compile.analysis.judge.evaluation import Evaluation, Record
from tmx_compile.analysis.judge.intervals import Interval, interval

__all__ = [
    "Advice",
    "Calibration",
    "Candidate",
    "CapturedModel",
    "Change",
    "Choice",
    "Continued",
    "DynamicLayers",
    "Evaluation",
    "Inputs",
    "Interval",
    "Record",
    "Sample",
    "Scores",
    "ShareScores",
    "Trace",
    "TriangleMixAnalyzer",
    "advise",
    "calibrate",
    "candidates",
    "compare",
    "evaluate",
    "interval",
    "mixes",
    "read_ranking",
    "read_scores",
]
