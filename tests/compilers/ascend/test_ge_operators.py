"""Each operator of the interpreter on hand-made graphs, against numbers written out or NumPy's float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.ascend.ge import run
from tests.support.ascend.ge.build import run_one
from tests.support.ascend.ge.node import GraphError
from tests.support.ascend.standin.process import unsupported

pytestmark = pytest.mark.skipif(unsupported() is not None, reason=str(unsupported()))

HALF, BF16, F32, F64, I32, I64, BOOL = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.bool,
)


def t(values, dtype=F32):
    return torch.tensor(values, dtype=dtype)


X = t([[1.5, -2.0, 0.25], [3.0, 0.5, -0.75]])
Y = t([[0.5, 4.0, -1.0]])
N = t([[1, -2, 3], [4, 5, -6]], I64)
B = t([True, False, True], BOOL)

# type, inputs, attributes, result; the result's dtype is the node's.
CASES = [
    ("Add", {"x1": X, "x2": Y}, {}, [[2.0, 2.0, -0.75], [3.5, 4.5, -1.75]]),
    ("Add", {"x1": t([2048.0], HALF), "x2": t([1.0], HALF)}, {}, t([2048.0], HALF)),
    ("Sub", {"x1": N, "x2": t(1, I64)}, {}, t([[0, -3, 2], [3, 4, -7]], I64)),
    ("Mul", {"x1": X, "x2": t(2.0)}, {}, [[3.0, -4.0, 0.5], [6.0, 1.0, -1.5]]),
    ("Mul", {"x1": t([3.0], HALF), "x2": t(0.1)}, {}, t([0.3])),
    ("RealDiv", {"x1": Y, "x2": t([2.0])}, {}, [[0.25, 2.0, -0.5]]),
    ("Div", {"x1": Y, "x2": t([4.0])}, {}, [[0.125, 1.0, -0.25]]),
    ("FloorDiv", {"x1": t([7, -7, 6], I64), "x2": t([2], I64)}, {}, t([3, -4, 3], I64)),
    ("Pow", {"x1": X, "x2": t(2.0)}, {}, [[2.25, 4.0, 0.0625], [9.0, 0.25, 0.5625]]),
    ("Minimum", {"x1": t([1, 5], I64), "x2": t(3, I64)}, {}, t([1, 3], I64)),
    ("Maximum", {"x1": t([1, 5], I64), "x2": t(3, I64)}, {}, t([3, 5], I64)),
    ("Equal", {"x1": N, "x2": t(3, I64)}, {}, t([[0, 0, 1], [0, 0, 0]], BOOL)),
    ("NotEqual", {"x1": t([1, 2], I64), "x2": t(1, I64)}, {}, t([0, 1], BOOL)),
    ("Less", {"x1": t([1, 2, 3], I64), "x2": t(2, I64)}, {}, t([1, 0, 0], BOOL)),
    ("LessEqual", {"x1": t([1, 2, 3], I64), "x2": t(2, I64)}, {}, t([1, 1, 0], BOOL)),
    ("Greater", {"x1": t([[0, 1]], I64), "x2": t([[0], [1]], I64)}, {}, t([[0, 1], [0, 0]], BOOL)),
    ("GreaterEqual", {"x1": t([1, 2, 3], I64), "x2": t(2, I64)}, {}, t([0, 1, 1], BOOL)),
    ("LogicalAnd", {"x1": B, "x2": t([True, True, False], BOOL)}, {}, t([1, 0, 0], BOOL)),
    ("LogicalOr", {"x1": B, "x2": t([False, False, False], BOOL)}, {}, t([1, 0, 1], BOOL)),
    ("LogicalNot", {"x": B}, {}, t([0, 1, 0], BOOL)),
    ("Neg", {"x": N}, {}, t([[-1, 2, -3], [-4, -5, 6]], I64)),
    ("Sqrt", {"x": t([4.0, 2.25])}, {}, [2.0, 1.5]),
    ("Rsqrt", {"x": t([4.0, 0.25])}, {}, [0.5, 2.0]),
    ("Cos", {"x": X}, {}, np.cos(X.double().numpy())),
    ("Sin", {"x": X}, {}, np.sin(X.double().numpy())),
    ("Sigmoid", {"x": X}, {}, 1 / (1 + np.exp(-X.double().numpy()))),
    ("Exp", {"x": X}, {}, np.exp(X.double().numpy())),
    ("Exp", {"x": X}, {"base": -1.0, "scale": 1.0, "shift": 0.0}, np.exp(X.double().numpy())),
    ("Log", {"x": t([1.0, 10.0])}, {}, np.log([1.0, 10.0])),
    ("Muls", {"x": t([3.0], BF16)}, {"value": 0.25}, t([0.75], BF16)),
    ("Swish", {"x": X}, {"scale": 1.0}, X.numpy() / (1 + np.exp(-X.double().numpy()))),
    ("Swish", {"x": X}, {"scale": 2.0}, X.numpy() / (1 + np.exp(-2 * X.double().numpy()))),
    ("Cast", {"x": t([1.9, -1.9])}, {"dst_type": 9}, t([1, -1], I64)),
    ("Cast", {"x": t([1.0009765625, 70000.0])}, {"dst_type": 1}, t([1.0009765625, float("inf")], HALF)),
    ("Cast", {"x": t([0, 2], I64)}, {"dst_type": 12}, t([False, True], BOOL)),
    ("Cast", {"x": t([1 / 3])}, {"dst_type": 27}, t([1 / 3], BF16)),
    ("SelectV2", {"condition": B, "then": t([1.0, 2.0, 3.0]), "else": t(-1.0)}, {}, [1.0, -1.0, 3.0]),
    (
        "ClipByValueV2",
        {"x": t([-3, 1, 9], I64), "clip_value_min": t(0, I64), "clip_value_max": t([4], I64)},
        {},
        t([0, 1, 4], I64),
    ),
    ("Identity", {"x": X}, {}, X),
    ("Shape", {"x": X}, {"dtype": 9}, t([2, 3], I64)),
    ("Shape", {"x": X}, {}, t([2, 3], I32)),
    ("Gather", {"x": t([5, 7, 9], I64), "indices": t(1, I64)}, {"validate_indices": True}, t(7, I64)),
    ("GatherV2", {"x": X, "indices": t([[1, 0]], I64), "axis": t(0, I64)}, {}, torch.stack([X[1], X[0]])[None]),
    ("GatherV2", {"x": X, "indices": t([2], I32), "axis": t([-1], I64)}, {"batch_dims": 0}, [[0.25], [-0.75]]),
    ("GatherElements", {"x": N, "index": t([[2, 0], [1, 1]], I64)}, {"dim": 1}, t([[3, 1], [5, 5]], I64)),
    (
        "PadV3",
        {"x": t([[1.0, 2.0]], HALF), "paddings": t([0, 1, 2, 0], I64), "constant_values": t(5.0, HALF)},
        {"mode": "constant", "paddings_contiguous": True},
        t([[5.0, 5.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]], HALF),
    ),
    ("PadV3", {"x": t([3], I64), "paddings": t([[1, 1]], I32), "constant_values": None}, {}, t([0, 3, 0], I64)),
    ("Pack", {"x": [t(3, I64), t(4, I64)]}, {"N": 2, "axis": 0}, t([3, 4], I64)),
    ("Pack", {"x": [t(3, I32), t(4, I64)]}, {"N": 2}, t([3, 4], I64)),
    ("Pack", {"x": [t([1.0, 2.0]), t([3.0, 4.0])]}, {"N": 2, "axis": -1}, [[1.0, 3.0], [2.0, 4.0]]),
    ("ConcatV2", {"x": [X, Y], "concat_dim": t(0, I64)}, {"N": 2}, X.tolist() + Y.tolist()),
    ("ConcatV2", {"x": [Y, Y], "concat_dim": t(-1, I32)}, {"N": 2}, [Y[0].tolist() * 2]),
    ("Reshape", {"x": N, "shape": t([3, -1], I64)}, {"axis": 0, "num_axes": -1}, t([[1, -2], [3, 4], [5, -6]], I64)),
    ("Transpose", {"x": X, "perm": t([1, 0], I64)}, {}, [[1.5, 3.0], [-2.0, 0.5], [0.25, -0.75]]),
    ("Unsqueeze", {"x": Y[0]}, {"axes": [0, -1]}, [[[0.5], [4.0], [-1.0]]]),
    ("Squeeze", {"x": Y[:, :, None]}, {"axis": [0]}, [[0.5], [4.0], [-1.0]]),
    ("Squeeze", {"x": Y[:, :, None]}, {}, [0.5, 4.0, -1.0]),
    (
        "StridedSliceV2",
        {"x": N, "begin": t([-2], I64), "end": t([2147483647], I64), "axes": t([1], I64), "strides": t([1], I64)},
        {"begin_mask": 0, "end_mask": 0, "ellipsis_mask": 0, "new_axis_mask": 0, "shrink_axis_mask": 0},
        t([[-2, 3], [5, -6]], I64),
    ),
    ("StridedSliceV2", {"x": N, "begin": t([0, 0], I64), "end": t([2, -1], I64)}, {}, t([[1, -2], [4, 5]], I64)),
    (
        "StridedSliceV2",
        {"x": t([0, 1, 2, 3, 4], I64), "begin": t(1, I64), "end": t(5, I64), "axes": t(0, I64), "strides": t(2, I64)},
        {},
        t([1, 3], I64),
    ),
    ("BroadcastTo", {"x": t([[1.0], [2.0]]), "shape": t([2, 2, 2], I64)}, {}, [[[1.0, 1.0], [2.0, 2.0]]] * 2),
    ("Tile", {"x": Y, "multiples": t([2, 1], I64)}, {}, Y.tolist() * 2),
    ("Fill", {"dims": t([2], I64), "value": t(0.5, HALF)}, {}, t([0.5, 0.5], HALF)),
    ("Range", {"start": t(0, I32), "limit": t(4, I64), "delta": t(1, I32)}, {}, t([0, 1, 2, 3], I32)),
    ("Range", {"start": t(2, I64), "limit": t(9, I64), "delta": t(3, I64)}, {}, t([2, 5, 8], I64)),
    (
        "IndexByTensor",
        {"x": N, "indices": [t([[0]], I64), t([1, 2], I64)]},
        {"indices_mask": [1, 1]},
        t([[-2, 3]], I64),
    ),
    ("Cumsum", {"x": N, "axis": t(-1, I64)}, {"exclusive": False, "reverse": False}, t([[1, -1, 2], [4, 9, 3]], I64)),
    ("MatMul", {"x1": X, "x2": t([[1.0], [2.0], [4.0]]), "bias": None}, {}, [[-1.5], [1.0]]),
    ("MatMul", {"x1": X, "x2": t([[1.0, 2.0, 4.0]]), "bias": t([10.0])}, {"transpose_x2": True}, [[8.5], [11.0]]),
    ("MatMulV2", {"x1": t([[1.0], [2.0], [4.0]]), "x2": X.T.contiguous()}, {"transpose_x1": True}, [[-1.5, 1.0]]),
    ("BatchMatMul", {"x1": X[None], "x2": X[None]}, {"adj_x2": True}, [[[6.3125, 3.3125], [3.3125, 9.8125]]]),
    ("BatchMatMulV2", {"x1": Y.T[None].contiguous(), "x2": Y[None]}, {"offset_x": 0}, (Y.T * Y)[None]),
    ("BatchMatMulV2", {"x1": Y[None], "x2": Y[None]}, {"adj_x1": True}, (Y.T * Y)[None]),
    ("ReduceMean", {"x": X, "axes": t([-1], I64)}, {"keep_dims": True}, [[-0.25 / 3], [2.75 / 3]]),
    ("ReduceMean", {"x": X, "axes": t([1], I64)}, {"noop_with_empty_axes": True}, [-0.25 / 3, 2.75 / 3]),
    ("ReduceSum", {"x": X, "axes": t([0], I64)}, {"keep_dims": False}, [4.5, -1.5, -0.5]),
    ("ReduceMax", {"x": X, "axes": t([0, 1], I64)}, {}, 3.0),
    ("SoftmaxV2", {"x": t([[0.0, 0.6931471805599453]])}, {"axes": [-1], "half_to_float": False}, [[1 / 3, 2 / 3]]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "inputs", "attrs", "expected"), CASES)
def test_results(kind, inputs, attrs, expected):
    expected = expected if isinstance(expected, torch.Tensor) else torch.as_tensor(np.asarray(expected)).to(F32)
    if expected.dtype == F64:
        expected = expected.to(F32)
    (got,) = run_one(kind, inputs, attrs, expected.dtype)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-6 if got.dtype == F32 else 0, atol=0)


def test_every_operator_is_tested():
    # Those two have a file of their own, test_ge_attention.py.
    tested = {kind for kind, *_ in CASES} | {"FusedInferAttentionScore", "AttentionUpdate"}
    assert set(run.OPERATORS) == tested


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_products_are_rounded_once(dtype):
    """A sum of 4096 ones and halves accumulated in the dtype itself would stick at 2048 (float16) or 256 (bfloat16)."""
    a = torch.ones(1, 4096, dtype=dtype)
    (got,) = run_one("MatMul", {"x1": a, "x2": a.T.contiguous(), "bias": None})
    assert got.item() == 4096
    (got,) = run_one("ReduceSum", {"x": a, "axes": t([1], I64)})
    assert got.item() == 4096


I64_1 = t([1], I64)
REFUSED = [
    ("Add", {"x1": X, "x2": Y.half()}, {}, "one dtype"),
    ("Add", {"x1": X, "x2": t([1.0, 2.0])}, {}, "do not broadcast"),
    ("Add", {"x1": X}, {}, "'x2' is missing"),
    ("Add", {"x1": X, "x2": Y, "x3": Y}, {}, "input 'x3' is not implemented"),
    ("Add", {"x1": X, "x2": Y}, {"alpha": 2}, "attribute 'alpha' is not implemented"),
    ("Add", {"x1": X, "x2": Y}, {"_new_meaning": 2}, "attribute '_new_meaning' is not implemented"),
    ("FloorDiv", {"x1": I64_1, "x2": t([0], I64)}, {}, "has a zero"),
    ("RealDiv", {"x1": I64_1, "x2": I64_1}, {}, "must be of"),
    ("LogicalAnd", {"x1": B, "x2": X}, {}, "must be of bool"),
    ("Sqrt", {"x": N}, {}, "must be of"),
    ("Exp", {"x": X}, {"base": 2.0}, "'base' is implemented for -1.0 alone, got 2.0"),
    ("Log", {"x": X}, {"shift": 1.0}, "'shift'"),
    ("Muls", {"x": X}, {}, "attribute 'value' is missing"),
    ("Muls", {"x": X}, {"value": 2}, "must be float"),
    ("Muls", {"x": N}, {"value": 2.0}, "must be of"),
    ("Cast", {"x": X}, {"dst_type": 33}, "dst_type 33"),
    ("Cast", {"x": t([3e9])}, {"dst_type": 3}, "does not fit"),
    ("Cast", {"x": t([float("nan")])}, {"dst_type": 9}, "does not fit"),
    ("SelectV2", {"condition": B, "then": X, "else": X.half()}, {}, "one dtype"),
    ("ClipByValueV2", {"x": N, "clip_value_min": t(3, I64), "clip_value_max": t(2, I64)}, {}, "is above"),
    ("ClipByValueV2", {"x": N, "clip_value_min": t(3, I32), "clip_value_max": t(4, I64)}, {}, "must be of int64"),
    ("GatherElements", {"x": N, "index": t([[3]], I64)}, {"dim": 1}, "outside"),
    ("GatherElements", {"x": N, "index": t([[0], [0], [0]], I64)}, {"dim": 1}, "does not fit"),
    ("PadV3", {"x": Y, "paddings": t([1, 1], I64)}, {}, "for rank 2"),
    ("PadV3", {"x": Y, "paddings": t([-1, 0, 0, 0], I64)}, {}, "for rank 2"),
    ("PadV3", {"x": Y, "paddings": t([0, 0, 0, 0], I64), "constant_values": t(1.0, HALF)}, {}, "must be of float32"),
    ("PadV3", {"x": Y, "paddings": t([0, 0, 1, 1], I64)}, {"mode": "edge"}, "'mode'"),
    ("Shape", {"x": X}, {"dtype": 0}, "int32 or int64"),
    ("Gather", {"x": t([5, 7], I64), "indices": t(-1, I64)}, {}, "outside"),
    ("Gather", {"x": t([5, 7], I64), "indices": t(1.0)}, {}, "must be of int32, int64"),
    ("GatherV2", {"x": X, "indices": t([2], I64), "axis": t(0, I64)}, {}, r"outside \[0, 2\)"),
    ("GatherV2", {"x": X, "indices": t([0], I64), "axis": t(2, I64)}, {}, "out of range"),
    ("GatherV2", {"x": X, "indices": t([0], I64), "axis": t(0, I64)}, {"negative_index_support": True}, "alone"),
    ("Pack", {"x": [X, Y]}, {"N": 2}, "one dtype and shape"),
    ("Pack", {"x": [t([3], I32), t([4], I64)]}, {"N": 2}, "one dtype and shape"),
    ("Pack", {"x": [Y, Y]}, {"N": 3}, "N must be 2"),
    ("Pack", {"x": []}, {"N": 0}, "has no tensors"),
    ("ConcatV2", {"x": [X, Y], "concat_dim": t(1, I64)}, {"N": 2}, "do not fit along 1"),
    ("ConcatV2", {"x": [X, Y.half()], "concat_dim": t(0, I64)}, {"N": 2}, "one dtype"),
    ("Reshape", {"x": X, "shape": t([4, -1], I64)}, {}, "does not reshape"),
    ("Reshape", {"x": X, "shape": t([0, 6], I64)}, {}, "shape is"),
    ("Reshape", {"x": X, "shape": t([-1, -1], I64)}, {}, "shape is"),
    ("Transpose", {"x": X, "perm": t([0, 0], I64)}, {}, "no permutation"),
    ("Unsqueeze", {"x": X}, {"axes": [0, -4]}, "repeat"),
    ("Squeeze", {"x": X}, {"axis": [0]}, "not size 1"),
    ("StridedSliceV2", {"x": X, "begin": t([0], I64), "end": t([1], I64)}, {"end_mask": 1}, "'end_mask'"),
    ("StridedSliceV2", {"x": X, "begin": t([0, 0], I64), "end": t([1], I64)}, {}, "differ in length"),
    (
        "StridedSliceV2",
        {"x": X, "begin": I64_1, "end": t([0], I64), "axes": t([0], I64), "strides": t([-1], I64)},
        {},
        "from 1, got -1",
    ),
    ("StridedSliceV2", {"x": X, "begin": t([2], I64), "end": t([2], I64)}, {}, "is empty"),
    ("BroadcastTo", {"x": X, "shape": t([3, 3], I64)}, {}, "does not broadcast"),
    ("BroadcastTo", {"x": Y, "shape": t([-1, 3], I64)}, {}, "does not broadcast"),
    ("Tile", {"x": Y, "multiples": t([2], I64)}, {}, "multiples are"),
    ("Fill", {"dims": t([2], I64), "value": X}, {}, "one element"),
    ("Range", {"start": t(0, I64), "limit": t(4, I64), "delta": t(0, I64)}, {}, "delta is 0"),
    ("Range", {"start": t(2**31 - 2, I32), "limit": t(2**31 + 1, I64), "delta": t(1, I32)}, {}, "does not fit"),
    ("IndexByTensor", {"x": N, "indices": [t([0], I64)]}, {"indices_mask": [0, 1]}, "is not implemented"),
    ("IndexByTensor", {"x": N, "indices": [t([2], I64)]}, {"indices_mask": [1]}, "outside"),
    ("Cumsum", {"x": N, "axis": t(0, I64)}, {"reverse": True}, "'reverse'"),
    ("MatMul", {"x1": X, "x2": X}, {}, "do not multiply"),
    ("MatMul", {"x1": X[None], "x2": X[None]}, {"transpose_x2": True}, "must be matrices"),
    ("MatMul", {"x1": X, "x2": X.half()}, {"transpose_x2": True}, "one dtype"),
    ("MatMul", {"x1": X, "x2": X, "bias": t([1.0])}, {"transpose_x2": True}, "bias has shape"),
    ("BatchMatMul", {"x1": X[None], "x2": torch.stack([X, X])}, {"adj_x2": True}, "do not multiply"),
    ("ReduceMean", {"x": X, "axes": t([2], I64)}, {}, "out of range"),
    ("ReduceMean", {"x": X, "axes": torch.empty(0, dtype=I64)}, {}, "no axes"),
    ("ReduceMean", {"x": N, "axes": t([0], I64)}, {}, "must be of"),
    ("SoftmaxV2", {"x": X}, {"axes": [0, 1]}, "along one axis"),
    ("Einsum", {"x": X}, {}, "the operator is not implemented"),
]


@pytest.mark.parametrize(("kind", "inputs", "attrs", "text"), REFUSED)
def test_refusals(kind, inputs, attrs, text):
    with pytest.raises(GraphError, match=text) as caught:
        run_one(kind, inputs, attrs)
    assert str(caught.value).startswith(f"{kind} '{kind}_")
