"""Which operators the rules and finders know: their signatures, and the objects that mean them.

An operator is known by the object that is called, never by its bare name: ``torch.masked.softmax`` and a custom
operator ``lab::softmax`` are not ``torch.softmax``. The map from objects to operators is built at the first question.
"""

from __future__ import annotations

import ast
import builtins
import functools
import math
import operator
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# One operator a line: its name, its parameters, and how it is spelled.
#
# Parameters: ``*x`` takes one sequence or the numbers themselves, a single ``*`` starts the keywords, ``x/y`` is also
# called ``y``, ``x:kind`` must be of a kind (see ``calls.KINDS``: it tells overloads apart), ``;`` starts what this
# overload cannot be given but means all the same. MADE stands for what decides where and how a tensor is made: its
# dtype is read off the result.
#
# Spellings: a plain name is the function of ``torch``, the method and the ``aten`` operator; so is the name with
# ``_`` behind it, which is the same operator in place.
_TABLE = """
add(input, other, *, alpha=1)                     add operator.add Tensor.__add__ Tensor.__radd__ prims.add
sub(input, other, *, alpha=1)                     sub subtract operator.sub Tensor.__sub__ prims.sub
rsub(input, other, *, alpha=1)                    rsub Tensor.__rsub__
mul(input, other)                                 mul multiply operator.mul Tensor.__mul__ Tensor.__rmul__ prims.mul
div(input, other, *, rounding_mode=None)          div divide
div(input, other; rounding_mode=None)             true_divide operator.truediv Tensor.__truediv__
neg(input)                                        neg negative operator.neg Tensor.__neg__ prims.neg
pow(input, exponent)                              pow operator.pow Tensor.__pow__
sqrt(input)                                       sqrt
rsqrt(input)                                      rsqrt
reciprocal(input)                                 reciprocal
maximum(input, other)                             maximum prims.maximum
clamp(input, min=None, max=None)                  clamp clip
clamp(input, min; max=None)                       clamp_min
ge(input, other)                                  ge greater_equal operator.ge Tensor.__ge__ prims.ge
gt(input, other)                                  gt greater operator.gt Tensor.__gt__ prims.gt
le(input, other)                                  le less_equal operator.le Tensor.__le__ prims.le
lt(input, other)                                  lt less operator.lt Tensor.__lt__ prims.lt
eq(input, other)                                  eq operator.eq Tensor.__eq__ prims.eq
ne(input, other)                                  ne not_equal operator.ne Tensor.__ne__ prims.ne
and(input, other)                                 bitwise_and logical_and operator.and_ Tensor.__and__ Tensor.__rand__
and(input, other)                                 prims.bitwise_and aten.__and__
or(input, other)                                  bitwise_or logical_or operator.or_ Tensor.__or__ Tensor.__ror__
or(input, other)                                  prims.bitwise_or aten.__or__
xor(input, other)                                 bitwise_xor logical_xor operator.xor Tensor.__xor__ Tensor.__rxor__
xor(input, other)                                 prims.bitwise_xor aten.__xor__
not(input)                                        bitwise_not logical_not operator.invert Tensor.__invert__
not(input)                                        prims.bitwise_not
where(condition:tensor, input, other)             torch.where aten.where
where(input, condition:tensor, other)             Tensor.where
tanh(input)                                       tanh
where(condition/pred:tensor, input, other/b)      prims.where
masked_fill(input, mask:tensor, value)            masked_fill
tril(input, diagonal=0)                           tril
triu(input, diagonal=0)                           triu

max(input; dim=None, keepdim=False, other=None)   max
max(input, dim:int, keepdim=False; other=None)    max
max(input, other:tensor; dim=None, keepdim=False) max
amax(input, dim=(), keepdim=False)                amax
any(input, dim=None, keepdim=False)               any
cumsum(input, dim:int, *, dtype=None)             cumsum
diff(input, n=1, dim=-1, prepend=None, append=None) diff
softmax(input, dim:int, dtype=None)               softmax special.softmax aten.special_softmax
softmax(input, dim:int, _stacklevel=3, dtype=None) F.softmax
_softmax(input, dim:int, half_to_float)           _softmax
_safe_softmax(input, dim:int, dtype=None)         _safe_softmax
dropout(input, p, training/train)                 dropout
dropout(input, p=0.5, training=True, inplace=False) F.dropout
native_dropout(input, p, training/train)          native_dropout
matmul(input, other)                              matmul operator.matmul Tensor.__matmul__ linalg.matmul
matmul(other, input)                              Tensor.__rmatmul__
matmul(input, other)                              aten.linalg_matmul
bmm(input, mat2)                                  bmm
baddbmm(input, batch1, batch2, *, beta=1, alpha=1) baddbmm
einsum(equation, *operands/tensors)               einsum
scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, \
enable_gqa=False) F.scaled_dot_product_attention nn.scaled_dot_product_attention aten.scaled_dot_product_attention

arange(end:scalar, *, MADE; start=0, step=1)      torch.arange aten.arange
arange(start:scalar, end:scalar, step:scalar=1, *, MADE) torch.arange aten.arange
iota(length, *, start=0, step=1, dtype=None, device=None, requires_grad=False) prims.iota
tensor(data, *, MADE)                             torch.tensor
scalar_tensor(s, *, MADE)                         scalar_tensor
full(size, fill_value, *, MADE)                   torch.full aten.full
new_full(input, size, fill_value, *, MADE)        new_full
full_like(input, fill_value, *, memory_format=None, MADE) full_like
ones(*size, *, MADE)                              torch.ones aten.ones
zeros(*size, *, MADE)                             torch.zeros aten.zeros
new_ones(input, *size, *, MADE)                   new_ones
new_zeros(input, *size, *, MADE)                  new_zeros
ones_like(input, *, memory_format=None, MADE)     ones_like
zeros_like(input, *, memory_format=None, MADE)    zeros_like
meshgrid(*tensors, *, indexing=None)              meshgrid

to(input, *target=(), *, other=None, non_blocking=False, copy=False, memory_format=None, MADE) to
_to_copy(input, *, non_blocking=False, memory_format=None, MADE) _to_copy
convert_element_type(input, dtype)                prims.convert_element_type
type(input, dtype, non_blocking=False)            Tensor.type
type_as(input, other)                             type_as
bool(input, memory_format=None)                   Tensor.bool
int(input, memory_format=None)                    Tensor.int
long(input, memory_format=None)                   Tensor.long
half(input, memory_format=None)                   Tensor.half
bfloat16(input, memory_format=None)               Tensor.bfloat16
float(input, memory_format=None)                  Tensor.float
double(input, memory_format=None)                 Tensor.double
contiguous(input, *, memory_format=None)          contiguous
clone(input, *, memory_format=None)               clone
detach(input)                                     detach
detach_copy(input)                                detach_copy
alias(input)                                      alias prims.view_of
alias_copy(input)                                 alias_copy
lift_fresh(input)                                 lift_fresh
lift_fresh_copy(input)                            lift_fresh_copy

expand(input, *size, *, implicit=False)           expand
expand_copy(input, *size, *, implicit=False)      expand_copy
expand_as(input, other)                           expand_as
broadcast_to(input, *size/shape)                  broadcast_to
view(input, *size:ints)                           view
view_copy(input, *size:ints)                      view_copy
view_as(input, other)                             view_as
_unsafe_view(input, *size:ints)                   _unsafe_view
reshape(input, *shape:ints)                       reshape
reshape_as(input, other)                          reshape_as
unsqueeze(input, dim:int)                         unsqueeze
unsqueeze_copy(input, dim:int)                    unsqueeze_copy
squeeze(input, dim=None)                          squeeze
squeeze_copy(input, dim=None)                     squeeze_copy
flatten(input, start_dim=0, end_dim=-1)           flatten
unflatten(input, dim:int, *sizes)                 unflatten
permute(input, *dims:ints)                        permute
permute_copy(input, *dims:ints)                   permute_copy
transpose(input, dim0/axis0:int, dim1/axis1:int)  transpose swapaxes swapdims
transpose_copy(input, dim0:int, dim1:int)         transpose_copy
t(input)                                          t
numpy_T(input)                                    attribute.T aten.numpy_T
mT(input)                                         attribute.mT aten.mT
mH(input)                                         attribute.mH aten.mH adjoint
matrix_H(input)                                   attribute.H aten.matrix_H
slice(input, dim:int=0, start=None, end=None, step=1) aten.slice aten.slice_copy
narrow(input, dim:int, start, length)             narrow
select(input, dim:int, index)                     select select_copy
index(input, indices)                             aten.index
getitem(input, index)                             operator.getitem Tensor.__getitem__
getattr(input, name)                              builtins.getattr
cat(tensors, dim:int=0)                           cat concat concatenate
constant_pad_nd(input, pad, value=0)              constant_pad_nd
repeat_interleave(input:tensor, repeats, dim=None, *, output_size=None) repeat_interleave
index_copy(input, dim:int, index, source)         index_copy
"""
_MADE = "dtype=None, layout=None, device=None, pin_memory=False, requires_grad=False"
# What torch takes beside a parameter's own name (NumPy's, and that of a schema).
_ALIASES = {"input": ("self", "x", "a", "x1"), "other": ("x2",), "dim": ("axis",), "keepdim": ("keepdims",)}
_HOMES: dict[str, Any] = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "F": torch.nn.functional,
    "nn": torch._C._nn,
    "special": torch.special,
    "linalg": torch.linalg,
    "operator": operator,
    "builtins": builtins,
}
# Where a function is torch's (or Python's) own, though no rule knows it.
_OWN: dict[str, Any] = {**_HOMES, "torch._C": torch._C, "grad_mode": torch.autograd.grad_mode, "math": math}


