"""``tmx::block_sparse_attention``: causal attention over blocks of keys that are chosen while it runs."""

from __future__ import annotations

from tmx_compile.operator.dynamic.choice import Lists, select
from tmx_compile.operator.dynamic.listed import attend
from tmx_compile.operator.dynamic.operator import BLOCK_SPARSE, block_sparse_attention

__all__ = ["BLOCK_SPARSE", "Lists", "attend", "block_sparse_attention", "select"]
