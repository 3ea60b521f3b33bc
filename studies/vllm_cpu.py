"""Attention of one layer for a whole prompt on a CPU: vLLM's own kernel from its pages, against what the plugin does.

    .vllm/bin/python -m studies.vllm_cpu OUT/vllm_cpu.json [--quick]

Needs vLLM's CPU build; so it is no case of ``studies.run``. Triangle: streaming rows by vLLM's kernel from pages of
their own, which are written in that time, last rows by it from the prompt's. One thread, and its processor time, which
other work on the machine lengthens least; medians of rounds that are taken in turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tmx_compile.bench import record
from tmx_compile.integrations.vllm import pages
from tmx_compile.mask import Geometry, pair_counts

BLOCK = 128  # tokens of a block, vLLM's default on a CPU
LENGTHS = (2048, 6144, 16384)
GEOMETRIES = (Geometry(8, 256, 128), Geometry(8, 512, 128))
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3.1-8B, a quarter of the heads": (8, 2, 128)}
DTYPES = (torch.bfloat16, torch.float32)
ROUNDS = 5
LOWERING = pages.NAME  # of streaming rows, what "auto" takes


class Layer:
    """One layer's tensors, and its keys and values in vLLM's pages.

    Args:
        n: tokens of the prompt.
        shape: heads, key heads, head dim.
        dtype: of everything.
    """

    def __init__(self, n: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        from vllm import _custom_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        from tmx_compile.integrations.vllm.cpu import Impl

        self.ops: Any = _custom_ops
        self.n, self.dtype = n, dtype
        self.heads, self.kv_heads, self.dim = shape
        self.isa: str = _get_attn_isa(dtype, BLOCK, self.dim)
        self.scale = self.dim**-0.5
        # As the projections leave them: one row of a step after the other.
        self.query = torch.randn(n, self.heads, self.dim).to(dtype)
        self.key, self.value = torch.randn(2, n, self.kv_heads, self.dim).to(dtype)
        self.out = torch.empty_like(self.query)
        blocks = -(-n // BLOCK)
        self.table = torch.randperm(blocks, dtype=torch.int32)[None]
        cache = torch.zeros(blocks, self.kv_heads, 2 * BLOCK, self.dim, dtype=dtype)
        self.halves = cache.chunk(2, dim=2)
        place = torch.arange(n)
        slots = self.table[0].long()[place // BLOCK] * BLOCK + place % BLOCK
        scales: dict[str, Any] = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto"}
        _custom_ops.cpu_attn_reshape_and_cache(self.key, self.value, *self.halves, slots, self.isa, **scales)
        self.impl = Impl.__new__(Impl)
        self.impl.scale = self.scale

    def metadata(self, rows: int) -> Any:
        """What the kernel asks for the last ``rows`` rows; the engine makes it once for all layers."""
        starts, lengths = torch.tensor([0, rows], dtype=torch.int32), torch.tensor([self.n], dtype=torch.int32)
        plan = self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.dim, seq_lens=lengths,
            dtype=self.dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=self.isa,
            enable_kv_split=True,
        )  # fmt: skip
        return starts, lengths, plan

    def dense(self, rows: int, metadata: Any) -> None:
        """The last ``rows`` rows over all keys, by vLLM."""
        starts, lengths, plan = metadata
        self.ops.cpu_attention_with_kv_cache(
            query=self.query[self.n - rows :], key_cache=self.halves[0], value_cache=self.halves[1],
            output=self.out[self.n - rows :], query_start_loc=starts, seq_lens=lengths, scale=self.scale, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=self.table, softcap=0, scheduler_metadata=plan,
            s_aux=None,
        )  # fmt: skip

    def triangle(self, geometry: Geometry, metadata: Any) -> None:
        """As the plugin does it: streaming rows by its own lowering, ``metadata`` is of the last rows."""
        on: Any = SimpleNamespace(lowering=LOWERING, geometry=geometry)
        rows = slice(0, self.n - geometry.last)
        self.impl.stream(on, self.query[rows], self.key[rows], self.value[rows], 0, self.out[rows])
        self.dense(geometry.last, metadata)

    def off(self, geometry: Geometry | None) -> float:
        """The largest difference of the output from attention in float64, with the mask or (None) dense."""
        place = torch.arange(self.n)
        row, key = place[:, None], place[None, :]
        allowed = key <= row
        if geometry is not None:
            near = (key < geometry.sink) | (row - key <= geometry.window)
            allowed &= near | (row >= self.n - geometry.last)
        q, k, v = (x.double().transpose(0, 1) for x in (self.query, self.key, self.value))
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 0) for x in (k, v))
        scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(~allowed, float("-inf"))
        return float((self.out.double() - (scores.softmax(-1) @ v).transpose(0, 1)).abs().max())


def measure(quick: bool) -> list[dict[str, Any]]:
    """A record for every shape, dtype, length and geometry, printed as it comes."""
    records = []
    geometries = (Geometry(4, 32, 24),) if quick else GEOMETRIES
    for name, shape in SHAPES.items():
        for dtype, n in itertools.product(DTYPES, (300, 600) if quick else LENGTHS):
            layer = Layer(n, shape, dtype)
            calls: dict[Geometry | None, Callable[[], None]] = {
                None: partial(layer.dense, n, layer.metadata(n)),
                **{of: partial(layer.triangle, of, layer.metadata(of.last)) for of in geometries},
            }
            times = taken(calls, 2 if quick else ROUNDS)
            for geometry in geometries:
                found = {"what": "one layer", "shape": name, "dtype": str(dtype).removeprefix("torch."), "n": n}
                found |= {
                    "isa": layer.isa,
                    "lowering": LOWERING,
                    "geometry": list(geometry.counts),
                    "share": share(geometry, n),
                }
                for prefix, took in (("dense_", times[None]), ("", times[geometry])):
                    found |= {f"{prefix}ms": statistics.median(took), f"{prefix}range_ms": [min(took), max(took)]}
                found |= {"rounds": len(times[None]), "speedup": found["dense_ms"] / found["ms"]}
                if n <= 2048:
                    for what, of in (("off", geometry), ("dense_off", None)):
                        calls[of]()
                        found[what] = layer.off(of)
                records.append(record.rounded(found))
                print(records[-1], flush=True)
    return records


def share(geometry: Geometry, n: int) -> float:
    """The mask's share of the causal pairs of a prompt."""
    attended, causal = pair_counts(geometry, n, n)
    return attended / causal


def taken(calls: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, list[float]]:
    """Milliseconds of processor time of each call, in turns, after one of each that does not count."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            started = time.process_time()
            call()
            if number:
                times[key].append((time.process_time() - started) * 1e3)
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and store."""
    parser = argparse.ArgumentParser(prog="python -m studies.vllm_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the result file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works")
    options = parser.parse_args(arguments)
    import vllm

    torch.set_num_threads(1)
    before = record.hardware()
    records = measure(options.quick)
    settings = {"vllm": vllm.__version__, "block": BLOCK, "unit": "ms of one thread's processor time"}
    command = "python -m studies.vllm_cpu" + (" --quick" if options.quick else "")
    measured = record.Measured(settings, records)
    record.write(record.result("vllm_cpu", command, options.quick, before, measured), options.file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
