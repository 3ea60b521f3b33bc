"""The pass for a graph by itself: a GraphModule or an ExportedProgram in, one of the same kind out.

Nothing will check a guard for such a graph, and nothing will choose between two graphs: what comes out is right for
every length that goes in, or the site stays dense. A graph of ``aten`` operators stays one: what the pass inserted is
traced into them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from tmx_compile.errors import LoweringError, VerificationError
from tmx_compile.graph import nodes
from tmx_compile.graph.erase import erase_dead
from tmx_compile.graph.layout import NAME
from tmx_compile.graph.nodes import INSERTED, op_name, value_of
from tmx_compile.passes.always import no_guard_added
from tmx_compile.passes.pipeline import GraphPlan, Options, Rewritten, plan_graph, rewrite_graph

Program = TypeVar("Program", GraphModule, ExportedProgram)


def rewrite_program(program: Program, options: Options) -> tuple[Program, GraphPlan]:
    """A rewritten copy, and what became of each site. Parameters are shared with the input, which stays as it is.

    Raises:
        ValueError: not a graph, or one without example values.
        LoweringError: the lowering that the user named cannot take a call for every length.
        StrictModeError: see :class:`~tmx_compile.passes.pipeline.Options`.
    """
    options = replace(options, standalone=True)
    if isinstance(program, ExportedProgram):
        gm, plan = _rewrite(program.graph_module, options, _constants(program))
        return _exported(program, gm), plan  # type: ignore[return-value]
    if not isinstance(program, GraphModule):
        raise ValueError(f"rewrite takes a torch.fx.GraphModule or a torch.export.ExportedProgram, got {program!r}")
    return _rewrite(program, options)


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


def _rewrite(
    source: GraphModule, options: Options, constants: Mapping[str, Tensor] | None = None
) -> tuple[GraphModule, GraphPlan]:
    _check_values(source)
    plan = _plan(source, options, constants)
    if not plan.triangle:
        return plan.source or plan.gm, plan
    rewritten, failed = _attempt(plan)
    if failed and options.lowering not in ("auto", "operator"):
        raise LoweringError(f"lowering {options.lowering!r} needs {failed}, which cannot be shown for every length")
    if failed:
        rewritten, failed = _attempt(_plan(source, replace(options, lowering="operator"), constants))
    if failed:
        raise VerificationError(f"the rewritten graph needs {failed}, which cannot be shown for every length")
    notes = _notes(rewritten)
    return rewritten.gm, replace(rewritten.plan, notes=[*rewritten.plan.notes, *notes])


def _check_values(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op == "placeholder" and not {"val", "example_value"} & set(node.meta):
            raise ValueError(
                f"rewrite needs the shapes that tracing records: node {node.name!r} has neither meta['val'] nor "
                "meta['example_value']. Trace with torch.export, make_fx or a torch.compile backend; a graph of "
                "torch.fx.symbolic_trace gets them from torch.fx.passes.fake_tensor_prop.FakeTensorProp"
            )


def _plan(source: GraphModule, options: Options, constants: Mapping[str, Tensor] | None) -> GraphPlan:
    gm = _copy(source)
    _drop_unread(gm)
    return plan_graph(gm, options, constants=constants)


def _refresh(graph: Graph) -> None:
    """Give every node an example value of its own, of one fake mode; :func:`_restore` puts the original ones back.

    A tensor remembers what it was asked (is it contiguous?), and would not ask for a guard again. ``make_fx`` on real
    tensors records each with a mode of its own.
    """
    values = [x for node in graph.nodes for x in tree_leaves(value_of(node)) if isinstance(x, Tensor)]
    modes = {id(x.fake_mode) if isinstance(x, FakeTensor) else None for x in values}
    shared = values[0].fake_mode if len(modes) == 1 and isinstance(values[0], FakeTensor) else None
    mode = shared or FakeTensorMode()

    def fresh(x: Tensor) -> Tensor:
        if x.layout != torch.strided:
            return x
        if shared is None and any(isinstance(size, torch.SymInt) for size in (*x.shape, *x.stride())):
            raise ValueError("rewrite needs example values of one fake tensor mode where lengths are symbolic")
        with nodes.on_fakes(mode):
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return made.requires_grad_(x.requires_grad)

    for node in graph.nodes:
        key = _value_key(node)
        if key in node.meta:
            node.meta[_ORIGINAL] = node.meta[key]
            node.meta[key] = tree_map_only(Tensor, fresh, node.meta[key])


def _value_key(node: Node) -> str:
    return "val" if "val" in node.meta else "example_value"


def _restore(graph: Graph) -> None:
    for node in graph.nodes:
        if _ORIGINAL in node.meta:
            node.meta[_value_key(node)] = node.meta.pop(_ORIGINAL)


_ORIGINAL = "tmx_original"


def _drop_unread(gm: GraphModule) -> None:
    """Erase entries of a tuple that nothing reads; they would keep the attention call that they belong to."""
    names = ("getitem", "detach", "alias")
    erase_dead(gm.graph, [n for n in gm.graph.nodes if not n.users and op_name(n) in names])


def _attempt(plan: GraphPlan) -> tuple[Rewritten, str]:
    """Rewrite the plan's graph; and what its tracing asked of the lengths that does not hold for all of them."""
    gm = plan.gm
    is_aten = _is_aten(gm.graph)
    composite = any(node.target is torch.ops.aten.scaled_dot_product_attention.default for node in gm.graph.nodes)
    mode = nodes.fake_mode_of(gm)
    with no_guard_added(mode) as asked:
        _refresh(gm.graph)
        rewritten = rewrite_graph(plan)
        if is_aten:
            rewritten = replace(rewritten, gm=_Retracer(gm, composite).run())
    _restore(rewritten.gm.graph)
    rewritten.gm.graph.lint()
    rewritten.gm.recompile()
    return rewritten, asked.guard


