"""Dynamo's recompile limit: what happens from there on, no backend is told.

A function of which Dynamo has compiled ``torch._dynamo.config.recompile_limit`` graphs is compiled no more: a call that
none of them fits runs as Python has it, and so dense. Dynamo has no hook there (its callbacks begin later), but it logs
a warning, at that place and while it still knows which function it is at: so its logger is listened to.
"""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from types import FrameType
from typing import Any

import torch
from torch._guards import CompileContext

from tmx_compile.errors import StrictModeError
from tmx_compile.report import Report

_LOGGER = "torch._dynamo.convert_frame"
_SAYS = "torch._dynamo hit config."
_WRAPPED_IN = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable", "compiler_fn")
_MOST_WRAPPERS = 10


class RecompileLimit:
    """Notices that Dynamo compiles a function no more of which a backend has compiled graphs, and says so once.

    Attributes:
        report: of the backend.
        strict: raise instead of warning.
        hit: what was said, "" as long as there is nothing to say.
        off: whether nothing is said any more.
    """

    def __init__(self, report: Report, strict: bool) -> None:
        self.report, self.strict = report, strict
        self.hit = ""
        self.off = False
        self._functions: set[int | None] = set()

    def compiling(self) -> None:
        """The backend compiles a graph: from now on what becomes of its function is listened for."""
        self._functions.add(_function())
        logger = logging.getLogger(_LOGGER)
        ours = [each for each in logger.filters if isinstance(each, _Listener)]
        for each in ours:
            if each.limit() is None:
                logger.removeFilter(each)
        if not any(each.limit() is self for each in ours):
            logger.addFilter(_Listener(self))

    def reached(self) -> None:
        """Dynamo has come to the limit of the function that it is at.

        Raises:
            StrictModeError: in strict mode, if it is one of the backend's.
        """
        if self.off or _function() not in self._functions:
            return
        # Dynamo's numbers of functions begin anew at a reset, and models of one class share theirs.
        asked = _backend_at_work()
        if asked is not None and getattr(asked, "report", None) is not self.report:
            return
        if not self.hit:
            self.hit = (
                f"Dynamo compiles no more graphs of a function after {self.report.graphs} of them (torch._dynamo.config"
                f".recompile_limit is {torch._dynamo.config.recompile_limit}): a call that fits none of them runs "
                "uncompiled, and dense unless the model is switched too (register_attention: docs/attach.md). "
                "TORCH_LOGS=recompiles tells what differs"
            )
            self.report.notes.append(self.hit)
            if not self.strict:
                warnings.warn(self.hit, stacklevel=2)
        if self.strict:
            raise StrictModeError(self.hit)

    def __deepcopy__(self, memo: dict[int, Any]) -> RecompileLimit:
        # That of the backend, of which there is one.
        return self


class _Listener(logging.Filter):
    """Lets every record by. It keeps no backend alive."""

    def __init__(self, limit: RecompileLimit) -> None:
        super().__init__()
        self.limit = weakref.ref(limit)

    def filter(self, record: logging.LogRecord) -> bool:
        limit = self.limit()
        if limit is not None and str(record.msg).startswith(_SAYS):
            limit.reached()
        return True


def _function() -> int | None:
    """Which function is being compiled, as Dynamo counts them."""
    compile_id = CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_id


def _backend_at_work() -> Any:
    """The backend that Dynamo compiles for as this is called, out of its own wrappers; None if it cannot be told."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and "compiler_fn" not in frame.f_locals:
        frame = frame.f_back
    found = None if frame is None else frame.f_locals["compiler_fn"]
    for _ in range(_MOST_WRAPPERS):
        inner = next((x for name in _WRAPPED_IN if (x := getattr(found, name, None)) is not None), None)
        if inner is None:
            return found
        found = inner
    return None
