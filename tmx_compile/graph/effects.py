"""What one call of a graph does to storage: which tensors it writes, and whose storage its result may share.

No list of names says so. The call is run once, on fake tensors of its arguments' shapes, under a dispatch mode that
sees every operator below it and whether its schema writes: views of any name, ``out=``, ``_foreach_``, ``inplace=True``
and custom operators are all seen the same way. What the run cannot tell is taken at its worst: a call that does not run
on fakes writes everything that it can reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch import predispatch
from torch._higher_order_ops.flex_attention import flex_attention
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_leaves

from tmx_compile.graph.nodes import value_of
from tmx_compile.graph.sizes import size_of

# The size that stands for one which only the run tells: a prime, so that it equals no other by chance.
_UNKNOWN_SIZE = 97


@dataclass(frozen=True)
class Effect:
    """What a call does, in positions of the node's ``all_input_nodes``.

    Attributes:
        writes: tensors that it writes.
        shares: tensors whose storage its result may share.
        reshapes: tensors that have another shape, other strides or another storage afterwards (``t_``, ``resize_``,
            ``set_``): their recorded example values are those of the end.
        attributes: it may write attributes of its module as well (``call_module``).
    """

    writes: frozenset[int] = frozenset()
    shares: frozenset[int] = frozenset()
    reshapes: frozenset[int] = frozenset()
    attributes: bool = False


NOTHING = Effect()

_LEARNT = "tmx_effect"


class Effects:
    """Learns the effects of calls; those of the same call on tensors of the same layout are learnt once."""

    def __init__(self) -> None:
        self._learnt: dict[Any, Effect] = {}
        self._mode: FakeTensorMode | None = None

    def of(self, node: Node) -> Effect:
        """The effect of one node; it is kept in its metadata, for the inputs that it has."""
        inputs = tuple(node.all_input_nodes)
        effect: Effect
        known, effect = node.meta.get(_LEARNT, (None, NOTHING))
        if known != inputs:
            effect = self._of(node)
            node.meta[_LEARNT] = inputs, effect
        return effect

    def _of(self, node: Node) -> Effect:
        inputs = node.all_input_nodes
        if node.op not in ("call_function", "call_method", "call_module"):
            return NOTHING
        tensors = frozenset(i for i, source in enumerate(inputs) if _holds_tensor(source))
        if isinstance(node.target, HigherOrderOperator):
            return _of_higher_order(node, tensors, self)
        if not tensors or _is_pure(node.target):
            return NOTHING
        if _wraps(node.target):
            return Effect(shares=tensors)
        key = _key(node)
        if key is None or key not in self._learnt:
            effect = self._run(node, tensors)
            if key is None:
                return effect
            self._learnt[key] = effect
        return self._learnt[key]

    def _run(self, node: Node, tensors: frozenset[int]) -> Effect:
        if self._mode is None:
            # Sizes that depend on data become symbols of an environment that nobody else asks.
            env = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
            self._mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
        # Under autocast a call takes operands of several dtypes, which it refuses otherwise.
        for autocast in (False, True):
            with contextlib.suppress(Exception):
                return _learn(node, self._mode, autocast)
        return Effect(tensors, tensors, tensors, attributes=node.op == "call_module")


def writes(node: Node) -> bool:
    """Whether a call writes to any tensor."""
    effect = Effects().of(node)
    return bool(effect.writes) or effect.attributes


def _holds_tensor(node: Node) -> bool:
    value = value_of(node)
    if value is None:
        # Nothing was recorded: an attribute of the module, or the result of a call without one.
        return not isinstance(_attribute(node), GraphModule)
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _attribute(node: Node) -> Any:
    owner = node.graph.owning_module
    return getattr(owner, str(node.target), None) if node.op == "get_attr" and owner is not None else None


def _is_pure(target: Any) -> bool:
    """Whether an operator's schema says that it writes nothing and gives fresh tensors.

    A composite one may give its argument back whatever its schema says (``dropout`` outside of training).
    """
    if not isinstance(target, OpOverload):
        return False
    name: str = target.name()  # type: ignore[no-untyped-call]
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
        return False
    schema = target._schema
    return all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))


def _wraps(target: Any) -> bool:
    """Whether a call wraps tensors for a transform such as ``vmap``, or unwraps them: it runs only inside of one."""
    name = getattr(target, "__name__", "")
    return any(getattr(home, name, None) is target for home in (torch._C._functorch, predispatch))


def _of_higher_order(node: Node, tensors: frozenset[int], effects: Effects) -> Effect:
    """A call of child graphs: it writes nothing if no child does; what it gives may be any of its operands."""
    if node.target is flex_attention:
        return NOTHING
    children = [child for source in node.all_input_nodes if isinstance(child := _attribute(source), GraphModule)]
    quiet = bool(children) and not any(_writes_inputs(child, effects) for child in children)
    return Effect(frozenset() if quiet else tensors, tensors)


def _writes_inputs(child: GraphModule, effects: Effects) -> bool:
    return any(effects.of(node).writes or effects.of(node).attributes for node in child.graph.nodes)


# One run --------------------------------------------------------------------------------------------------------------


def _key(node: Node) -> Any:
    """What calls of the same effect have in common, or None where that cannot be told."""
    inputs = {source: i for i, source in enumerate(node.all_input_nodes)}
    leaves, spec = tree_flatten((node.args, node.kwargs))
    described: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Node):
            described.append((inputs[leaf], _described(value_of(leaf))))
        else:
            described.append((type(leaf), repr(leaf) if isinstance(leaf, (slice, float)) else leaf))
    key = (node.op, node.target, spec, tuple(described))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            return object()
        sizes = tuple(map(size_of, (*value.shape, *value.stride())))
        inner, meta = _inner(value)
        return value.dtype, value.device, value.dim(), sizes, type(value), meta, *map(_described, inner.values())
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_described, value))
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which storages are written, and whether anything but copies and views is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()
        self.only_moves = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        for position, argument in enumerate(schema.arguments):
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for leaf in tree_leaves(given):
                    self.written |= storages_of(leaf)
        self.only_moves &= func in _COPIES or any(x.alias_info is not None for x in schema.returns)
        return func(*args, **kwargs)


_COPIES = frozenset(
    {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten._unsafe_view.default}
)


def storages_of(value: Any) -> frozenset[Any]:
    """What identifies the storages behind a tensor: one, those of the tensors that it wraps, or none if it is none."""
    if not isinstance(value, Tensor):
        return frozenset()
    inner, _ = _inner(value)
    if inner:
        return frozenset().union(*map(storages_of, inner.values()))
    try:
        return frozenset({int(value.untyped_storage()._cdata)})
    except (NotImplementedError, RuntimeError):
        return frozenset({id(value)})


def _inner(tensor: Tensor) -> tuple[dict[str, Tensor], Any]:
    """The tensors that a subclass such as DTensor wraps, by their names, and what else it is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return {}, None
    names, meta = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, meta


