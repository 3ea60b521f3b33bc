"""vLLM's own CPU kernel, called without the engine as the study of it does."""

from __future__ import annotations

import torch
from vllm import _custom_ops  # noqa: F401, it loads the operators

from studies import amx, amx_vllm


def test_the_study_calls_the_kernel_rightly() -> None:
    records = amx_vllm.compared(torch.ops._C, "SmolLM2-135M", amx_vllm.QUICK)
    amx_vllm.finish(records)
    for record in records:
        assert max(record[f"{kind}error"] for kind in ("", "vllm_", "sdpa_", "window_")) < 0.02
    assert records[0]["heads"] == list(amx.SHAPES["SmolLM2-135M"])
