"""What users call: the backend, ``explain`` and ``rewrite``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from tmx_compile.compilers import torchair as npu
from tmx_compile.config import TriangleMixConfig
from tmx_compile.config.prices import streaming_message
from tmx_compile.errors import LoweringError
from tmx_compile.graph.copies import copy_graph
from tmx_compile.graph.nodes import value_of
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.lowering.table import ASCEND, CHOICES, CHUNK_CHOICES, INDUCTOR, TARGETS
from tmx_compile.passes.lengths import Prompt, dispatch, hint
from tmx_compile.passes.one_row import one_row_chunk
from tmx_compile.passes.pipeline import GraphPlan, Options, plan_graph, rewrite_graph
from tmx_compile.passes.program import Program, rewrite_program
from tmx_compile.passes.range_guards import RangeGuards
from tmx_compile.passes.record import records
from tmx_compile.proof.constants import watched
from tmx_compile.report import Report
from tmx_compile.version import __version__, package_fingerprint

# SmolLM2-135M, the last tokens of prompts of 4,096: benchmarks/results/quality_cuda.json, docs/quality.md.
_FIRST_N_WARNING = (
    "num_triangle_layers={n} makes the first {n} layers sparse, which is the worst choice: on SmolLM2-135M (9 of 30 "
    "layers, 4/32/64) it costs {first:.0%} perplexity, the deepest 9 layers {deepest:.1%}. "
    "Use TriangleMixConfig.deepest({n}, num_layers=...) or triangle_layer_indices."
)
_FIRST_N_COST = {"first": 0.284, "deepest": 0.012}
_ANALYSIS_WARNING = (
    "use_gradient_analysis asks for layers chosen by gradients, and none are chosen yet: run "
    "tmx_compile.calibrate(model, batches, config=config) and compile with its .apply(config)"
)


class TmxBackend:
    """A ``torch.compile`` backend: rewrites proven attention, then hands the graph to Inductor, or on NPUs to torchair.

    Attributes:
        report: one record per attention site of every compiled graph, in order.
        config: the effective configuration, or None where the inference configuration is disabled.
    """

    def __init__(
        self,
        config: TriangleMixConfig | TriangleMixInferenceConfig,
        *,
        lowering: str = "auto",
        strict: bool = False,
        assume_causal: bool = False,
        report: Report | None = None,
        target: str = "auto",
        compiler_config: Any = None,
        decode: str = "dense",
        chunked_prefill: bool = False,
    ) -> None:
        self.config = _effective(config)
        if lowering not in CHOICES:
            raise ValueError(f"lowering must be one of {', '.join(CHOICES)}, got {lowering!r}")
        npu_allowed = not isinstance(config, TriangleMixInferenceConfig) or config.use_npu_optimization
        if not npu_allowed and (target == ASCEND.name or compiler_config is not None):
            raise ValueError(
                f"config has use_npu_optimization=False, and target is {target!r}, compiler_config {compiler_config!r}"
            )
        if target == ASCEND.name and (decode != "dense" or chunked_prefill):
            raise ValueError(
                f"target 'ascend' takes neither streaming decode nor chunked prefill yet, got decode={decode!r}, "
                f"chunked_prefill={chunked_prefill!r}"
            )
        _check_target(target, lowering, compiler_config)
        flags = (("strict", strict), ("assume_causal", assume_causal), ("chunked_prefill", chunked_prefill))
        for name, value in flags:
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if report is not None and not isinstance(report, Report):
            raise ValueError(f"report must be a tmx_compile.Report, got {report!r}")
        if decode not in ("dense", "streaming"):
            raise ValueError(f"decode must be 'dense' or 'streaming', got {decode!r}")
        if chunked_prefill and lowering not in CHUNK_CHOICES:
            raise ValueError(f"chunked_prefill takes a lowering of {', '.join(CHUNK_CHOICES)}, got {lowering!r}")
        self.decode = decode
        self.chunked_prefill = chunked_prefill
        self.lowering = lowering
        self.strict = strict
        self.assume_causal = assume_causal
        self.report = Report() if report is None else report
        self.target = target if npu_allowed else INDUCTOR
        self.compiler_config = compiler_config
        if self.config is not None:
            _warn(self.config)
            if decode == "streaming" and self.config.layers():
                warnings.warn(streaming_message(len(self.config.layers()), None, self.config), stacklevel=3)
        if _lacks_analysis(config):
            warnings.warn(_ANALYSIS_WARNING, stacklevel=3)

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph; called by Dynamo. ``mode`` and ``options`` go to Inductor, ``options`` to torchair too."""
        target = self._target_of(gm, example_inputs)
        compiler: _Compiler = (
            npu.Torchair(self.compiler_config, mode, options)
            if target == ASCEND.name
            else _Inductor(mode, options or {})
        )
        if self.config is None or not self.config.layers():
            return compiler.compile(gm, example_inputs)
        wanted = self._options(target)
        one_row = one_row_chunk(gm, wanted, example_inputs) if self.chunked_prefill else None
        plan = plan_graph(gm, wanted, example_inputs)
        if plan.prompt is Prompt.SHORT:
            compiled, done = compiler.compile(gm, example_inputs), plan
        elif plan.fixed_length is None:
            compiled, done = self._compile_long(plan, compiler, example_inputs)
        else:
            compiled, done = self._compile_range(plan, compiler, example_inputs)
        # Only now: Dynamo may abandon a compilation half way and start again.
        self.report.add_graph(records(done, self.report.graphs), plan.notes)
        if one_row is not None:
            compiled = one_row.beside(compiled)
        return compiled

    def _explain(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """Report what compiling one graph would make of it; compiles nothing, and changes the graph."""
        target = self._target_of(gm, example_inputs)
        if self.config is None:
            return
        plan = plan_graph(gm, self._options(target), example_inputs)
        done = plan if plan.prompt is Prompt.SHORT else rewrite_graph(plan).plan
        self.report.add_graph(records(done, self.report.graphs), plan.notes)

    def _options(self, target: str) -> Options:
        assert self.config is not None
        return Options(
            self.config,
            self.lowering,
            self.strict,
            self.assume_causal,
            self.decode,
            self.chunked_prefill,
            target=target,
        )

    def _target_of(self, gm: GraphModule, example_inputs: Sequence[Any]) -> str:
        target = self.target
        if target == "auto":
            target = ASCEND.name if npu.on_npu(gm, example_inputs) else INDUCTOR
        if self.lowering == ASCEND.name and target != ASCEND.name:
            raise LoweringError("lowering 'ascend' is for NPUs, and this graph's tensors are on none (target='ascend')")
        if target == ASCEND.name and (self.chunked_prefill or self.decode != "dense"):
            raise LoweringError(
                "tensors are on an NPU, for which there is neither streaming decode nor chunked prefill yet"
            )
        return target

    def _compile_long(
        self, plan: GraphPlan, compiler: _Compiler, example_inputs: Sequence[Any]
    ) -> tuple[Callable[..., Any], GraphPlan]:
        assert self.config is not None
        assert plan.source is not None
        as_written = copy_graph(plan.source).forward if plan.known and not self.strict else None
        rewritten = rewrite_graph(plan)
        with _cache_tag(self.config):
            compiled = compiler.compile(rewritten.gm, example_inputs, rewritten.inductor_options)
        # Here, so that no form of a graph is run without asking for what its own proofs rest on.
        return watched(compiled, rewritten.plan.known, as_written), rewritten.plan

    def _compile_range(
        self, plan: GraphPlan, compiler: _Compiler, example_inputs: Sequence[Any]
    ) -> tuple[Callable[..., Any], GraphPlan]:
        """Compile for a range of lengths that the user fixed: no guard may be left, and both sides may be needed."""
        assert self.config is not None
        assert plan.fixed_length is not None
        assert plan.source is not None
        short_gm = copy_graph(plan.source) if plan.prompt is Prompt.BOTH else None
        spare = copy_graph(plan.source)
        limit = plan.limit
        guards = RangeGuards(plan.fixed_length, above=limit)
        long, done = self._compile_long(plan, compiler, example_inputs)
        failed = guards.settle()
        if failed:
            name = ASCEND.name if plan.options.target == ASCEND.name else self.lowering
            if name not in ("auto", "operator"):
                raise LoweringError(f"lowering {name!r} needs {failed}, which the fixed range of lengths forbids")
            # The operator itself guards on nothing.
            guards.forget()
            again = plan_graph(spare, replace(plan.options, lowering="operator"), example_inputs)
            long, done = self._compile_long(again, compiler, example_inputs)
        if short_gm is None:
            return long, done
        assert plan.length is not None
        # Even Inductor's own graph may bring guards: its cache may hold it with those of another context.
        guards = RangeGuards(plan.fixed_length, up_to=limit)
        short = compiler.compile(short_gm, example_inputs)
        guards.settle()
        return dispatch(plan.length, limit, short, long), done

    def __repr__(self) -> str:
        options = f"lowering={self.lowering!r}, strict={self.strict}, assume_causal={self.assume_causal}"
        options += ", chunked_prefill=True" if self.chunked_prefill else ""
        options += "" if self.decode == "dense" else f", decode={self.decode!r}"
        return f"tmx_backend({self.config!r}, {options})"


def tmx_backend(
    config: TriangleMixConfig | TriangleMixInferenceConfig,
    *,
    lowering: str = "auto",
    strict: bool = False,
    assume_causal: bool = False,
    report: Report | None = None,
    target: str = "auto",
    compiler_config: Any = None,
    decode: str = "dense",
    chunked_prefill: bool = False,
) -> TmxBackend:
    """A backend for ``torch.compile(model, backend=tmx_backend(config))``.

    Args:
        config: which layers go sparse, and the geometry of their mask.
        lowering: "auto" picks by a measured rule; a name ("flex", "blocked", "operator", "reference") takes that one
            or raises :class:`~tmx_compile.errors.LoweringError`.
        strict: raise :class:`~tmx_compile.errors.StrictModeError` where a site in a triangle layer cannot go sparse.
        assume_causal: your word that a mask which only the run can tell (a 4-D mask handed to the model) is causal
            and-ed with a padding mask, and that row positions handed to the model are consecutive. It is checked when
            the compiled model runs: a broken promise raises ``ValueError`` (on an accelerator, a device assertion).
        report: a report to fill; a new one by default, found as ``backend.report``.
        target: what compiles the graphs. "inductor"; "ascend", torchair; "auto" takes torchair for graphs on an NPU.
        compiler_config: a ``torchair.CompilerConfig`` for the target "ascend" (its ``mode`` chooses GE graphs, the
            default, or "npugraph_ex").
        decode: what triangle layers do in a call with one row: "dense" leaves it as it is; "streaming" attends to sinks
            and window only. The cache still holds every key: see ``integrations.transformers.StreamingCache``.
        chunked_prefill: compile for prompts that come in chunks, announced by :func:`tmx_compile.prefill`: the same
            outputs as in one pass, for chunks and prompts of any length without a compilation for each. Inference only;
            the lowering is "auto", "triton", "blocked" or "operator".

    Raises:
        ValueError: an argument of the wrong kind or value, or two that contradict each other, naming them.
        ImportError: target "ascend" without a torch_npu that loads.

    Warns:
        UserWarning: the configuration selects no layer, or the first n layers; what ``decode="streaming"`` costs.
    """
    return TmxBackend(
        config,
        lowering=lowering,
        strict=strict,
        assume_causal=assume_causal,
        report=report,
        target=target,
        compiler_config=compiler_config,
        decode=decode,
        chunked_prefill=chunked_prefill,
    )


def tmx(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend by name: ``torch.compile(model, backend="tmx", options={"tmx_config": cfg, ...})``.

    Options that start with ``tmx_`` are arguments of :func:`tmx_backend` (``tmx_config`` may be a mapping of
    ``TriangleMixConfig``'s parameters); the others go to Inductor.
    """
    names = ("config", "lowering", "strict", "assume_causal", "report", "target", "compiler_config", "decode")
    known = tuple(f"tmx_{name}" for name in (*names, "chunked_prefill"))
    ours = {name: value for name, value in (options or {}).items() if name.startswith("tmx_")}
    for name in ours:
        if name not in known:
            raise ValueError(f"unknown option {name!r}; the options of this backend are {', '.join(known)}")
    config = ours.pop("tmx_config", None)
    if config is None:
        raise ValueError("backend 'tmx' needs options={'tmx_config': TriangleMixConfig(...)}")
    if isinstance(config, Mapping):
        try:
            config = TriangleMixConfig(**config)
        except TypeError as error:
            raise ValueError(f"tmx_config: {error}") from None
    backend = tmx_backend(config, **{name.removeprefix("tmx_"): value for name, value in ours.items()})
    theirs = {name: value for name, value in (options or {}).items() if not name.startswith("tmx_")}
    return backend(gm, example_inputs, mode=mode, options=theirs)


def explain(
    model: Callable[..., Any],
    *args: Any,
    config: TriangleMixConfig | TriangleMixInferenceConfig,
    lowering: str = "auto",
    strict: bool = False,
    assume_causal: bool = False,
    decode: str = "dense",
    chunked_prefill: bool = False,
    target: str = "auto",
    **kwargs: Any,
) -> Report:
    """The report for one call of ``model(*args, **kwargs)``, without running it.

    Dynamo traces the call; wherever a graph would run, zeros of the right shapes stand in for its results. No kernel
    of the model runs and nothing is compiled. A cache among the arguments is given such zeros too: pass a copy of it.
    ``lowering``, ``strict``, ``assume_causal``, ``decode``, ``chunked_prefill`` and ``target`` are those of
    :func:`tmx_backend`, and the report is what that backend would come to.

    Raises:
        ValueError: bad arguments, or a result whose shape is known only by running.
        ImportError: target "ascend" without a torch_npu that loads.
        LoweringError: as the backend would raise it.
    """
    backend = TmxBackend(
        config,
        lowering=lowering,
        strict=strict,
        assume_causal=assume_causal,
        decode=decode,
        chunked_prefill=chunked_prefill,
        target=target,
    )

    def trace_only(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        backend._explain(gm, example_inputs)
        return _zeros_of(gm)

    # A compile per call of explain is meant; it must not use up the user's recompiles.
    with torch._dynamo.config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31):
        torch.compile(model, backend=trace_only, dynamic=False)(*args, **kwargs)
    return backend.report


def rewrite(
    program: Program,
    config: TriangleMixConfig | TriangleMixInferenceConfig,
    *,
    lowering: str = "auto",
    strict: bool = False,
    assume_causal: bool = False,
) -> tuple[Program, Report]:
    """The pass by itself: a rewritten copy of a graph, and the report. The input stays as it is.

    Takes what tracing makes: an ``ExportedProgram``, its ``module()``, a graph that a ``torch.compile`` backend or
    ``make_fx`` sees. Weights are shared with the input; metadata, signature and names are kept. Call it under
    ``torch.no_grad()`` for a program that is for inference only.

    No guard is added, and nothing chooses a graph by length at run time: where the length is dynamic and its range
    reaches down to ``min_seq_len``, the site stays dense (NO_DISPATCH). "auto" takes ``blocked`` or ``operator``.

    Raises:
        ValueError: bad arguments, or a graph without the shapes that tracing records.
        LoweringError: the lowering that was named cannot take a call.
        StrictModeError: with ``strict``, a site in a triangle layer that has to stay dense.
    """
    backend = TmxBackend(config, lowering=lowering, strict=strict, assume_causal=assume_causal)
    options = Options(backend.config or TriangleMixConfig(), lowering, strict, assume_causal)
    done, plan = rewrite_program(program, options)
    if backend.config is not None:
        backend.report.add_graph(records(plan, 0), plan.notes)
    return done, backend.report


class _Compiler(Protocol):
    """What turns a graph into code: Inductor or torchair."""

    def compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], needed: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """The compiled graph."""


class _Inductor:
    """Inductor with the user's mode and options."""

    def __init__(self, mode: str | None, options: Mapping[str, Any]) -> None:
        self._patches: dict[str, Any] = {}
        if mode is not None and mode != "default":
            self._patches.update(torch._inductor.list_mode_options(mode))
        self._patches.update({name.replace("-", "_"): value for name, value in options.items()})

    def compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], needed: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """Compile with the user's settings, over which a lowering's needs win (it could not compile without)."""
        from torch._inductor.compile_fx import compile_fx

        patches = {**self._patches, **(needed or {})}
        compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs), config_patches=patches or None)
        return compiled


