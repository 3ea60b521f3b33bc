"""``python -m studies.run [case ...] [--quick] [--out FOLDER]``: run studies and store their results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import common
from studies import (
    amx,
    amx_vllm,
    calibration,
    dense,
    first_n,
    floor,
    kv_cache,
    million,
    pass_cost,
    prefill_memory,
    quality,
    recall,
    short_prompts,
    soak,
    softmax_skip,
    stacked,
    stacked_coverage,
    stacked_frontier,
    stacked_kernels,
    stacked_layer,
    stacked_mixes,
    stacked_model,
    stacked_recall,
    stacked_selection,
    switch,
    training,
    training_step,
    two_forms,
)
from studies.clients import case as clients

CASES = (
    *(clients.CASE, first_n.CASE, calibration.CASE, quality.CASE, recall.CASE, stacked.CASE),
    *(pass_cost.CASE, prefill_memory.CASE, kv_cache.CASE, million.CASE, switch.CASE, training.CASE),
    *(
        amx.CASE,
        amx_vllm.CASE,
        dense.CASE,
        floor.CASE,
        short_prompts.CASE,
        training_step.CASE,
        soak.CASE,
        softmax_skip.CASE,
        stacked_coverage.CASE,
        stacked_frontier.CASE,
        stacked_kernels.CASE,
        stacked_layer.CASE,
        stacked_mixes.CASE,
        stacked_model.CASE,
        stacked_recall.CASE,
        stacked_selection.CASE,
        two_forms.CASE,
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    common.main("studies.run", "Run studies of triangle attention.", CASES, arguments)


if __name__ == "__main__":
    main()