def _notes(rewritten: Rewritten) -> Iterator[str]:
    used = {item.lowering for item in rewritten.plan.triangle}
    if rewritten.inductor_options:
        settings = ", ".join(f"{name}={value}" for name, value in rewritten.inductor_options.items())
        yield f"compile the rewritten graph with the Inductor settings {settings}"
    if "operator" in used:
        yield "the graph calls tmx::triangle_attention: a process that loads it has to import tmx_compile"


def _is_aten(graph: Graph) -> bool:
    """Whether a graph was traced to operators (``meta["val"]``), rather than captured as code by Dynamo."""
    return any("val" in node.meta for node in graph.nodes)


# Copies ------------------------------------------------------------------------------------------------------------


def _copy(gm: GraphModule) -> GraphModule:
    """A copy with a graph of its own; parameters, child graphs, hooks and example values are shared."""
    graph = Graph()
    moved: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, moved)
    graph.output(output).meta = dict(gm.graph.output_node().meta)
    for node in graph.nodes:
        # What an earlier rewriting inserted is part of the graph by now.
        node.meta.pop(INSERTED, None)
    _keep_names(gm.graph, graph)
    return _with_graph(gm, graph)


def _keep_names(before: Graph, after: Graph) -> None:
    """Give inputs their names back: a copy names none as a builtin (``input``), and signatures go by names."""
    for old, new in zip(before.find_nodes(op="placeholder"), after.find_nodes(op="placeholder"), strict=True):
        new.name = old.name


def _with_graph(gm: GraphModule, graph: Graph) -> GraphModule:
    graph.set_codegen(copy.deepcopy(gm.graph._codegen))
    made = GraphModule(gm, graph, gm.__class__.__name__)
    made.meta = dict(gm.meta)
    made.training = gm.training
    for name, value in gm.__dict__.items():
        # Hooks, and what torch.export keeps on its modules (guards, replaced train and eval).
        if name not in made.__dict__:
            made.__dict__[name] = value
        elif name.endswith("_hooks") or name.startswith(("_forward_hooks", "_forward_pre_hooks")):
            made.__dict__[name] = copy.copy(value)
    return made


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


