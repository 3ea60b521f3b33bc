"""Packed sequences: which mask functions of Transformers say so, and which rows belong together.

Without a 2-D mask and without a cache Transformers looks into the position ids for starts of sequences. Where it finds
none it forgets them; but while a graph is traced it cannot tell, and every prompt gets the function.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function


def is_packed(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask function is that of packed sequences, each of them causal.

    While Dynamo traces, that of a function which the same graph has made; any other one may have changed when the graph
    runs again.
    """
    if torch.compiler.is_dynamo_compiling():
        return bool(_is_traced_packed())
    return _is_written(_function_parts(mask_function), _function_parts)


def numbers_of(mask_function: Callable[..., Any], batch: int, rows: int, device: Any) -> Tensor:
    """The numbers (B, rows) int64, from 1 on, of the packed sequences that a mask function shows.

    A row sees the key before its own where both are of one sequence: Transformers begins another one wherever positions
    are not consecutive.
    """
    sequence = torch.arange(batch, device=device)[:, None]
    row = torch.arange(1, rows, device=device)[None]
    starts = ~mask_function(sequence, torch.zeros_like(sequence), row, row - 1)
    return F.pad(starts, (1, 0), value=True).cumsum(1)


_Parts = tuple[types.CodeType, tuple[Any, ...]]
"""A function's code, and what it closes over."""


def _is_written(parts: _Parts | None, parts_of: Callable[[Any], _Parts | None]) -> bool:
    """Whether a function is what Transformers 5.23 writes for packed sequences: sequences and-ed with positions."""
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    if parts is None or remap is None or parts[0] is not and_masks().__code__:
        return False
    nothing = torch.empty(0)
    (joined,) = parts[1]
    inner = [parts_of(function) for function in joined] if isinstance(joined, (tuple, list)) else []
    found = [part for part in inner if part is not None]
    if not len(found) == len(inner) == 2:
        return False
    (sequences, _), (positions, cells) = found
    same = sequences is packed_sequence_mask_function(nothing).__code__
    same = same and positions is remap(causal_mask_function, nothing).__code__
    return same and any(parts_of(cell) == _function_parts(causal_mask_function) for cell in cells)


def _function_parts(function: Any) -> _Parts | None:
    if not isinstance(function, types.FunctionType):
        return None
    return function.__code__, tuple(cell.cell_contents for cell in function.__closure__ or ())


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _is_traced_packed() -> bool:
    """Run by Dynamo while it traces :func:`is_packed`, whose local it looks into: traced code could not."""
    try:
        return is_local_packed("mask_function")
    except Exception:
        # The insides of Dynamo are read, as torch 2.13 has them. One that has others may miss any of them, and say so
        # in any way: not understood, and so the mask is written out, and the layers stay dense with that as the reason.
        return False


def is_local_packed(name: str) -> bool:
    """Whether a local variable of the function that Dynamo traces is the mask function of packed sequences."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    here: Any = InstructionTranslator.current_tx().output.current_tx

    def parts_of(function: Any) -> _Parts | None:
        function = function.realize()
        if function.source is not None:
            # Of the world outside: Dynamo guards on its code, not on what it closes over.
            fixed = getattr(function, "fn", None)
            return _function_parts(fixed) if fixed is causal_mask_function else None
        cells = getattr(function, "closure", None)
        if cells is None or not hasattr(function, "code"):
            return None
        found = [here.output.side_effects.load_cell(cell).realize() for cell in cells.items]
        return function.code.as_python_constant(), tuple(getattr(x, "items", x) for x in found)

    return _is_written(parts_of(here.symbolic_locals[name]), parts_of)
