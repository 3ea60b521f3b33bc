"""CPU kernels for the operators of torch_npu that this package calls, with the semantics of the tests' GE interpreter.

Where torch_npu is loaded its own schemas and meta kernels are used, and only the CPU kernels are added. Elsewhere the
schemas are defined too, so that the lowering can be run in the tests' main process.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.support.ascend.ge import attention
from tests.support.ascend.ge.node import Call

FIA = """npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None,
Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, int num_heads=1,
float scale=1.0, int pre_tokens=2147483647, int next_tokens=2147483647, str input_layout="BSH",
int num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)"""
UPDATE = "npu_attention_update(Tensor[] lse, Tensor[] local_out, int update_type) -> (Tensor, Tensor)"
_FIELDS = {int: "i", float: "f", bool: "b", str: "s"}
_KEPT: list[Any] = []

called: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = []
"""What was called since the list was last cleared: operator, query's shape, key's shape, sparse mode."""


def install() -> None:
    """Make the operators callable on CPU tensors; once per process."""
    if _KEPT:
        return
    if not hasattr(torch.ops.npu, "npu_fused_infer_attention_score"):
        definitions = torch.library.Library("npu", "FRAGMENT")
        definitions.define(" ".join(FIA.split()))
        definitions.define(UPDATE)
        torch.library.register_fake("npu::npu_fused_infer_attention_score", _fia_shapes, lib=definitions)
        torch.library.register_fake("npu::npu_attention_update", _update_shapes, lib=definitions)
        _KEPT.append(definitions)
    kernels = torch.library.Library("npu", "IMPL", "CPU")
    kernels.impl("npu_fused_infer_attention_score", _fia)
    kernels.impl("npu_attention_update", _update)
    _KEPT.append(kernels)


def _call(kind: str, inputs: dict[str, torch.Tensor | None], attributes: dict[str, Any]) -> Call:
    fields = {}
    for name, value in attributes.items():
        field = _FIELDS[type(value)]
        stored = value.encode() if isinstance(value, str) else value
        fields[name] = SimpleNamespace(**{field: stored}, WhichOneof=lambda _, field=field: field)
    return Call(SimpleNamespace(type=kind, name="call", attr=fields), inputs)


def _fia(query, key, value, *, atten_mask=None, **attributes):
    for name, x in (("query", query), ("key", key), ("value", value)):
        assert x.is_contiguous(), f"{name} is not contiguous"
    mode = attributes.get("sparse_mode", 0)
    called.append(("FIA", tuple(query.shape), tuple(key.shape), mode))
    inputs = {"query": query, "key0": key, "value0": value, "atten_mask": atten_mask}
    call = _call("FusedInferAttentionScore", inputs, attributes)
    results = attention.fused_infer_attention_score(call)
    call.check_complete()
    return results


def _update(lse, local_out, update_type):
    called.append(("Update", tuple(local_out[0].shape), (), update_type))
    inputs = {f"lse{i}": x for i, x in enumerate(lse)} | {f"go{i}": x for i, x in enumerate(local_out)}
    call = _call("AttentionUpdate", inputs, {"update_type": update_type, "sp": len(lse)})
    out, merged = attention.attention_update(call)
    # What the manual calls invalid must not be used.
    return out, merged if isinstance(merged, torch.Tensor) else torch.full_like(lse[0], float("nan"))


def _fia_shapes(query, key, value, *, softmax_lse_flag=False, input_layout="BSH", **_):
    assert input_layout == "BNSD"
    lse = query.new_empty((*query.shape[:3], 1) if softmax_lse_flag else (0,), dtype=torch.float32)
    return query.new_empty((*query.shape[:3], value.shape[3])), lse


def _update_shapes(lse, local_out, update_type):
    return torch.empty_like(local_out[0]), torch.empty_like(lse[0])