@dataclass(frozen=True)
class Parameter:
    """One parameter; ``how`` is "place", "keyword" or "rest" (a sequence, or all that is left)."""

    name: str
    names: tuple[str, ...]
    how: str
    kind: str
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Signature:
    """What one overload takes, and what the parameters are that it cannot be given (``fixed``)."""

    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Any]

    @staticmethod
    def of(text: str) -> Signature:
        """Read a signature as the table writes it, without the brackets."""
        given, _, implied = text.replace("MADE", _MADE).partition(";")
        parameters: list[Parameter] = []
        how = "place"
        for word in _words(given):
            if word == "*":
                how = "keyword"
                continue
            left, has_default, default = word.partition("=")
            left, _, kind = left.partition(":")
            first, *others = left.lstrip("*").split("/")
            rest = left.startswith("*")
            parameters.append(
                Parameter(
                    first,
                    (first, *others, *_ALIASES.get(first, ())),
                    "rest" if rest else how,
                    kind,
                    not has_default,
                    ast.literal_eval(default) if has_default else None,
                )
            )
        fixed = dict(word.split("=", 1) for word in _words(implied))
        return Signature(tuple(parameters), {name: ast.literal_eval(value) for name, value in fixed.items()})


@dataclass(frozen=True)
class Operator:
    """An operator by one of its spellings: its name, and the overloads, the first that fits being the one meant."""

    name: str
    signatures: tuple[Signature, ...]


