"""Time to first token of a prompt that is split over GPUs by its length, beside one GPU and tensor parallelism.

``torchrun --nproc-per-node 2 -m studies.context_parallel [--quick] [--out FOLDER] [--minutes M]``: a decoder of the
Llama-3.1-8B shape with random weights and fewer layers, the deeper half of them triangle layers. ``--quick`` runs tiny
sizes on CPUs, which measures nothing. One compile a variant, for all lengths. Steps over the caches that follow such a
prompt are in :mod:`studies.context_steps`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks import common
from studies import context_bytes, context_steps
from studies.context_timing import collectives, finish, of_all, timed
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.bench import record
from tmx_compile.bench.record import Measured, hardware

FULL: dict[str, Any] = {
    "lengths": [32768, 131072, 262144],
    "tensor_lengths": [8192, 32768, 131072],
    "dense_up_to": 131072,
    "profiled": [32768, 131072],
    "steps": 131072,
    "layers": 4,
    "hidden": 4096,
    "intermediate": 14336,
    "heads": 32,
    "kv_heads": 8,
    "geometry": [8, 512, 128],
    "min_seq_len": 2048,
    "messages": [2**n for n in (12, 16, 20, 21, 22, 24, 26, 28, 29)],
    "calls": 5,
    "dtype": "bfloat16",
}
QUICK: dict[str, Any] = {
    **FULL,
    "lengths": [256, 320],
    "tensor_lengths": [256],
    "profiled": [],
    "steps": 256,
    "layers": 2,
    "hidden": 64,
    "intermediate": 96,
    "heads": 4,
    "kv_heads": 2,
    "geometry": [4, 32, 16],
    "min_seq_len": 128,
    "messages": [2**12],
    "calls": 1,
    "dtype": "float32",
}


class Norm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


class Decoder(nn.Module):
    """A decoder layer; with a group, this process's share of its heads and of its MLP."""

    def __init__(self, plan: dict[str, Any], group: Any = None) -> None:
        super().__init__()
        ways = 1 if group is None else dist.get_world_size(group)
        hidden, self.dim, self.group = plan["hidden"], plan["hidden"] // plan["heads"], group
        self.heads, self.kv_heads = plan["heads"] // ways, plan["kv_heads"] // ways
        inner, wide = self.heads * self.dim, plan["intermediate"] // ways
        self.first, self.second = Norm(hidden), Norm(hidden)
        self.qkv = nn.Linear(hidden, inner + 2 * self.kv_heads * self.dim, bias=False)
        self.out = nn.Linear(inner, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.first(x)).view(batch, tokens, -1, self.dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = (y * cos + torch.cat([-y[..., self.dim // 2 :], y[..., : self.dim // 2]], -1) * sin for y in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self._summed(self.out(attended.transpose(1, 2).reshape(batch, tokens, -1)))
        y = self.second(x)
        return x + self._summed(self.down(F.silu(self.gate(y)) * self.up(y)))

    def _summed(self, x: Tensor) -> Tensor:
        if self.group is None:
            return x
        made = torch.ops._c10d_functional.all_reduce(x, "sum", self.group.group_name)
        return torch.ops._c10d_functional.wait_tensor(made)


class Model(nn.Module):
    """Hidden states of a prompt, or a piece of one, from embeddings and positions."""

    def __init__(self, plan: dict[str, Any], group: Any = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Decoder(plan, group) for _ in range(plan["layers"]))
        dim = plan["hidden"] // plan["heads"]
        self.register_buffer("rates", 500000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(1, P, hidden) embeddings at positions (1, P) -> (1, hidden) of the last token."""
        angles = positions[:, None, :, None].float() * self.rates.float()
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x[:, -1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="studies.context_parallel", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on CPUs")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so long")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    kind = "cpu" if options.quick else "cuda"
    started, before = time.monotonic(), hardware()
    start(kind)
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    command = common.command("studies.context_parallel", sys.argv[1:])
    records: list[dict[str, Any]] = []

    def store() -> None:
        if dist.get_rank() == 0 and options.out is not None:
            settings = {**plan, "ranks": dist.get_world_size(), "weights": "random", "timing": TIMING}
            content = record.result("context_parallel", command, options.quick, before, Measured(settings, records))
            record.write(content, options.out / "context_parallel.json")

    for item in study(plan, kind, mesh, lambda: time.monotonic() - started > 60 * options.minutes):
        records.append(item)
        if dist.get_rank() == 0:
            print(item, flush=True)
        store()
    dist.destroy_process_group()


TIMING = (
    "wall time of the slowest process from a barrier to the end of its work, median of the calls after two untimed "
    "ones; lists are by process: card_ms: its own time; memory_gib: the peak in the timed calls; of one more call "
    "under the profiler: nccl_ms: kernels of collectives, waiting included; exposed_ms: of these, while no other "
    "kernel ran; work_ms: while another kernel ran; sent_ms: kernels of collectives without their wait for the other "
    "process, the shorter of each two"
)


def start(kind: str) -> None:
    """Join the others."""
    patience = datetime.timedelta(seconds=120)
    if kind == "cpu":
        dist.init_process_group("gloo", timeout=patience)
        return
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=patience)


def study(plan: dict[str, Any], kind: str, mesh: DeviceMesh, late: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The records: variants in turn, the most telling first; every process takes the same way."""
    yield from guarded("messages", lambda: messages(plan, kind, mesh))
    one_ms: dict[tuple[str, int], float] = {}
    hidden: dict[int, Tensor] = {}
    for name, sparse in (
        *(("one", True), ("context", True), ("steps", True), ("tensor", True)),
        *(("tensor", False), ("context", False), ("one", False)),
    ):
        if agreed_late(late(), kind):
            return
        if name == "steps":
            yield from guarded(name, lambda: context_steps.study(plan, kind, mesh))
            continue
        yield from guarded(name, lambda: variant(plan, kind, mesh, name, sparse, one_ms, hidden, late))  # noqa: B023


def guarded(name: str, run: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """One part's records; what it raises is a record too."""
    try:
        yield from run()
    except Exception as error:
        yield {"variant": name, "rank": dist.get_rank(), "error": f"{type(error).__name__}: {error}"[:2000]}


def agreed_late(own: bool, kind: str) -> bool:
    """Whether the first process has no time left."""
    told = torch.tensor([int(own)], device=kind)
    dist.broadcast(told, 0)
    return bool(told.item())


def variant(
    plan: dict[str, Any],
    kind: str,
    mesh: DeviceMesh,
    name: str,
    sparse: bool,
    one_ms: dict[tuple[str, int], float],
    hidden: dict[int, Tensor],
    late: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """One way to run the model at every length."""
    torch._dynamo.reset()
    common.free()
    rank, ranks, dtype = mesh.get_local_rank(), mesh.size(), getattr(torch, plan["dtype"])
    split = mesh.get_group() if name == "tensor" else None
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(kind):
        model = Model(plan, split).eval()
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    half = range(plan["layers"] // 2, plan["layers"]) if sparse else ()
    sink, window, last = plan["geometry"]
    config = TriangleMixConfig(sink, window, last, triangle_layer_indices=half, min_seq_len=plan["min_seq_len"])
    backend = tmx_backend(config, **({"context_parallel": mesh} if name == "context" else {}))
    compiled = torch.compile(model, backend=backend)
    layer = context_bytes.Layer(plan["heads"], plan["kv_heads"], plan["hidden"] // plan["heads"], dtype.itemsize)
    lengths = plan["lengths"] if sparse else [n for n in plan["lengths"] if n <= plan["dense_up_to"]]
    if name == "tensor":
        lengths = plan["tensor_lengths"]
    elif name == "one":
        lengths = sorted({*lengths, *plan["tensor_lengths"]})
    for n in lengths:
        if agreed_late(late(), kind):
            return
        piece = n // ranks if name == "context" else n
        first = rank * piece if name == "context" else 0
        # The first process's prompt for all: rows of a table, so that a piece is what it is of the whole.
        table = torch.randn(1024, plan["hidden"], generator=torch.Generator().manual_seed(1)).to(kind, dtype)
        positions = torch.arange(first, first + piece, device=kind)[None]
        x = table[(positions * 7919) % 1024 ^ (positions // 1024 % 1024)]
        for y, dim in ((x, 1), (positions, 1)):
            torch._dynamo.mark_dynamic(y, dim)

        def call() -> Tensor:
            with torch.no_grad():
                return compiled(x, positions)  # noqa: B023

        begin = time.perf_counter()
        out = call()
        finish(kind)
        first_s = time.perf_counter() - begin
        call()
        if kind == "cuda":
            # Only now: until the first call has compiled, what the variant before left may be there still.
            torch.cuda.reset_peak_memory_stats()
        times = [timed(call, kind) for _ in range(plan["calls"] if n < 200_000 else 1)]
        ms = statistics.median(map(max, times))
        form, slowest = f"{name}{'' if sparse else ', dense'}", [max(each) for each in times]
        item: dict[str, Any] = {"variant": form, "n": n, "ranks": 1 if name == "one" else ranks, "ms": ms}
        item |= {"first_call_s": first_s, "all_ms": slowest}
        key = ("triangle" if sparse else "dense", n)
        if name == "one":
            one_ms[key] = ms
            item["card_ms"] = [statistics.median(each) for each in zip(*times, strict=True)]
        if key in one_ms:
            item |= {"one_ms": one_ms[key], "speedup": one_ms[key] / ms}
        if name == "one" and sparse:
            hidden[n] = out.clone()
        if name == "context" and sparse and n in hidden:
            item["error"] = from_final(float((out.float() - hidden[n].float()).norm() / hidden[n].float().norm()), kind)
        if name == "context":
            item |= {
                "bytes_per_triangle_layer": context_bytes.triangle(layer, ranks, (sink, window, last)),
                "bytes_per_dense_layer": context_bytes.heads(layer, ranks, n),
                "bytes_of_gathering": context_bytes.gathered(layer, ranks, n),
            }
        if kind == "cuda":
            item["memory_gib"] = of_all(torch.cuda.max_memory_allocated() / 2**30, kind)
            if n in plan["profiled"] and name != "one":
                item |= collectives(call, kind)
        yield item


def from_final(value: float, kind: str) -> float:
    """What the final process has to say."""
    told = torch.tensor([value], dtype=torch.float64, device=kind)
    dist.broadcast(told, dist.get_world_size() - 1)
    return float(told.item())


def messages(plan: dict[str, Any], kind: str, mesh: DeviceMesh) -> Iterator[dict[str, Any]]:
    """An all-to-all of so many bytes from each process: the constants of the simulation."""
    ranks = mesh.size()
    group = mesh.get_group().group_name
    for size in plan["messages"]:
        x = torch.zeros(size // ranks * ranks, dtype=torch.uint8, device=kind)
        even = [len(x) // ranks] * ranks

        def call() -> None:
            for _ in range(10):
                made = torch.ops._c10d_functional.all_to_all_single(x, even, even, group)  # noqa: B023
                torch.ops._c10d_functional.wait_tensor(made)

        call()
        ms = min(max(timed(call, kind)) for _ in range(3)) / 10
        yield {"variant": "all-to-all", "bytes": size, "ranks": ranks, "ms": ms}


if __name__ == "__main__":
    main()
