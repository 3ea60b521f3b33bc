"""What travels between processes that split a prompt, by formula: bytes sent in one layer by all together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One attention layer: heads, key heads, head dim, and bytes of a number."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2

    @property
    def key_bytes(self) -> int:
        """Of one token's keys and values."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize

    @property
    def row_bytes(self) -> int:
        """Of one token's queries, or of its results."""
        return self.heads * self.head_dim * self.itemsize


def triangle(layer: Layer, ranks: int, geometry: tuple[int, int, int]) -> int:
    """Sinks and last rows' queries to all the others, a halo to each neighbour, partial results to the final process.

    A partial result has a float32 log-sum-exp for each row and head beside it. The length plays no part.
    """
    sink, window, last = geometry
    partial = layer.row_bytes + layer.heads * max(4, layer.itemsize)
    return (ranks - 1) * ((sink + window) * layer.key_bytes + last * (layer.row_bytes + partial))


def heads(layer: Layer, ranks: int, tokens: int) -> int:
    """Queries, keys, values and results, each to the process of its heads and back; heads that the ranks divide."""
    return tokens * (2 * layer.row_bytes + layer.key_bytes) * (ranks - 1) // ranks


def gathered(layer: Layer, ranks: int, tokens: int) -> int:
    """Keys and values of every process to every other one."""
    return tokens * layer.key_bytes * (ranks - 1)