def _words(text: str) -> list[str]:
    # No default has a comma in it.
    return [word for word in (part.strip() for part in text.split(",")) if word]


def _lines() -> Iterator[tuple[str, Signature, list[str]]]:
    for line in _TABLE.replace("\\\n", "").splitlines():
        if line.strip():
            name, rest = line.split("(", 1)
            end = rest.rindex(")")
            yield name, Signature.of(rest[:end]), rest[end + 1 :].split()


@functools.cache
def _operators() -> dict[Hashable, Operator]:
    """Objects (for ``aten`` and ``prims`` operators and attributes: qualified names), and what they are."""
    found: dict[Hashable, Operator] = {}

    def enter(key: Hashable, name: str, signature: Signature) -> None:
        known = found.get(key)
        assert known is None or known.name == name, f"{key} is {name} and {known}"
        found[key] = Operator(name, (*(known.signatures if known else ()), signature))

    for name, signature, spellings in _lines():
        for spelling in spellings:
            keys = list(_keys(spelling))
            assert keys, f"{spelling} is nothing of torch"
            for key, in_place in keys:
                enter(key, f"{name}_" if in_place else name, signature)
    return found


def _keys(spelling: str) -> Iterator[tuple[Hashable, bool]]:
    """What a spelling of the table stands for, and whether it is the operator in place."""
    home, _, name = spelling.rpartition(".")
    if home in ("aten", "prims", "attribute"):
        yield f"{home}::{name}", False
        return
    if home == "operator" or name.startswith("__"):
        yield from _found(home, name, False)
        bare = name.strip("_")
        yield from _found(home, f"i{bare}" if home == "operator" else f"__i{bare}__", True)
        return
    for each in (home,) if home else ("torch", "Tensor"):
        yield from _found(each, name, False)
        yield from _found(each, f"{name}_", True)
    if not home:
        yield f"aten::{name}", False
        yield f"aten::{name}_", True


