"""A model whose attention is switched layer by layer, as an attention implementation of Transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.stacked_estimates import estimated_lists
from studies.stacked_peaks import peak_lists
from tmx_compile.mask import Geometry
from tmx_compile.mask.selection import Selection
from tmx_compile.operator import triangle_attention
from tmx_compile.operator.dynamic import attend as plain_attend
from tmx_compile.operator.dynamic import block_sparse_attention

GEOMETRY = (8, 512, 128)


@dataclass(frozen=True)
class Layers:
    """What the layers of a model do: the triangle layers, the dynamic ones, and how those choose.

    ``shares`` are those of the dynamic layers where they differ. With ``peaks`` lists come from exact scores
    (:mod:`studies.stacked_peaks`), with an ``estimate`` from one of :mod:`studies.stacked_estimates`, not by the
    selection's method.
    """

    triangle: tuple[int, ...] = ()
    dynamic: tuple[int, ...] = ()
    selection: Selection | None = None
    shares: tuple[float, ...] = ()
    peaks: bool = False
    estimate: str = ""

    def of(self, layer: int) -> Selection:
        """How a dynamic layer chooses."""
        assert self.selection is not None
        return replace(self.selection, share=self.shares[self.dynamic.index(layer)]) if self.shares else self.selection


class Board:
    """A model whose attention is switched, and what its dynamic layers visited.

    ``dense`` is what the other layers compute, and may be replaced.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        from transformers import AttentionInterface

        self.model, self.name, self.layers = model, name, Layers()
        self.visited: list[Tensor] = []
        self.dense = dense
        AttentionInterface.register(name, self.attend)
        model.set_attn_implementation(name)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        layers, scale = self.layers, rest["scaling"]
        if module.layer_idx in layers.dynamic:
            way = layers.of(module.layer_idx)
            if layers.peaks or layers.estimate:
                out, visited = by_lists(query, key, value, way, scale, layers.estimate)
            else:
                out, visited = dynamic(query, key, value, way, scale)
            self.visited.append(visited)
        elif module.layer_idx in layers.triangle:
            out = triangle(query, key, value, scale)
        else:
            out = self.dense(query, key, value, scale)
        return out.transpose(1, 2).contiguous(), None

    def logits(self, ids: Tensor, keep: int, layers: Layers) -> tuple[Tensor, float]:
        """Logits (B, keep, V) float32 of the last positions, and the density of the dynamic layers."""
        self.layers, self.visited = layers, []
        with torch.no_grad():
            out = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.float()
        if not self.visited:
            return out, 1.0
        visited, causal = torch.stack(self.visited).sum(0).tolist()
        return out, visited / causal


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def dynamic(query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """Block-sparse attention by the form that is there."""
    if query.is_cuda:
        from tmx_compile.lowering.triton.dynamic.op import TRITON_BLOCK_SPARSE

        both: tuple[Tensor, Tensor] = TRITON_BLOCK_SPARSE(query, key, value, None, *selection.arguments, scale)
        return both
    return block_sparse_attention(query, key, value, selection=selection, scale=scale)


def by_lists(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float, estimate: str
) -> tuple[Tensor, Tensor]:
    """The same over lists from an estimate, or without one from exact scores."""
    if estimate:
        lists = estimated_lists(estimate, query, key, selection, scale)
    else:
        lists = peak_lists(query, key, selection, scale)
    attend: Any = plain_attend
    if query.is_cuda:
        from tmx_compile.lowering.triton.dynamic.launch import attend
    return attend(query, key, value, None, lists, selection.block, scale), lists.visited


def triangle(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Triangle attention by the form that is there."""
    if query.is_cuda:
        from tmx_compile.lowering.base import AttentionCall
        from tmx_compile.lowering.triton.lowering import attend

        out = attend(AttentionCall(query, key, value, None, Geometry(*GEOMETRY), scale, False))
        assert isinstance(out, Tensor), out
        return out
    sink, window, last = GEOMETRY
    return triangle_attention(query, key, value, sink=sink, window=window, last=last, scale=scale)[0]
