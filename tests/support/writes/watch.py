"""What eager attention sees: which rows have a defined result, and the sparse mask as an oracle."""

from __future__ import annotations

import torch
from torch import Tensor

MASKED = -1e4


class Watch:
    """Called by every attention of an eager run, and by none of a compiled one.

    Attributes:
        undefined: (B, N) bool: rows whose result the compiled model need not have. They see no key; or stand before
            their sequence's first visible key or after its last, where a sparse layer gives zeros; or see such a row
            of the layer below.
        lost: such rows came into a cache, where nothing follows them further.
        limits: layer -> (sinks, window, last rows), for layers that are to attend sparsely.
    """

    def __init__(self) -> None:
        self.limits: dict[int, tuple[int, int, int]] = {}
        self.start()

    def start(self) -> None:
        """Forget the last call."""
        self.undefined: Tensor | None = None
        self.lost = False

    def limited(self, seen: Tensor, layer: torch.nn.Module) -> Tensor:
        """A mask (bool, True = attend) or scores or an additive mask, with the layer's sparse mask joined to it."""
        visible = seen.detach().clone() if seen.dtype == torch.bool else seen.detach() > MASKED
        visible = visible.reshape(*(1,) * (4 - visible.dim()), *visible.shape)
        rows, keys = visible.shape[2:]
        if rows != keys:
            # A static cache.
            self.lost = self.lost or not bool(visible.any(-1).all())
            return seen
        visible = visible.any(1) if visible.shape[1] == 1 else visible.all(1)
        place = torch.arange(keys)
        shown = visible.any(1)
        first = torch.where(shown, place, keys).amin(1)[:, None]
        end = torch.where(shown, place, -1).amax(1)[:, None] + 1
        limit = self.limits.get(int(type(layer).__name__.removeprefix("Layer")))
        if limit is not None:
            sinks, window, last = limit
            near = (place < first + sinks)[:, None] | (place[:, None] - place <= window)
            allowed = near | (place >= end - last)[:, :, None]
            visible = visible & allowed
            allowed = allowed[:, None]
            seen = seen & allowed if seen.dtype == torch.bool else seen.masked_fill(~allowed, -torch.inf)
        undefined = (place < first) | (place >= end) | ~visible.any(2)
        if self.undefined is not None:
            reached = (visible & self.undefined[:, None]).any(2)
            undefined = undefined | reached | self.undefined
        self.undefined = undefined
        return seen


WATCH = Watch()
