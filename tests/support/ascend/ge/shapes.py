"""Operators that move elements without computing with them, and arithmetic on shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.ascend.ge.node import INDEX, NUMBER, Call
from tests.support.ascend.ge.schema import ATTRIBUTE


def _axis(call: Call, axis: int, rank: int, what: str = "axis") -> int:
    call.require(-rank <= axis < rank, f"{what} {axis} is out of range for rank {rank}")
    return axis % rank


def identity(call: Call) -> tuple[Tensor]:
    """Identity: x."""
    return (call.tensor("x"),)


def shape(call: Call) -> tuple[Tensor]:
    """Shape: the sizes of x in ``dtype`` (ge::DataType; int32 by default)."""
    number = call.integer("dtype", 3)
    call.require(ATTRIBUTE.get(number) in INDEX, f"dtype {number} must be int32 or int64")
    return (torch.tensor(call.tensor("x").shape, dtype=ATTRIBUTE[number]),)


def gather(call: Call) -> tuple[Tensor]:
    """Gather and GatherV2: slices of x along ``axis`` (0 for Gather). Indices count from 0 and must be in range."""
    call.only(batch_dims=0, is_preprocessed=False, negative_index_support=False)
    x, indices = call.tensor("x"), call.tensor("indices", INDEX)
    axis = 0
    if call.op.type == "GatherV2":
        (axis,) = call.numbers("axis")
    else:
        call.only(validate_indices=True)
    axis = _axis(call, axis, x.dim())
    inside = (indices >= 0) & (indices < x.shape[axis])
    call.require(bool(inside.all()), f"an index is outside [0, {x.shape[axis]})")
    taken = x.index_select(axis, indices.reshape(-1).long())
    return (taken.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]),)


def gather_elements(call: Call) -> tuple[Tensor]:
    """GatherElements: y[..., i, ...] = x[..., index[..., i, ...], ...] along ``dim``, of the index's shape."""
    x, index = call.tensor("x"), call.tensor("index", INDEX)
    dim = _axis(call, call.integer("dim", 0), x.dim(), "dim")
    fits = x.dim() == index.dim() and all(
        a <= b or i == dim for i, (a, b) in enumerate(zip(index.shape, x.shape, strict=True))
    )
    call.require(fits, f"index {tuple(index.shape)} does not fit {tuple(x.shape)}")
    inside = (index >= 0) & (index < x.shape[dim])
    call.require(bool(inside.all()), f"an index is outside [0, {x.shape[dim]})")
    return (x.gather(dim, index.long()),)


def pad(call: Call) -> tuple[Tensor]:
    """PadV3: ``paddings`` elements (before, after) for each axis, of ``constant_values``, which has the dtype of x."""
    call.only(mode=b"constant", paddings_contiguous=True)
    x = call.tensor("x")
    paddings = call.tensor("paddings", INDEX).reshape(-1).tolist()
    value = call.optional("constant_values", (x.dtype,))
    fits = len(paddings) == 2 * x.dim() and min(paddings, default=0) >= 0
    call.require(fits, f"paddings {paddings} for rank {x.dim()}")
    call.require(value is None or value.numel() == 1, "constant_values must have one element")
    sizes = [size + paddings[2 * i] + paddings[2 * i + 1] for i, size in enumerate(x.shape)]
    out = torch.zeros(sizes, dtype=x.dtype) if value is None else value.reshape(()).expand(sizes).clone()
    inner = tuple(slice(paddings[2 * i], paddings[2 * i] + size) for i, size in enumerate(x.shape))
    out[inner] = x
    return (out,)


def pack(call: Call) -> tuple[Tensor]:
    """Pack: N tensors of one shape and dtype along a new axis.

    One exception, which the manual does not have: torchair itself packs sizes that it reads in int32 with constants in
    int64 (``get_sym_node_from_graph`` in its ``continguous.py``). The numbers are the same in int64.
    """
    parts = call.dynamic("x")
    if {x.dtype for x in parts} == set(INDEX) and all(x.dim() == 0 for x in parts):
        parts = [x.long() for x in parts]
    call.require(call.integer("N") == len(parts), f"N must be {len(parts)}")
    kinds = {(x.dtype, tuple(x.shape)) for x in parts}
    call.require(len(kinds) == 1, f"the tensors must have one dtype and shape, got {kinds}")
    return (torch.stack(parts, _axis(call, call.integer("axis", 0), parts[0].dim() + 1)),)


