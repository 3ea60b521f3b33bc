"""What users call: the backend and ``explain``. No policy is made here; ``passes/pipeline.py`` is the pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule

from tmx_compile.compilers import torchair
from tmx_compile.compilers.inductor import Compiler, Inductor
from tmx_compile.config import TriangleMixConfig
from tmx_compile.errors import LoweringError
from tmx_compile.graph.copies import copy_graph
from tmx_compile.graph.guards import RangeGuards
from tmx_compile.layers import Watch, hand_over
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.limit import RecompileLimit
from tmx_compile.lowering.context_parallel import agreed
from tmx_compile.passes import pipeline
from tmx_compile.passes.lengths import Prompt, dispatch
from tmx_compile.passes.one_row import one_row_chunk
from tmx_compile.passes.plan import Plan
from tmx_compile.passes.record import records
from tmx_compile.passes.stand_in import zeros_of
from tmx_compile.passes.visited import counted
from tmx_compile.proof.constants import watched
from tmx_compile.remarks import warn_if_dense, warn_of
from tmx_compile.report import Report
from tmx_compile.request import INDUCTOR, TORCHAIR, Host, Options, Request, takes
from tmx_compile.version import __version__, package_fingerprint

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TmxBackend:
    """A ``torch.compile`` backend: rewrites proven attention, then hands the graph to Inductor, or on NPUs to torchair.

    :func:`tmx_compile.tmx_backend` makes one, and tells more about the arguments, and what they raise.

    Args:
        config: which layers go sparse, and the geometry of their mask.
        model: the model that will be compiled with it.
        lowering: "auto", or the name of one.
        strict: raise where a site in a triangle layer cannot go sparse.
        assume_causal: your word about masks that only the run can tell.
        report: a report to fill.
        target: "auto", "inductor" or "ascend".
        compiler_config: torchair's.
        decode: "dense" or "streaming".
        chunked_prefill: compile for prompts that come in chunks.
        context_parallel: the processes that hold a prompt together.

    Attributes:
        request: what was asked, checked.
        report: one record per attention site of every compiled graph, in order.

    >>> from tmx_compile import TmxBackend, TriangleMixConfig
    >>> backend = TmxBackend(TriangleMixConfig.deepest(2, num_layers=4), lowering="blocked")
    >>> backend.config.layers(), len(backend.report)
    ((2, 3), 0)
    """

    @takes(Options)
    def __init__(
        self,
        config: TriangleMixConfig | TriangleMixInferenceConfig,
        *,
        model: nn.Module | None = None,
        report: Report | None = None,
        **options: Unpack[Options],
    ) -> None:
        if report is not None and not isinstance(report, Report):
            raise ValueError(f"report must be a tmx_compile.Report, got {report!r}")
        self.request = Request.of(config, **options)
        if self.request.target == "ascend":
            torchair.check_config(self.request.compiler_config)
        self.report = Report() if report is None else report
        in_use = self.request.config
        # A model that was handed over tells of each call by itself, and may be sparse in it.
        self._limit = RecompileLimit(self.report, self.request.strict and model is None)
        self._watch = Watch(self.report, 0 if in_use is None else in_use.min_seq_len, self.request.strict, self._limit)
        if model is not None and in_use is not None and in_use.dynamic_layers():
            raise ValueError(
                f"model cannot be handed over together with dynamic_layer_indices={in_use.dynamic_layer_indices}"
            )
        if model is not None and in_use is not None:
            hand_over(model, in_use, self._watch)
            self.request = replace(self.request, handed_over=True)
        warn_of(self.request, config, stacklevel=5)

    @property
    def config(self) -> TriangleMixConfig | None:
        """The effective configuration, or None where the inference configuration is disabled."""
        return self.request.config

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph; called by Dynamo.

        Args:
            gm: the graph, as Dynamo captures it.
            example_inputs: a value for each placeholder, fake or real.
            mode: as in ``torch.compile``; for Inductor.
            options: likewise; for Inductor and torchair.

        Returns:
            What computes the graph: called with the inputs, it returns a tuple of the outputs.

        Raises:
            LoweringError: the lowering that was named cannot take a call.
            StrictModeError: with ``strict``, a site in a triangle layer has to stay dense.
        """
        host = self._host(gm, example_inputs)
        compiler: Compiler = (
            torchair.Torchair(self.request.compiler_config, mode, options)
            if host is TORCHAIR
            else Inductor(mode, options or {})
        )
        if not self.request.sparse and self.request.context_parallel is None:
            return compiler.compile(gm, example_inputs)
        self._limit.compiling()
        chunked = self.request.chunked_prefill
        one_row = one_row_chunk(gm, self.request, host, example_inputs) if chunked else None
        compiled, plan = self._compile(gm, host, compiler, example_inputs)
        # Only now: Dynamo may abandon a compilation half way and start again.
        self.report.add_graph(records(plan, self.report.graphs), plan.notes, plan.visited)
        compiled = self._watch.compiled(compiled, [item.layer for item in plan.sites])
        warn_if_dense(plan, self.report)
        return compiled if one_row is None else one_row.beside(compiled)

    def allow_uncompiled(self) -> None:
        """Say nothing more (and raise nothing, if strict) where the model that was handed over runs uncompiled.

        For calls that are meant to: a dense baseline, say.

        >>> from tmx_compile import TriangleMixConfig, tmx_backend
        >>> tmx_backend(TriangleMixConfig.deepest(1, num_layers=2)).allow_uncompiled()  # nothing handed over: no effect
        """
        self._watch.off = self._limit.off = True

    def __deepcopy__(self, memo: dict[int, Any]) -> TmxBackend:
        # generate copies its settings and the backend in them: what it compiles is still this one's.
        return self

    def _compile(
        self, gm: GraphModule, host: Host, compiler: Compiler, example_inputs: Sequence[Any]
    ) -> tuple[Callable[..., Any], Plan]:
        # Both forms are compiled now and not each at its first call: compiling asks about lengths, and an answer is a
        # guard only until Dynamo has collected the graph's. When the graph runs, nothing would check the next length.
        plan = pipeline.decide(gm, self.request, host, example_inputs)
        if plan.as_given:
            return compiler.compile(gm, example_inputs), plan
        if plan.fixed_length is not None:
            return self._compile_range(plan, gm, compiler, example_inputs)
        if plan.length is None:
            return self._compile_long(plan, gm, compiler, example_inputs)
        long, done = self._compile_long(plan, gm, compiler, example_inputs)
        return self._beside_short(plan, gm, compiler, example_inputs, long), done

    def _beside_short(
        self, plan: Plan, gm: GraphModule, compiler: Compiler, example_inputs: Sequence[Any], long: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The form for long prompts, and beside it, compiled after it, the graph as it is for short ones."""
        assert plan.length is not None
        guards = RangeGuards(plan.length.symbolic, up_to=plan.limit)
        # Under our key: a cached graph brings the guards of the one who compiled it, such as a bound on the length.
        with _cache_tag(plan.config):
            short = compiler.compile(gm, example_inputs)
        guards.drop_held()
        return dispatch(plan.length, plan.limit, short, long)

    def _compile_long(
        self, plan: Plan, gm: GraphModule, compiler: Compiler, example_inputs: Sequence[Any]
    ) -> tuple[Callable[..., Any], Plan]:
        outcome, split = pipeline.rewrite(plan, gm), self.request.context_parallel
        # Before compiling, which may learn more of the lengths than the rewrite knew.
        described = outcome.plan.described() if split is not None and plan.sites else None
        # Whose attention is of a piece, if the prompt is split.
        right = not self.request.strict and split is None
        as_written = copy_graph(gm).forward if plan.known and right else None
        with _cache_tag(plan.config):
            compiled = compiler.compile(outcome.graph, example_inputs, outcome.needs)
        if outcome.plan.visited is not None:
            compiled = counted(compiled, outcome.plan.visited)
        if described is not None:
            compiled = agreed(compiled, split, *described)
        # Here, so that no form of a graph is run without asking for what its own proofs rest on.
        return watched(compiled, plan.known, as_written), outcome.plan

    def _compile_range(
        self, plan: Plan, gm: GraphModule, compiler: Compiler, example_inputs: Sequence[Any]
    ) -> tuple[Callable[..., Any], Plan]:
        """Compile for a range of lengths that the user fixed: no guard may be left, and both sides may be needed."""
        assert plan.fixed_length is not None
        guards = RangeGuards(plan.fixed_length, above=plan.limit)

        def attempt(request: Request) -> tuple[tuple[Callable[..., Any], Plan], str]:
            again = request is not self.request
            if again:
                guards.forget()
            decided = pipeline.decide(gm, request, plan.host, example_inputs) if again else plan
            return self._compile_long(decided, gm, compiler, example_inputs), guards.settle()

        (long, done), _ = pipeline.retried(attempt, self.request, plan.host, "the fixed range of lengths forbids")
        if plan.prompt is not Prompt.BOTH:
            return long, done
        return self._beside_short(plan, gm, compiler, example_inputs, long), done

    def explain(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """Report what compiling one graph would make of it; compiles nothing. :func:`tmx_compile.explain` calls it.

        Args:
            gm: the graph, as Dynamo captures it.
            example_inputs: a value for each placeholder, fake or real.

        Raises:
            LoweringError: as compiling would raise it.
        """
        host = self._host(gm, example_inputs)
        if self.request.config is None:
            return
        plan = pipeline.explain(gm, self.request, host, example_inputs)
        self.report.add_graph(records(plan, self.report.graphs), plan.notes)

    def _host(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Host:
        request = self.request
        ascend = request.target == "ascend" or (request.target == "auto" and torchair.on_npu(gm, example_inputs))
        if request.lowering == "ascend" and not ascend:
            raise LoweringError("lowering 'ascend' is for NPUs, and this graph's tensors are on none (target='ascend')")
        if ascend and (request.chunked_prefill or request.decode != "dense" or request.context_parallel is not None):
            raise LoweringError("on NPUs there is neither streaming decode nor chunked prefill nor a split prompt")
        return TORCHAIR if ascend else INDUCTOR

    def __repr__(self) -> str:
        return f"tmx_backend({self.config!r}, {self.request})"


@takes(Options)
def tmx_backend(
    config: TriangleMixConfig | TriangleMixInferenceConfig,
    *,
    model: nn.Module | None = None,
    report: Report | None = None,
    **options: Unpack[Options],
) -> TmxBackend:
    """A backend for ``torch.compile(model, backend=tmx_backend(config))``.

    The mask is that of TriangleMix (arXiv 2507.21526). ``torch.compile(model, backend="tmx", options={"tmx_config":
    config})`` is the same by name, with every argument below as an option ``tmx_...``.

    Args:
        config: which layers go sparse, and the geometry of their mask.
        lowering: "auto" picks by a measured rule; a name ("triton", "flex", "blocked", "ascend", "operator" or
            "reference") takes that one or raises :class:`tmx_compile.LoweringError`.
        strict: raise :class:`tmx_compile.StrictModeError` where a site in a triangle layer cannot go sparse.
        assume_causal: your word that a mask which only the run can tell (a 4-D mask handed to the model) is causal
            and-ed with a padding mask, and that row positions handed to the model are consecutive. It is checked when
            the compiled model runs: a broken promise raises ``ValueError`` (on an accelerator, a device assertion).
        model: the model that will be compiled with it, or the decoder inside. Each of its attention modules then
            carries what it is to be: layers compiled one by one, behind hooks or after graph breaks are placed, by two
            kinds of graphs and not one a layer, and a triangle layer that runs uncompiled on a long prompt warns (or
            raises, if strict) until :meth:`TmxBackend.allow_uncompiled`. If the model runs under
            ``register_attention`` too, such a call is sparse. Without it a layer is known by its path in a whole graph.
        report: a report to fill; a new one by default, found as ``backend.report``.
        target: what compiles the graphs. "inductor"; "ascend", torchair; "auto" takes torchair for graphs on an NPU.
        compiler_config: a ``torchair.CompilerConfig`` for "ascend" (``mode``: GE graphs by default, or "npugraph_ex").
        decode: what triangle layers do in a call with one row: "dense" leaves it as it is; "streaming" attends to sinks
            and window only. The cache still holds every key: for one that does not, see
            :class:`tmx_compile.integrations.transformers.StreamingCache`.
        chunked_prefill: compile for prompts that come in chunks, announced by :func:`tmx_compile.prefill`: the same
            outputs as in one pass, for chunks and prompts of any length without a compilation for each. Inference only;
            the lowering is "auto", "triton", "blocked" or "operator".
        context_parallel: a ``torch.distributed.DeviceMesh`` of one dimension, whose processes hold one prompt together,
            in pieces of one length, in order; each gets all tokens that follow it. Every attention call is rewritten,
            or compiling raises :class:`tmx_compile.LoweringError`. Inference only, by Inductor. ``min_seq_len`` is that
            of the prompt.

    Raises:
        ValueError: an argument of the wrong kind or value, or two that contradict each other, naming them.
        ImportError: target "ascend" without a torch_npu that loads.

    Warns:
        UserWarning: the configuration selects no layer, or the first n layers; what ``decode="streaming"`` costs.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig, explain, tmx_backend
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         return F.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> model = torch.nn.Sequential(Layer(), Layer())
    >>> config = TriangleMixConfig.deepest(1, num_layers=2, min_seq_len=256)
    >>> backend = tmx_backend(config)
    >>> compiled = torch.compile(model, backend=backend)  # compiles in its first call, and fills backend.report
    >>> report = explain(model, torch.randn(1, 2, 300, 16), config=config)  # the same report, without compiling
    >>> [(site.layer, site.decision) for site in report]
    [(0, 'dense'), (1, 'triangle')]
    """
    return TmxBackend(config, model=model, report=report, **options)


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
    known = tuple(f"tmx_{name}" for name in ("config", "report", *Options.__annotations__))
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
    backend = TmxBackend(config, **{name.removeprefix("tmx_"): value for name, value in ours.items()})
    theirs = {name: value for name, value in (options or {}).items() if not name.startswith("tmx_")}
    return backend(gm, example_inputs, mode=mode, options=theirs)


def explain(
    model: Callable[..., Any],
    *args: Any,
    config: TriangleMixConfig | TriangleMixInferenceConfig,
    **kwargs: Any,
) -> Report:
    """The report for one call of ``model(*args, **kwargs)``, without running it.

    Dynamo traces the call; wherever a graph would run, zeros of the right shapes stand in for its results. No kernel
    of the model runs and nothing is compiled. A cache among the arguments is given such zeros too: pass a copy of it.
    The keyword arguments of :func:`tmx_backend` are taken here too, and the report is what that backend would come to;
    all others go to the model.

    Args:
        model: what ``torch.compile`` takes: a module or a function.
        args: its arguments. Only their shapes, dtypes and devices matter.
        config: which layers go sparse, and the geometry of their mask.
        kwargs: its keyword arguments, and the backend's.

    Raises:
        ValueError: bad arguments, or a result whose shape is known only by running.
        ImportError: target "ascend" without a torch_npu that loads.
        LoweringError: as the backend would raise it.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig, explain
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         return F.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> model = torch.nn.Sequential(Layer(), Layer())
    >>> config = TriangleMixConfig.deepest(1, num_layers=2, min_seq_len=256)
    >>> for site in explain(model, torch.randn(1, 2, 300, 16), config=config):
    ...     print(site.layer, site.decision, site.reason or site.lowering)
    0 dense NOT_SELECTED
    1 triangle blocked
    """
    options = {name: kwargs.pop(name) for name in Options.__annotations__ if name in kwargs}
    backend = TmxBackend(config, **options)

    def trace_only(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        backend.explain(gm, example_inputs)
        return zeros_of(gm)

    # A compile per call of explain is meant; it must not use up the user's recompiles.
    with torch._dynamo.config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31):
        torch.compile(model, backend=trace_only, dynamic=False)(*args, **kwargs)
    return backend.report


@contextlib.contextmanager
def _cache_tag(config: TriangleMixConfig) -> Iterator[None]:
    """Make this package's sources and the configuration part of every compile cache key, beside the user's own tag."""
    own = f"tmx:{__version__}:{package_fingerprint()[:16]}:{config.fingerprint()[:16]}"
    tag = torch.compiler.config.cache_key_tag
    with torch.compiler.config.patch(cache_key_tag=f"{tag}|{own}" if tag else own):  # type: ignore[attr-defined]
        yield
