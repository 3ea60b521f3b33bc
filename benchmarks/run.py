"""``python -m benchmarks.run [case ...] [--quick] [--out FOLDER]``: run cases and store their results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import common, kv_cache, operator, pass_cost, prefill_memory, throughput, training, ttft

CASES = (operator.CASE, pass_cost.CASE, prefill_memory.CASE, ttft.CASE, kv_cache.CASE, throughput.CASE, training.CASE)


def main(arguments: Sequence[str] | None = None) -> None:
    common.main("benchmarks.run", "Run benchmarks of tmx_compile.", CASES, arguments)


if __name__ == "__main__":
    main()
