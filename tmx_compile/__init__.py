"""TriangleMix attention for ``torch.compile``: long prompts made cheap, with proof.

Which layers go sparse, and the mask's geometry, is a :class:`TriangleMixConfig`; :func:`calibrate` measures which can.
:func:`tmx_backend` compiles, and fills a :class:`Report`: what became of every attention call, and the :class:`Reason`
where one stays dense. :func:`explain` gives that report without compiling, :func:`rewrite` a graph without a compiler
behind it, :func:`export` an ``.air`` for Ascend NPUs; :func:`triangle_attention` is the one operator that all of them
put in. The other classes are those of the original API.

>>> from tmx_compile import TriangleMixConfig, tmx_backend
>>> backend = tmx_backend(TriangleMixConfig.deepest(15, num_layers=30))
>>> backend.config.layers()[0]  # model.compile(backend=backend) is next
15
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
