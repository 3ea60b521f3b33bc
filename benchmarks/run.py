"""``python -m benchmarks.run [case ...] [--quick] [--out FOLDER]``: run cases and store their results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import common, operator, throughput, ttft

CASES = (operator.CASE, ttft.CASE, throughput.CASE)


def main(arguments: Sequence[str] | None = None) -> None:
    common.main("benchmarks.run", "Run benchmarks of tmx_compile.", CASES, arguments)


if __name__ == "__main__":
    main()
