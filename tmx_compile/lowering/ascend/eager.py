"""The operator on NPU tensors where nothing is compiled: the same calls, made one by one."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tmx_compile.lowering.ascend.attention import Sections, attention
from tmx_compile.lowering.ascend.calls import Calls, compressed_mask
from tmx_compile.lowering.ascend.lowering import Ascend
from tmx_compile.lowering.base import AttentionCall, arange
from tmx_compile.operator.triangle import checked, plain_forward
from tmx_compile.report import Rejected


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``tmx::triangle_attention`` through torch_npu's fused operators; what they cannot take, in plain PyTorch.

    Arguments, result and errors are those of :func:`tmx_compile.operator.triangle_attention`.
    """
    query, key, value, key_mask, geometry, scale, sink_logits, softcap = checked(*arguments)
    call = AttentionCall(query, key, value, key_mask, geometry, scale, False, sink_logits=sink_logits, softcap=softcap)
    if isinstance(Ascend().supports(call), Rejected):
        return plain_forward(*arguments)

    def run(operator: Any, *args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)

    mask = functools.cache(lambda: compressed_mask(query, arange))
    calls = Calls(run, mask, query.shape[1], key.shape[1], scale, with_lse=True)
    done = attention(query, key, value, key_mask, Sections(call.geometry), calls)
    # (B, Sq, H, Dv) in memory, as the operator's fake kernel says.
    return done.out.transpose(1, 2).contiguous().transpose(1, 2), done.lse[..., 0].contiguous()


_KERNELS = torch.library.Library("tmx", "IMPL", "PrivateUse1")  # type: ignore[no-untyped-call]
_KERNELS.impl("triangle_attention", forward)  # type: ignore[no-untyped-call]
