"""What an attention layer may do to its scores beside scaling and masking them: learned sinks and a softcap."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_scores(query: Tensor, sink_logits: Tensor | None, softcap: float | None) -> None:
    """Raise ``ValueError`` naming the argument and its value, before any work.

    Args:
        query: (B, H, Sq, D).
        sink_logits: (H,) or None.
        softcap: positive and finite, or None.
    """
    if sink_logits is not None:
        if sink_logits.dim() != 1 or sink_logits.shape[0] != query.shape[1]:
            shape = tuple(sink_logits.shape)
            raise ValueError(f"sink_logits must be (query heads,) = ({query.shape[1]},), got shape {shape}")
        if not sink_logits.dtype.is_floating_point:
            raise ValueError(f"sink_logits must be a floating point tensor, got {sink_logits.dtype}")
        if sink_logits.device != query.device:
            raise ValueError(f"sink_logits must be on query's device {query.device}, got {sink_logits.device}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")


def sink_gradient(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """The gradient of the sink logits, (H,): that of any score, summed over all rows, for a value of zeros.

    With p = exp(sink logit - lse) the weight that a row leaves to its sink, it is -p * (rowsum(dO * O) - dLSE).

    Args:
        grad_out: (B, H, Sq, Dv), the gradient of ``out``.
        grad_lse: (B, H, Sq), that of ``lse``, or None.
        out: the operator's result.
        lse: (B, H, Sq), its log-sum-exp, the sink logits' part included.
        sink_logits: (H,).
    """
    dtype = torch.promote_types(out.dtype, torch.float32)
    passed = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        passed = passed - grad_lse
    weight = torch.exp(sink_logits.to(dtype)[:, None] - lse)
    # A sink of minus infinity has no weight, not even beside a row without keys.
    weight = torch.where(lse == float("-inf"), 0.0, weight)
    return -(weight * passed).sum((0, 2)).to(sink_logits.dtype)