def _found(home: str, name: str, in_place: bool) -> Iterator[tuple[Hashable, bool]]:
    target = getattr(_HOMES[home], name, None)
    # ``operator.ilt`` is nothing, and nor is a method that torch.Tensor has from ``object``.
    if target is not None and (home != "Tensor" or target is not getattr(object, name, None)):
        yield target, in_place


@functools.cache
def _taken() -> frozenset[str]:
    """Names that nothing outside the table may have: of its operators, and those that they are spelled with."""
    spelled = {spelling.rpartition(".")[2] for _, _, every in _lines() for spelling in every}
    return frozenset({known.name for known in _operators().values()} | spelled)


def operator_of(target: Any) -> Operator | None:
    """The operator that a function, method descriptor or ``aten`` operator is; None for anything else."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _operators().get(_qualified(target))
    try:
        return _operators().get(target) if callable(target) else None
    except TypeError:
        return None


def method_of(name: str) -> Operator | None:
    """The operator that a method of plain tensors is."""
    return operator_of(getattr(torch.Tensor, name, None))


def attribute_of(name: str) -> Operator | None:
    """The operator that an attribute of plain tensors, such as ``T``, is."""
    return _operators().get(f"attribute::{name}")


def spellings() -> Iterator[tuple[str, Hashable, Operator]]:
    """Every operator's name with an object (or qualified name) that means it, and what is known of that."""
    for key, known in _operators().items():
        yield known.name, key, known


def name_of(target: Any) -> str:
    """What a function is called: an operator's name, the bare name of other functions of torch, or a qualified one.

    Only what is torch's own has a bare name, and none has that of an operator which it is not.
    """
    known = operator_of(target)
    if known is not None:
        return known.name
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        qualified = _qualified(target)
        home, _, name = qualified.partition("::")
        return name if home in ("aten", "prims") and name not in _taken() else qualified
    name = str(getattr(target, "__name__", target))
    homes = [home for home, module in _OWN.items() if getattr(module, name, None) is target]
    if homes:
        return name if name not in _taken() else f"{homes[0]}.{name}"
    return f"{getattr(target, '__module__', None) or type(target).__module__}.{name}"


def _qualified(target: torch._ops.OpOverload[Any, Any] | torch._ops.OpOverloadPacket[Any, Any]) -> str:
    """``aten::add`` of both ``aten.add`` and ``aten.add.Tensor``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    return str(target._qualified_op_name)