@contextlib.contextmanager
def _cache_tag(config: TriangleMixConfig) -> Iterator[None]:
    """Make this package's sources and the configuration part of every compile cache key, beside the user's own tag."""
    own = f"tmx:{__version__}:{package_fingerprint()[:16]}:{config.fingerprint()[:16]}"
    tag = torch.compiler.config.cache_key_tag
    with torch.compiler.config.patch(cache_key_tag=f"{tag}|{own}" if tag else own):  # type: ignore[attr-defined]
        yield


def _check_target(target: str, lowering: str, compiler_config: Any) -> None:
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if target == INDUCTOR and compiler_config is not None:
        raise ValueError(f"compiler_config is torchair's, and target is {target!r}: give target='ascend'")
    if target == INDUCTOR and lowering == ASCEND.name:
        raise ValueError(f"lowering 'ascend' is compiled by torchair, and target is {target!r}: give target='ascend'")
    if target != ASCEND.name:
        return
    if lowering not in ("auto", ASCEND.name):
        raise ValueError(f"lowering {lowering!r} is not for torchair: with target='ascend' it is 'auto' or 'ascend'")
    torchair = npu.load()
    if compiler_config is not None and not isinstance(compiler_config, torchair.CompilerConfig):
        raise ValueError(f"compiler_config must be a torchair.CompilerConfig, got {compiler_config!r}")


