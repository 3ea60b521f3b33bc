"""Exceptions of the package.

Bad arguments are plain ``ValueError``; the classes here are for the compiler's own refusals.
"""

from __future__ import annotations


class TriangleMixError(RuntimeError):
    """Base class of every error that the pass or a lowering raises about a graph."""


class StrictModeError(TriangleMixError):
    """A site in a triangle layer stayed dense, and the user asked for ``strict=True``."""


class LoweringError(TriangleMixError):
    """The lowering that the user named cannot handle a call; the message names the lowering and the reason."""


class VerificationError(TriangleMixError):
    """The rewritten graph broke one of the pass's own invariants; always a defect of this package."""
