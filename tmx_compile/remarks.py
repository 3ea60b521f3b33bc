"""What a user is warned of: of what was asked, and of a long prompt that no layer made cheaper."""

from __future__ import annotations

import warnings

from tmx_compile.config import TriangleMixConfig
from tmx_compile.config.prices import first_n_message, streaming_message
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.passes.plan import Plan
from tmx_compile.passes.settle import missed
from tmx_compile.report import Reason, Rejected, Report
from tmx_compile.request import Request

_ANALYSIS_WARNING = (
    "use_gradient_analysis asks for layers chosen by gradients, and none are chosen yet: run "
    "tmx_compile.calibrate(model, batches, config=config) and compile with its .apply(config)"
)


def _lacks_analysis(config: TriangleMixConfig | TriangleMixInferenceConfig) -> bool:
    if not isinstance(config, TriangleMixInferenceConfig):
        return False
    return config.enable_trianglemix and config.use_gradient_analysis and not config.triangle_layer_indices


def warn_of(request: Request, given: TriangleMixConfig | TriangleMixInferenceConfig, stacklevel: int) -> None:
    """Say what a user may not expect of what was asked; ``stacklevel`` counts from the caller of this function."""
    stacklevel += 1
    config = request.config
    if _lacks_analysis(given):
        warnings.warn(_ANALYSIS_WARNING, stacklevel=stacklevel)
    if config is None:
        return
    if request.decode == "streaming" and config.layers():
        warnings.warn(streaming_message(len(config.layers()), None, config), stacklevel=stacklevel)
    if not request.sparse:
        warnings.warn("the configuration selects no layer: every layer stays dense", stacklevel=stacklevel)
    elif config.uses_first_n:
        warnings.warn(first_n_message(len(config.layers())), stacklevel=stacklevel)


def warn_if_switched_dense(report: Report, path: str, layer: int | None, why: Rejected) -> None:
    """Say once that the last layer that was to go sparse stays dense in a long prompt, where none before it did not.

    Args:
        report: of the attention implementation; the call is in it.
        path: the class of the layer's module.
        layer: its number.
        why: what is against it.
    """
    text = (
        f"no attention of a long prompt went sparse: layer {layer}, {path}: {why} ({why.reason.name}: docs/reasons.md)"
    )
    if text in report.notes or report.triangle():
        return
    warnings.warn(text, stacklevel=3)
    report.notes.append(text)


def warn_if_dense(plan: Plan, report: Report) -> None:
    """Say once where every layer that was to go sparse stays dense for a long prompt, and why the first does."""
    dense = [] if plan.sparse else list(missed(plan, by_hint=True))
    if not dense:
        return
    why = dense[0].why
    assert why is not None
    paths = ", ".join(dict.fromkeys(item.layer.path or item.node.name for item in dense[:3]))
    text = (
        f"no attention of a graph for a long prompt went sparse: {paths}{', ...' if len(dense) > 3 else ''}: {why} "
        f"({why.reason.name}: docs/reasons.md)"
    )
    if why.reason is Reason.LAYER_UNKNOWN and not plan.request.handed_over:
        text += "; hand the model over: tmx_backend(config, model=model)"
    if text in report.notes:
        return
    # Layers of one kind have one cause: a graph for each of them is no news.
    if not any(str(why) in note for note in report.notes):
        warnings.warn(text, stacklevel=3)
    report.notes.append(text)
