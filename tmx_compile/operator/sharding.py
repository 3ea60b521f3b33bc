"""How the operators of attention are split over processes: rules by which DTensors reach them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

# Have a batch and no heads: (B, Skv), (B, 3), (B, 2), (B,). All other tensors of these operators are (B, heads, ...).
_WITHOUT_HEADS = ("key_mask", "extent", "whole", "first_last_row")


def shard_by_batch_and_heads(*operators: OpOverload) -> None:
    """Tell DTensor that operators compute each sequence, and each key head with its query heads, by itself.

    So their tensors may be split over the batch, or over the heads, query heads as key heads; results and gradients are
    then split alike. Whatever else (a split of tokens or of head dims, a partial sum, key heads that the processes do
    not divide) is redistributed first. Without ``torch.distributed`` there is nobody to tell.

    Args:
        operators: with ``query`` and ``key`` among their tensors, all (batch, heads, ...) but ``_WITHOUT_HEADS``.
    """
    if not torch.distributed.is_available():
        return
    # Here and not when the first DTensor comes: torch._dynamo has imported DTensor long since.
    from torch.distributed.tensor.experimental import register_sharding

    for operator in operators:
        register_sharding(operator)(_rule(operator))


def _rule(operator: OpOverload) -> Callable[..., Sequence[tuple[list[Any], list[Any]]]]:
    """What DTensor asks: which placements one dimension of the mesh may have, as (results, arguments)."""
    from torch.distributed.tensor import Replicate, Shard

    names = [argument.name for argument in operator._schema.arguments]
    results = len(operator._schema.returns)

    def acceptable(*args: Any, **kwargs: Any) -> Sequence[tuple[list[Any], list[Any]]]:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in given.items() if hasattr(value, "placements")}

        def choice(result: Any, of_tensor: Callable[[str], Any]) -> tuple[list[Any], list[Any]]:
            return [result] * results, [of_tensor(name) if name in tensors else None for name in given]

        # Replicated first: of choices that cost the same, torch takes the first.
        choices = [choice(Replicate(), lambda name: Replicate()), choice(Shard(0), lambda name: Shard(0))]
        if _heads_can_be_split(tensors):
            choices.append(choice(Shard(1), lambda name: Replicate() if name in _WITHOUT_HEADS else Shard(1)))
        return choices

    return acceptable


def _heads_can_be_split(tensors: Mapping[str, Any]) -> bool:
    """Whether every part of the key heads is that of the same part of the query heads.

    Heads alike may be split unevenly. Else key heads must divide evenly, over all dimensions of the mesh that could
    come to split them: those where the tensors are neither replicated nor split over the batch.
    """
    from torch.distributed.tensor import Replicate, Shard

    query, key = tensors["query"], tensors["key"]
    if query.shape[1] == key.shape[1]:
        return True
    by_batch, by_heads = 1, 1
    for dim in range(query.mesh.ndim):
        placements = [spec.placements[dim] for spec in tensors.values()]
        if all(placement in (Replicate(), Shard(0)) for placement in placements):
            by_batch *= query.mesh.size(dim) if Shard(0) in placements else 1
        else:
            by_heads *= query.mesh.size(dim)
    # A batch smaller than its processes cannot stay split: then heads may come in its place.
    ways = by_heads if query.shape[0] >= by_batch else by_heads * by_batch
    return bool(key.shape[1] % ways == 0)