# Back to operators ---------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """Inserted nodes in a row, and the nodes of the original graph that they read."""

    nodes: list[Node]

    @property
    def inputs(self) -> list[Node]:
        inside = set(self.nodes)
        read = (x for node in self.nodes for x in node.all_input_nodes)
        return list(dict.fromkeys(x for x in read if x not in inside))

    @property
    def outputs(self) -> list[Node]:
        inside = set(self.nodes)
        return [node for node in self.nodes if any(user not in inside for user in node.users)]


class _Retracer:
    """Copies a graph; what the pass inserted is run on the example values and recorded as operators.

    Args:
        gm: the rewritten graph.
        composite: keep composite operators (``scaled_dot_product_attention``, ``reshape``), as the graph itself does.
    """

    def __init__(self, gm: GraphModule, composite: bool) -> None:
        self._gm = gm
        self._composite = composite
        self._fake_mode = nodes.fake_mode_of(gm)
        self._graph = Graph()
        self._moved: dict[Node, Node] = {}

    def run(self) -> GraphModule:
        """The copy."""
        run: list[Node] = []
        for node in self._gm.graph.nodes:
            if INSERTED in node.meta:
                run.append(node)
            if run and (INSERTED not in node.meta or NAME in node.meta):
                self._retrace(_Run(run))
                run = []
            if INSERTED not in node.meta:
                self._moved[node] = self._copied(node)
        _keep_names(self._gm.graph, self._graph)
        return _with_graph(self._gm, self._graph)

    def _copied(self, node: Node) -> Node:
        if node.op != "output":
            return self._graph.node_copy(node, self._moved.__getitem__)
        made: Node = self._graph.output(torch.fx.node.map_arg(node.args[0], self._moved.__getitem__))
        made.meta = dict(node.meta)
        return made

    def _retrace(self, run: _Run) -> None:
        inputs, outputs = run.inputs, run.outputs

        def body(*values: Any) -> list[Any]:
            known = dict(zip(inputs, values, strict=True))
            for node in run.nodes:
                known[node] = self._call(node, known)
            return [known[node] for node in outputs]

        with nodes.on_fakes(self._fake_mode):
            traced = make_fx(body, pre_dispatch=self._composite)(*map(value_of, inputs))
        names = {id(node): node.meta[NAME] for node in outputs if NAME in node.meta}
        self._inline(traced, run, names)

    def _call(self, node: Node, known: dict[Node, Any]) -> Any:
        if node.op == "get_attr":
            return getattr(self._gm, str(node.target))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _inline(self, traced: GraphModule, run: _Run, names: dict[int, str]) -> None:
        """Copy the traced nodes; the site's result gets the name that the call had, the graph's output may be it."""
        results = traced.graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        named = {made: names[id(node)] for made, node in zip(results, run.outputs, strict=True) if id(node) in names}
        origin = {key: run.nodes[0].meta[key] for key in ("nn_module_stack", "stack_trace") if key in run.nodes[0].meta}
        values = iter(run.inputs)
        inner: dict[Node, Node] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                inner[node] = self._moved[next(values)]
            elif node.op != "output":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), inner.__getitem__)
                target = self._adopt(getattr(traced, str(node.target))) if node.op == "get_attr" else node.target
                # Names of its own: those of the original nodes are names of the program's results.
                name = named.get(node, f"tmx_{node.name}")
                inner[node] = made = self._graph.create_node(node.op, target, args, kwargs, name)
                made.meta = dict(origin) | {"val": node.meta.get("val"), INSERTED: True}
        self._moved.update({old: inner[new] for old, new in zip(run.outputs, results, strict=True)})

    def _adopt(self, child: Any) -> str:
        if not isinstance(child, GraphModule):
            raise VerificationError(f"tracing what was inserted left a constant: {child!r}")
        count = 0
        while hasattr(self._gm, name := f"tmx_graph_{count}"):
            count += 1
        self._gm.register_module(name, child)
        return name
