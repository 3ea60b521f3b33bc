"""Dense causal attention without an N x N mask: for layers that stay dense in a graph whose masks were proven.

Hugging Face builds a (B, 1, N, N) mask for every padded prompt; one dense layer that still reads it would keep it
alive. The numbers are those of dense attention; only the mask is gone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.fx import Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer
from tmx_compile.report import Accepted, Reason, Rejected


class Dense(Lowering):
    """The ``sdpa`` lowering: takes only calls whose every row is a last row."""

    name = "sdpa"

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """Equal numbers of rows and keys; with padding, CPU inference (its flash kernel takes a key bias)."""
        if call.documents or call.geometry.reach is not None:
            return Rejected(Reason.NO_LOWERING, "sdpa: causal and padding only")
        if call.changes:
            return Rejected(Reason.NO_LOWERING, f"sdpa: {call.changes}")
        if not statically_known_true(call.query.shape[2] == call.key.shape[2]):
            return Rejected(Reason.NO_LOWERING, "sdpa: is_causal needs equal numbers of rows and keys")
        if call.key_mask is None:
            return Accepted()
        if call.query.device.type != "cpu":
            return Rejected(Reason.NO_LOWERING, f"sdpa: no causal kernel with padding on {call.query.device.type}")
        if call.needs_grad:
            return Rejected(Reason.NO_LOWERING, "sdpa: causal with padding is forward only")
        if call.query.shape[3] != call.value.shape[3]:
            return Rejected(Reason.NO_LOWERING, "sdpa: causal with padding needs equal key and value head dims")
        if call.query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Rejected(Reason.NO_LOWERING, f"sdpa: causal with padding does not take {call.query.dtype}")
        if 0 in call.query.shape:
            return Rejected(Reason.NO_LOWERING, "sdpa: an empty tensor")
        return Accepted()

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """``is_causal`` SDPA; with padding, the CPU flash kernel with a (B, 1, 1, Skv) bias."""
        q, k, v, key_mask = operands.of_attention
        if key_mask is None:
            causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale, enable_gqa=True)
            return cast("Proxy", causal)
        bias = torch.where(key_mask, 0.0, float("-inf")).to(call.query.dtype)[:, None, None, :]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out: Any = write.call(flash, q, k, v, 0.0, True, attn_mask=bias, scale=call.scale)
        return cast("Proxy", out[0])
