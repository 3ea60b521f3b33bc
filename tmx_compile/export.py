"""``export``: a model with TriangleMix inside, for offline use on Ascend NPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.fx import GraphModule

from tmx_compile.backend import TmxBackend
from tmx_compile.compilers import torchair as npu
from tmx_compile.config import TriangleMixConfig
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.lowering.table import ASCEND
from tmx_compile.passes.pipeline import GraphPlan, Options, plan_graph, rewrite_graph
from tmx_compile.passes.record import records
from tmx_compile.report import Report


def export(
    model: nn.Module,
    *args: Any,
    config: TriangleMixConfig | TriangleMixInferenceConfig,
    export_path: str | Path,
    export_name: str = "export",
    dynamic: bool = False,
    compiler_config: Any = None,
    strict: bool = False,
    assume_causal: bool = False,
    **kwargs: Any,
) -> Report:
    """Write a model for offline use on Ascend NPUs, with TriangleMix inside: what ``torchair.dynamo_export`` writes.

    The folder ``export_path`` gets ``<export_name>.air``, ``dynamo.pbtxt`` and whatever else torchair puts there. No
    NPU is needed to export; CANN is. The model has to be in float16 or bfloat16.

    With ``dynamic`` sizes that may vary do, and the one graph is right for every length: an ``.air`` carries no guard,
    so it attends prompts of at most ``min_seq_len`` tokens densely by itself.

    Args:
        model: called as ``model(*args, **kwargs)``, once, in inference mode.
        args: example inputs.
        config: which layers go sparse, and the geometry of their mask.
        export_path: the folder, created where it is missing.
        export_name: the name of the file, without ``.air``.
        dynamic: as in ``torch.compile``.
        compiler_config: a ``torchair.CompilerConfig`` to start from; it is not changed.
        strict: as for :func:`tmx_backend`.
        assume_causal: as for :func:`tmx_backend`; its check of the promise has to be convertible by torchair.
        kwargs: example inputs by name.

    Returns:
        The report of every attention site.

    Raises:
        ValueError: bad arguments.
        ImportError: no torch_npu that loads.
        TriangleMixError: nothing was written, or CANN is too old for an operator.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {model!r}")
    if not isinstance(dynamic, bool):
        raise ValueError(f"dynamic must be True or False, got {dynamic!r}")
    if not isinstance(export_name, str) or not export_name or Path(export_name).name != export_name:
        raise ValueError(f"export_name must be a file name without a folder, got {export_name!r}")
    # torchair follows no symbolic link, and would write nothing.
    for path in (Path(export_path), Path(export_path) / f"{export_name}.air"):
        if path.is_symlink():
            raise ValueError(f"export_path must not lead through a symbolic link, and {path} is one")
    backend = TmxBackend(
        config, strict=strict, assume_causal=assume_causal, target=ASCEND.name, compiler_config=compiler_config
    )

    last: list[GraphPlan] = []

    def rewritten(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
        if backend.config is None or not backend.config.layers():
            return gm
        asked = Options(
            backend.config, "auto", strict, assume_causal, standalone=True, target=ASCEND.name, every_length=True
        )
        plan = plan_graph(gm, asked, example_inputs)
        done = rewrite_graph(plan) if plan.triangle else None
        # Dynamo may abandon a compilation half way and start again.
        last[:] = [plan if done is None else done.plan]
        return gm if done is None else done.gm

    npu.write(model, args, kwargs, rewritten, export_path, export_name, dynamic, compiler_config)
    for settled in last:
        backend.report.add_graph(records(settled, backend.report.graphs), settled.notes)
    return backend.report
