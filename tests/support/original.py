"""Problems in the layout of the original API, the oracle of explicit masks, and a count of matrix products."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tmx_compile import AscendNPUTriangleMixOptimizer

INF = float("inf")
kernel = AscendNPUTriangleMixOptimizer.sparse_attention_kernel
optimize = AscendNPUTriangleMixOptimizer.optimize_mask_for_npu


def tensors(batch=1, rows=40, keys=None, heads=4, kv_heads=2, dim=8, v_dim=None, dtype=torch.float32, grad=False):
    """query, key, value in the layout of the original API: (batch, seq, heads, head_dim)."""
    keys = rows if keys is None else keys
    shapes = [(rows, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, v_dim or dim)]
    return [torch.randn(batch, *shape).to(dtype).requires_grad_(grad) for shape in shapes]


def written_out(query, key, value, scores_added, seen, scale):
    """Every score in float64; ``scores_added`` and ``seen`` broadcast to (B, H, Sq, Skv). A row without keys is 0."""
    group = query.shape[2] // key.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale + scores_added.double()).masked_fill(~seen, -INF)
    alive = seen.expand(scores.shape).any(-1, keepdim=True)
    return (torch.softmax(scores.masked_fill(~alive, 0.0), -1) * alive @ v).transpose(1, 2)


def by_mask(query, key, value, mask, scale):
    """What the kernel promises: floats from -1e4 down mask, the others are added."""
    return written_out(query, key, value, mask.clamp(min=-1e4), mask > -9984.0, scale)


def additive(seen, dtype=torch.float32):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -INF)


class Products(TorchDispatchMode):
    """Counts the multiplications of every matrix product."""

    def __init__(self):
        super().__init__()
        self.count, self.calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            *batch, m, k = args[0].shape
            self.count += (batch[0] if batch else 1) * m * k * args[1].shape[-1]
            self.calls += 1
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The size of the largest result of any operator, or of one."""

    def __init__(self, only=None):
        super().__init__()
        self.numel, self._only = 0, only

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self._only in (None, func):
            found = out if isinstance(out, (tuple, list)) else [out]
            self.numel = max([self.numel, *(x.numel() for x in found if isinstance(x, torch.Tensor))])
        return out


def products(call, *arguments):
    with torch.no_grad(), Products() as counted:
        call(*arguments)
    return counted


def nonempty(seen, block):
    """Non-empty blocks of each mask plane, counted cell by cell."""
    seen = seen.reshape(-1, *seen.shape[-2:])
    rows, keys = (range(0, n, block) for n in seen.shape[1:])
    return sum(bool(plane[r : r + block, k : k + block].any()) for plane in seen for r in rows for k in keys)
