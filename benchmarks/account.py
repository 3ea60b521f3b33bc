"""Where the time of one call goes: the profiler's kernels by class, and what is left to gain."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tmx_compile.bench.floor import Ceilings, Shape, causal_pairs
from tmx_compile.mask.geometry import Geometry

# By the names of kernels, the first class that fits. Inductor's pointwise kernels come first: they carry the names of
# what they copy for. SDPA's, FlexAttention's and this package's own kernels come before products: some carry the name
# of the matrix library that they are built with.
CLASSES = (
    ("other", re.compile(r"^triton_(poi|per|red|for)_")),
    ("attention", re.compile(r"flash|fmha|sdpa|attention|flex|triangle|hopper|tmx|triton_tem_(?!.*mm)", re.IGNORECASE)),
    ("matmul", re.compile(r"gemm|nvjet|cutlass|xmma|cublas|splitk|(^|:)(add)?b?mm$|triton_(tem_.*)?mm", re.IGNORECASE)),
)
_SHOWN = 12


def kernel_class(name: str) -> str:
    """ "attention", "matmul" or "other"."""
    return next((title for title, pattern in CLASSES if pattern.search(name)), "other")


def account(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Milliseconds of one call by class, the number of kernels, and the longest of them by name.

    On CUDA these are kernels on the GPU, which may overlap; on a CPU, operators and their own time.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]) as found:
        run()
        if cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    spent: dict[str, float] = defaultdict(float)
    count = 0
    for item in found.key_averages():
        if item.device_type != wanted or item.is_user_annotation:
            continue
        spent[item.key] += (item.self_device_time_total if cuda else item.self_cpu_time_total) / 1e3
        count += item.count
    by_class = dict.fromkeys(("attention", "matmul", "other"), 0.0)
    for name, ms in spent.items():
        by_class[kernel_class(name)] += ms
    longest = sorted(spent.items(), key=lambda item: -item[1])[:_SHOWN]
    return {
        **{f"{title}_ms": ms for title, ms in by_class.items()},
        "kernels": count,
        "longest": [[name[:120], kernel_class(name), ms] for name, ms in longest],
    }


def floor_limit(
    dense_ms: float,
    attention_ms: float,
    copy_bytes_per_s: float,
    shape: Shape,
    layers: int,
    sparse: int,
    geometry: Geometry,
) -> float:
    """Milliseconds of a whole model whose ``sparse`` triangle layers cost only the floor, and nothing else changed.

    ``attention_ms`` is what all ``layers`` spend in dense attention, of ``dense_ms``.
    """
    layer_ms = attention_ms / layers
    ceilings = Ceilings(copy_bytes_per_s, shape.flops(causal_pairs(shape.n)) / (layer_ms / 1e3))
    floor_ms, _ = ceilings.floor(shape, geometry)
    return dense_ms - sparse * (layer_ms - floor_ms)
