"""TriangleMix attention for ``torch.compile``: long prompts made cheap, with proof.

model = torch.compile(model, backend=tmx_backend(TriangleMixConfig.deepest(15, num_layers=30)))
"""

from __future__ import annotations

from tmx_compile.analysis import Calibration, TriangleMixAnalyzer, calibrate
from tmx_compile.backend import TmxBackend, explain, tmx_backend
from tmx_compile.config import TriangleMixConfig
from tmx_compile.errors import LoweringError, StrictModeError, TriangleMixError, VerificationError
from tmx_compile.export import export, rewrite
from tmx_compile.legacy import AscendNPUTriangleMixOptimizer, AscendTriangleMixAttention
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.legacy.masks import TriangleMixAttention, TriangleMixMaskGenerator
from tmx_compile.operator import triangle_attention
from tmx_compile.operator.prefill import prefill
from tmx_compile.report import Reason, Report, SiteRecord
from tmx_compile.version import __version__

__all__ = [
    "AscendNPUTriangleMixOptimizer",
    "AscendTriangleMixAttention",
    "Calibration",
    "LoweringError",
    "Reason",
    "Report",
    "SiteRecord",
    "StrictModeError",
    "TmxBackend",
    "TriangleMixAnalyzer",
    "TriangleMixAttention",
    "TriangleMixConfig",
    "TriangleMixError",
    "TriangleMixInferenceConfig",
    "TriangleMixMaskGenerator",
    "VerificationError",
    "__version__",
    "calibrate",
    "explain",
    "export",
    "prefill",
    "rewrite",
    "tmx_backend",
    "triangle_attention",
]
