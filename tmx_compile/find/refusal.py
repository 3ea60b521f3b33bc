"""How a finder gives up a call that it has begun to read."""

from __future__ import annotations

from typing import NoReturn

from torch.fx import Node

from tmx_compile.graph.calls import call_of
from tmx_compile.report import Reason, Rejected


class NotAttention(Exception):
    """Raised while reading, with the refusal that it becomes."""

    def __init__(self, rejected: Rejected) -> None:
        super().__init__(str(rejected))
        self.rejected = rejected


def refuse(reason: Reason, detail: str, node: Node) -> NoReturn:
    """Give up a site."""
    raise NotAttention(Rejected(reason, detail, node))


def check_dropout(node: Node) -> None:
    """Dropout that does nothing: outside of training, or of probability 0."""
    call = call_of(node)
    if call is None:
        refuse(Reason.DROPOUT, "of arguments that are not understood", node)
    # Without a word about it, ``native_dropout`` trains.
    training, p = call["training"] is not False, call["p"]
    if training and not (isinstance(p, (int, float)) and p == 0):
        refuse(Reason.DROPOUT, f"p={p} on the weights", node)
