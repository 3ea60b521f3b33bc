"""What users call for a graph without a compiler behind it: ``rewrite``, and ``export`` for Ascend NPUs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import GraphModule

from tmx_compile.compilers import torchair
from tmx_compile.config import TriangleMixConfig
from tmx_compile.graph.copies import copy_graph
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.passes.pipeline import Outcome, compile
from tmx_compile.passes.plan import Plan
from tmx_compile.passes.record import records
from tmx_compile.report import Report
from tmx_compile.request import AIR, PROGRAM, Request, RewriteOptions, takes

if TYPE_CHECKING:
    from typing_extensions import Unpack

Program = TypeVar("Program", GraphModule, ExportedProgram)


@takes(RewriteOptions)
def rewrite(
    program: Program,
    config: TriangleMixConfig | TriangleMixInferenceConfig,
    **options: Unpack[RewriteOptions],
) -> tuple[Program, Report]:
    """The pass by itself: a rewritten copy of a graph, and the report. The input stays as it is.

    Takes what tracing makes: an ``ExportedProgram``, its ``module()``, a graph that a ``torch.compile`` backend or
    ``make_fx`` sees. Weights are shared with the input; metadata, signature and names are kept. Call it under
    ``torch.no_grad()`` for a program that is for inference only.

    No guard is added, and nothing chooses a graph by length at run time: where the length is dynamic and its range
    reaches down to ``min_seq_len``, the site stays dense (NO_DISPATCH). "auto" takes ``blocked`` or ``operator``.

    Args:
        program: see above.
        config: which layers go sparse, and the geometry of their mask.
        lowering: as for :func:`tmx_compile.tmx_backend`.
        strict: likewise.
        assume_causal: likewise.

    Returns:
        The rewritten copy, of the kind that came in, and the report of every attention site.

    Raises:
        ValueError: bad arguments, or a graph without the shapes that tracing records.
        LoweringError: the lowering that was named cannot take a call.
        StrictModeError: with ``strict``, a site in a triangle layer that has to stay dense.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig, rewrite
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         return F.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> with torch.no_grad():
    ...     program = torch.export.export(torch.nn.Sequential(Layer(), Layer()), (torch.randn(1, 2, 300, 16),))
    ...     sparse, report = rewrite(program, TriangleMixConfig.deepest(1, num_layers=2, min_seq_len=256))
    >>> [site.decision for site in report], sparse.module()(torch.randn(1, 2, 300, 16)).shape
    (['dense', 'triangle'], torch.Size([1, 2, 300, 16]))
    """
    request = Request.of(config, **options)
    report = Report()
    if isinstance(program, ExportedProgram):
        gm, constants = program.graph_module, _constants(program)
    elif isinstance(program, GraphModule):
        gm, constants = program, {}
    else:
        raise ValueError(f"rewrite takes a torch.fx.GraphModule or a torch.export.ExportedProgram, got {program!r}")
    _check_values(gm)
    done = copy_graph(gm)
    if request.config is not None:
        outcome: Outcome = compile(gm, request, PROGRAM, constants=constants)
        report.add_graph(records(outcome.plan, 0), [*outcome.plan.notes, *_notes(outcome)])
        done = done if outcome.graph is gm else outcome.graph
    return (_exported(program, done) if isinstance(program, ExportedProgram) else done), report  # type: ignore


def _constants(program: ExportedProgram) -> dict[str, Tensor]:
    """What belongs to the program itself: its constants, and buffers that no state dict has and that it never writes.

    Other buffers may be loaded anew, and the rewritten program could not tell.
    """
    signature = program.graph_signature
    written = set(signature.buffers_to_mutate.values())
    found: dict[str, Tensor] = {}
    for spec in signature.input_specs:
        lasting = spec.kind is InputKind.BUFFER and spec.persistent is False and spec.target not in written
        value = program.constants.get(str(spec.target)) if lasting or spec.kind is InputKind.CONSTANT_TENSOR else None
        if isinstance(value, Tensor) and isinstance(spec.arg, TensorArgument):
            found[spec.arg.name] = value
    return found


def _check_values(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op == "placeholder" and not {"val", "example_value"} & set(node.meta):
            raise ValueError(
                f"rewrite needs the shapes that tracing records: node {node.name!r} has neither meta['val'] nor "
                "meta['example_value']. Trace with torch.export, make_fx or a torch.compile backend; a graph of "
                "torch.fx.symbolic_trace gets them from torch.fx.passes.fake_tensor_prop.FakeTensorProp"
            )


def _notes(outcome: Outcome) -> Iterator[str]:
    if outcome.needs:
        settings = ", ".join(f"{name}={value}" for name, value in outcome.needs.items())
        yield f"compile the rewritten graph with the Inductor settings {settings}"
    if any(item.lowering is not None and item.lowering.name == "operator" for item in outcome.plan.triangle):
        yield "the graph calls tmx::triangle_attention: a process that loads it has to import tmx_compile"


def _exported(program: ExportedProgram, gm: GraphModule) -> ExportedProgram:
    """The program with another graph of the same inputs and outputs."""
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=list(program.verifiers),
    )


def export(
    model: nn.Module,
    *args: Any,
    config: TriangleMixConfig | TriangleMixInferenceConfig,
    export_path: str | Path,
    export_name: str = "export",
    dynamic: bool = False,
    compiler_config: Any = None,
    strict: bool = Request.strict,
    assume_causal: bool = Request.assume_causal,
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
        strict: as for :func:`tmx_compile.tmx_backend`.
        assume_causal: as for :func:`tmx_compile.tmx_backend`; torchair has to convert the check of the promise.
        kwargs: example inputs by name.

    Returns:
        The report of every attention site.

    Raises:
        ValueError: bad arguments.
        ImportError: no torch_npu that loads.
        TriangleMixError: nothing was written, or CANN is too old for an operator.

    Source: ``dynamo_export`` in the manual of torchair, and ``npu_fused_infer_attention_score`` in that of torch_npu.
    What it takes can be asked without them; with CANN the last call writes ``model/export.air``:

    >>> import torch
    >>> from tmx_compile import TriangleMixConfig, export
    >>> config = TriangleMixConfig.deepest(1, num_layers=2)
    >>> export(torch.nn.Identity(), torch.zeros(1), config=config, export_path="model", export_name="a/b")
    Traceback (most recent call last):
    ...
    ValueError: export_name must be a file name without a folder, got 'a/b'
    >>> export(model, ids, config=config, export_path="model")  # doctest: +SKIP
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
    request = Request.of(
        config, strict=strict, assume_causal=assume_causal, target="ascend", compiler_config=compiler_config
    )
    torchair.check_config(compiler_config)
    report = Report()
    last: list[Plan] = []

    def rewritten(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
        if not request.sparse:
            return gm
        outcome = compile(gm, request, AIR, example_inputs)
        # Dynamo may abandon a compilation half way and start again.
        last[:] = [outcome.plan]
        return outcome.graph

    torchair.write(model, args, kwargs, rewritten, export_path, export_name, dynamic, compiler_config)
    for settled in last:
        report.add_graph(records(settled, report.graphs), settled.notes)
    return report