def concat(call: Call) -> tuple[Tensor]:
    """ConcatV2: N tensors of one dtype along ``concat_dim``; the other sizes are equal."""
    parts = call.dynamic("x")
    call.require(call.integer("N", 1) == len(parts), f"N must be {len(parts)}")
    (dim,) = call.numbers("concat_dim")
    dim = _axis(call, dim, parts[0].dim(), "concat_dim")
    for x in parts[1:]:
        call.require(x.dtype == parts[0].dtype, f"the tensors must have one dtype, got {x.dtype} and {parts[0].dtype}")
        fits = x.dim() == parts[0].dim() and all(
            a == b for i, (a, b) in enumerate(zip(x.shape, parts[0].shape, strict=True)) if i != dim
        )
        call.require(fits, f"shapes {tuple(x.shape)} and {tuple(parts[0].shape)} do not fit along {dim}")
    return (torch.cat(parts, dim),)


def reshape(call: Call) -> tuple[Tensor]:
    """Reshape: the same elements in another shape; one size may be -1. A size of 0 is not documented."""
    call.only(axis=0, num_axes=-1)
    x, sizes = call.tensor("x"), call.numbers("shape")
    call.require(all(size > 0 or size == -1 for size in sizes) and sizes.count(-1) <= 1, f"shape is {sizes}")
    known = 1
    for size in sizes:
        known *= 1 if size == -1 else size
    fits = x.numel() % known == 0 if -1 in sizes else x.numel() == known
    call.require(fits, f"{tuple(x.shape)} does not reshape to {sizes}")
    return (x.reshape(sizes),)


def transpose(call: Call) -> tuple[Tensor]:
    """Transpose: axes in the order ``perm``. The result is contiguous, as every tensor between GE nodes is."""
    x, perm = call.tensor("x"), call.numbers("perm")
    call.require(sorted(perm) == list(range(x.dim())), f"perm {perm} is no permutation of {x.dim()} axes")
    return (x.permute(perm).contiguous(),)


def unsqueeze(call: Call) -> tuple[Tensor]:
    """Unsqueeze: new axes of size 1 at ``axes`` of the result."""
    x, axes = call.tensor("x"), call.integers("axes", ())
    rank = x.dim() + len(axes)
    places = sorted(_axis(call, axis, rank) for axis in axes)
    call.require(len(set(places)) == len(places), f"axes {axes} repeat")
    for place in places:
        x = x.unsqueeze(place)
    return (x,)


def squeeze(call: Call) -> tuple[Tensor]:
    """Squeeze: drops the axes ``axis``, which must have size 1; all of size 1 where none is given."""
    x, axes = call.tensor("x"), call.integers("axis", ())
    places = {_axis(call, axis, x.dim()) for axis in axes} or {i for i, size in enumerate(x.shape) if size == 1}
    call.require(all(x.shape[i] == 1 for i in places), f"an axis of {axes} has not size 1 in {tuple(x.shape)}")
    return (x.reshape([size for i, size in enumerate(x.shape) if i not in places]),)


def strided_slice(call: Call) -> tuple[Tensor]:
    """StridedSliceV2: [begin, end) with ``strides`` along ``axes``, as ONNX's Slice.

    Negative bounds count from the end; bounds beyond the tensor are clamped to it. Strides below 1 and the masks are
    not implemented.
    """
    call.only(begin_mask=0, end_mask=0, ellipsis_mask=0, new_axis_mask=0, shrink_axis_mask=0)
    x, begin, end = call.tensor("x"), call.numbers("begin"), call.numbers("end")
    axes = call.numbers("axes") if call.inputs.get("axes") is not None else list(range(len(begin)))
    strides = call.numbers("strides") if call.inputs.get("strides") is not None else [1] * len(begin)
    call.require(len(begin) == len(end) == len(axes) == len(strides), "begin, end, axes and strides differ in length")
    places = [_axis(call, axis, x.dim()) for axis in axes]
    call.require(len(set(places)) == len(places), f"axes {axes} repeat")
    index = [slice(None)] * x.dim()
    for place, first, last, stride in zip(places, begin, end, strides, strict=True):
        call.require(stride >= 1, f"strides are implemented from 1, got {stride}")
        index[place] = slice(first, last, stride)
    return (x[tuple(index)].contiguous(),)