def _layout(tensor: Tensor) -> Any:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), storages_of(tensor)


def _learn(node: Node, mode: FakeTensorMode, autocast: bool) -> Effect:
    """Run the call on stand-ins, each with a storage of its own."""
    inputs = node.all_input_nodes
    module = node.graph.owning_module.get_submodule(str(node.target)) if node.op == "call_module" else None  # type: ignore[union-attr]
    watch = _Watch()
    with mode, torch.no_grad():
        values = [value_of(source) for source in inputs]
        if any(value is None for value in values):
            raise NotImplementedError("an argument of which nothing was recorded")
        stand_ins = [_stand_in(value) for value in values]
        # A module's own tensors come behind those that it is given.
        state = {} if module is None else {name: _stand_in(x) for name, x in module.state_dict(keep_vars=True).items()}
        stand_ins += state.values()
        tensors = [[leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in stand_ins]
        owner = {storage: i for i, leaves in enumerate(tensors) for leaf in leaves for storage in storages_of(leaf)}
        before = [[(_layout(leaf), leaf._version) for leaf in leaves] for leaves in tensors]
        given = dict(zip(inputs, stand_ins, strict=False))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        with watch, _autocast(tensors, autocast):
            if module is not None:
                result = torch.func.functional_call(module, state, args, kwargs)
            elif node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                result = node.target(*args, **kwargs)
        results = frozenset().union(*map(storages_of, tree_leaves(result)))
        written = {owner[storage] for storage in watch.written if storage in owner}
        shares = {owner[storage] for storage in results if storage in owner}
        reshaped: set[int] = set()
        for i, leaves in enumerate(tensors):
            for leaf, (layout, version) in zip(leaves, before[i], strict=True):
                if _layout(leaf) != layout:
                    reshaped.add(i)
                if leaf._version != version:
                    written.add(i)
        if reshaped:
            # ``set_`` makes two arguments one: whichever they are.
            written |= reshaped
            shares |= {i for i, leaves in enumerate(tensors) if leaves}
        if watch.only_moves and _is_symbolic(node):
            # At other lengths ``contiguous`` or ``reshape`` may need no copy.
            made = {(leaf.dtype, leaf.device) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
            shares |= {i for i, leaves in enumerate(tensors) if any((x.dtype, x.device) in made for x in leaves)}
    own = {i for i in written | reshaped if i >= len(inputs)}
    written, shares, reshaped = ({i for i in found if i < len(inputs)} for found in (written, shares, reshaped))
    return Effect(frozenset(written), frozenset(shares), frozenset(reshaped), attributes=bool(own))


def _is_symbolic(node: Node) -> bool:
    """Whether some length of the call is known by a symbol only."""
    return any(map(has_symbols, node.all_input_nodes))


def has_symbols(node: Node) -> bool:
    """Whether some size or stride of a node's value is known by a symbol only."""
    for leaf in tree_leaves(value_of(node)):
        sizes: Sequence[Any] = (*leaf.shape, *leaf.stride()) if isinstance(leaf, Tensor) else (leaf,)
        if any(isinstance(size, torch.SymInt) for size in sizes):
            return True
    return False


def _stand_in(value: Any) -> Any:
    """A value of the same layout with its symbols replaced by numbers; tensors get a storage of their own."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise NotImplementedError(f"a tensor of layout {value.layout}")
        sizes, strides = ([_number(x) for x in xs] for xs in (value.shape, value.stride()))
        inner, meta = _inner(value)
        if inner:
            parts = {name: _stand_in(part) for name, part in inner.items()}
            return type(value).__tensor_unflatten__(parts, meta, torch.Size(sizes), tuple(strides))  # type: ignore[attr-defined]
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    if isinstance(value, torch.SymInt):
        return _number(value)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return value.node.hint
    if isinstance(value, (tuple, list)):
        return type(value)(map(_stand_in, value))
    return value


def _number(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    if size.node.has_hint():
        return int(size.node.hint)
    expr = size.node.expr
    return int(expr.subs(dict.fromkeys(expr.free_symbols, _UNKNOWN_SIZE)))


@contextlib.contextmanager
def _autocast(tensors: Sequence[Sequence[Tensor]], enabled: bool) -> Iterator[None]:
    """Off, whatever the caller's is: a cast that autocast makes is a copy, and the worst case is that there is none."""
    with contextlib.ExitStack() as stack:
        for device in {leaf.device.type for leaves in tensors for leaf in leaves}:
            if torch.amp.autocast_mode.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=enabled))
        yield