def _effective(config: TriangleMixConfig | TriangleMixInferenceConfig) -> TriangleMixConfig | None:
    if isinstance(config, TriangleMixInferenceConfig):
        return config.to_trianglemix_config()
    if not isinstance(config, TriangleMixConfig):
        raise ValueError(f"config must be a TriangleMixConfig or TriangleMixInferenceConfig, got {config!r}")
    return config


def _lacks_analysis(config: TriangleMixConfig | TriangleMixInferenceConfig) -> bool:
    if not isinstance(config, TriangleMixInferenceConfig):
        return False
    return config.enable_trianglemix and config.use_gradient_analysis and not config.triangle_layer_indices


def _warn(config: TriangleMixConfig) -> None:
    if not config.layers():
        warnings.warn("the configuration selects no layer: every layer stays dense", stacklevel=4)
    elif config.uses_first_n:
        text = _FIRST_N_WARNING.format(n=config.num_triangle_layers, **_FIRST_N_COST)
        warnings.warn(text, stacklevel=4)


def _zeros_of(gm: GraphModule) -> Callable[..., Any]:
    """A stand-in for a compiled graph: its inputs where it returns them, else zeros that take no memory."""
    placeholders = {node: i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    outputs = gm.graph.output_node().args[0]

    def run(*args: Any) -> Any:
        def result(node: torch.fx.Node) -> Any:
            if node in placeholders:
                return args[placeholders[node]]
            value = value_of(node)
            if not isinstance(value, torch.Tensor):
                return hint(value) if isinstance(value, torch.SymInt) else value
            if any(isinstance(size, torch.SymInt) and not size.node.has_hint() for size in value.shape):
                raise ValueError(f"explain cannot tell the shape of {node.name} without running the model")
            shape = [hint(size) for size in value.shape]
            return torch.zeros((), dtype=value.dtype, device=value.device).expand(shape)

        return torch.fx.node.map_arg(outputs, result)

    return run