def broadcast_to(call: Call) -> tuple[Tensor]:
    """BroadcastTo: x repeated to ``shape`` by NumPy's rules."""
    x, sizes = call.tensor("x"), call.numbers("shape")
    fits = (
        len(sizes) >= x.dim()
        and min(sizes, default=1) >= 0
        and all(have in (1, want) for have, want in zip(reversed(x.shape), reversed(sizes), strict=False))
    )
    call.require(fits, f"{tuple(x.shape)} does not broadcast to {sizes}")
    return (x.expand(sizes).contiguous(),)


def tile(call: Call) -> tuple[Tensor]:
    """Tile: x repeated ``multiples`` times along each axis."""
    x, multiples = call.tensor("x"), call.numbers("multiples")
    call.require(len(multiples) == x.dim() and min(multiples, default=1) > 0, f"multiples are {multiples}")
    return (x.repeat(multiples),)


def fill(call: Call) -> tuple[Tensor]:
    """Fill: a tensor of shape ``dims`` with the one element of ``value``."""
    sizes, value = call.numbers("dims"), call.tensor("value")
    call.require(value.numel() == 1, f"value must have one element, got shape {tuple(value.shape)}")
    call.require(all(size >= 0 for size in sizes), f"dims are {sizes}")
    return (value.reshape(()).expand(sizes).contiguous(),)


def range_(call: Call) -> tuple[Tensor]:
    """Range: start, start + delta, ... below ``limit``, of 0-d integers.

    torchair mixes int32 bounds with an int64 limit and casts the result; the values are those of int64, and the result
    has the dtype of ``start``, so that a limit beyond int32 is refused.
    """
    start, limit, delta = (call.tensor(name, INDEX) for name in ("start", "limit", "delta"))
    call.require(all(x.numel() == 1 for x in (start, limit, delta)), "start, limit and delta must be scalars")
    call.require(int(delta) != 0, "delta is 0")
    numbers = torch.arange(int(start), int(limit), int(delta), dtype=torch.int64)
    most = torch.iinfo(start.dtype).max
    call.require(numbers.numel() == 0 or int(numbers.abs().max()) <= most, f"a value does not fit into {start.dtype}")
    return (numbers.to(start.dtype),)


def index_by_tensor(call: Call) -> tuple[Tensor]:
    """IndexByTensor: x[indices] where ``indices_mask`` has a 1 for each leading axis that the next index selects.

    The indices broadcast to one shape. Implemented for leading axes alone, where it is plain that the broadcast shape
    comes first, and for indices in [0, size).
    """
    x, indices = call.tensor("x"), call.dynamic("indices", (torch.int64,))
    mask = call.integers("indices_mask", ())
    call.require(mask == [1] * len(indices) and len(indices) <= x.dim(), f"indices_mask {mask} is not implemented")
    for axis, index in enumerate(indices):
        inside = (index >= 0) & (index < x.shape[axis])
        call.require(bool(inside.all()), f"an index of axis {axis} is outside [0, {x.shape[axis]})")
    return (x[tuple(indices)],)


def cumsum(call: Call) -> tuple[Tensor]:
    """Cumsum along ``axis``, each element included."""
    call.only(exclusive=False, reverse=False)
    x = call.tensor("x", NUMBER)
    (axis,) = call.numbers("axis")
    return (x.cumsum(_axis(call, axis, x.dim()), dtype=x.dtype),)


OPERATORS = {
    "Identity": identity,
    "Shape": shape,
    "Gather": gather,
    "GatherV2": gather,
    "GatherElements": gather_elements,
    "PadV3": pad,
    "Pack": pack,
    "ConcatV2": concat,
    "Reshape": reshape,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Squeeze": squeeze,
    "StridedSliceV2": strided_slice,
    "BroadcastTo": broadcast_to,
    "Tile": tile,
    "Fill": fill,
    "Range": range_,
    "IndexByTensor": index_by_tensor,
    "Cumsum": cumsum,
}
"""GE type -> function of a :class:`~tests.support.ascend.ge.node.Call` that returns the outputs."""
