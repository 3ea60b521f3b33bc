"""What a calibration reads: of the same manual the chapters that quality is not measured on."""

from __future__ import annotations

from benchmarks.texts import EVALUATION

# Chapters that repeat parts of those kept for evaluation.
_REPEATED = (
    *("async", "attribute-access", "callable-types", "class", "context-managers", "customization", "else", "for"),
    *("function", "if", "numeric-types", "sequence-types", "try", "while", "with"),
)


def _calibration() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return tuple(sorted(name for name in topics if name not in EVALUATION and name not in _REPEATED))


CALIBRATION = _calibration()
"""All others."""
