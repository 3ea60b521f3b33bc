"""Kernels over the same drawn lists of blocks: the package's, FlexAttention's, FlashAttention-4's.

One layer, blocks of 128. A row's own block is the last of its list and needs the causal mask; the others are whole. An
output that differs from the package's kernel by more than rounding is no measurement, and has no time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Case, Parts, Records, device, free, note
from studies.stacked_layer import drawn
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.timing import describe, interleaved
from tmx_compile.lowering import fa4, fa4_lists
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic import Lists

BLOCK = 128
FULL: dict[str, Any] = {
    # Tokens, densities.
    "lengths": ((32768, (0.25, 0.1, 0.5, 1.0)), (131072, (0.25, 0.5, 0.1, 1.0))),
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
}
QUICK: dict[str, Any] = FULL | {"lengths": ((1024, (0.5,)),), "heads": 4, "kv_heads": 2}
MOST_ERROR = 0.05
"""Largest absolute difference from the package's kernel that bfloat16 explains."""
TOLD = {
    "ms": "median of calls in turn with those of the other kernels, each until the GPU has finished",
    "dense_ms": "the fastest dense causal attention of the same run, of SDPA's backends and FlashAttention-4",
    "of_dense": "ms over dense_ms",
    "select_ms": "choosing lists by the method that is the default, on the same tensors, timed alone like ms",
    "whole_of_dense": "ms and select_ms over dense_ms",
    "rate_tflops": "floating-point operations of the visited blocks, whole ones, over ms",
    "rate": "time that the fastest dense attention takes for a block over the time for a visited one",
    "error": "largest absolute difference of all rows from the package's kernel",
    "lists_ms": "what it takes to turn the package's lists into the kernel's: not in ms, but for fa4",
    "kernel": "fa4: as the package calls it, lists included; fa4, causal and fa4, mask: without them, a mask for every "
    "block or for a row's own alone",
}


def names(quick: bool) -> list[str]:
    return [str(n) for n, _ in (QUICK if quick else FULL)["lengths"]]


def settings(quick: bool) -> dict[str, Any]:
    return {**(QUICK if quick else FULL), "block": BLOCK, "dtype": "bfloat16", "figures": TOLD}


def measure(part: str, quick: bool) -> Records:
    plan, n = QUICK if quick else FULL, int(part)
    torch.manual_seed(n)
    sizes = (plan["heads"], plan["kv_heads"], plan["kv_heads"])
    # In the memory that models leave: (B, N, H, D).
    query, key, value = (
        torch.randn(1, n, heads, plan["head_dim"], device=device(), dtype=torch.bfloat16).transpose(1, 2)
        for heads in sizes
    )
    dense: dict[str, Callable[[], Any]] = dict(dense_variants(query, key, value)[0])
    dense |= _working("fa4", lambda: fa4.by_sequences(query, key, value, None, plan["head_dim"] ** -0.5))
    times = {name: x.median for name, x in interleaved(dense, budget_s=1.0, least=3, most=10).items()}
    backend = min(times, key=times.__getitem__)
    select_ms = _select_ms(query, key)
    note(f"stacked_kernels: {n} tokens, dense {times}")
    records: Records = []
    for density in dict(plan["lengths"])[n]:
        lists = drawn(plan["heads"], -(-n // BLOCK), density, query.device)
        visited, causal = lists.visited.tolist()
        runs, errors, made = _kernels(query, key, value, lists)
        found = interleaved(runs, budget_s=1.0, least=3, most=10)
        for name in errors:
            ms = found[name].median if name in found else None
            record = {
                "n": n,
                "model": "one layer",
                "triangle_layers": [],
                "dynamic_layers": [0],
                "block": BLOCK,
                "kernel": name,
                "density": visited / causal,
                "ms": ms,
                "lists_ms": made.get(name, 0.0),
                "error": errors[name],
                "dense_ms": times[backend],
                "dense_backend": backend,
                "all_dense_ms": times,
            }
            if ms is not None:
                record["of_dense"] = ms / times[backend]
                record |= {"select_ms": select_ms, "whole_of_dense": (ms + select_ms) / times[backend]}
                record["rate"] = times[backend] * visited / causal / ms
                record["rate_tflops"] = 4.0 * visited * BLOCK**2 * plan["head_dim"] / ms / 1e9
            records.append(record)
            note(
                str({key: record.get(key) for key in ("n", "kernel", "density", "ms", "rate_tflops", "rate", "error")})
            )
        free()
    return records


def _select_ms(query: Tensor, key: Tensor) -> float:
    from tmx_compile.lowering.triton.dynamic.launch import select

    run = {"": lambda: select(query, key, None, Selection(), query.shape[3] ** -0.5)}
    return interleaved(run, budget_s=0.3, least=3, most=10)[""].median


def _kernels(
    query: Tensor, key: Tensor, value: Tensor, lists: Lists
) -> tuple[dict[str, Callable[[], Any]], dict[str, float | None], dict[str, float]]:
    """The kernels whose results agree, the errors of all, and milliseconds that their lists take."""
    from tmx_compile.lowering.triton.dynamic.launch import attend

    scale = query.shape[3] ** -0.5
    ours: Callable[[], Tensor] = lambda: attend(query, key, value, None, lists, BLOCK, scale)  # noqa: E731
    want = ours()
    runs: dict[str, Callable[[], Any]] = {"tmx": ours}
    errors: dict[str, float | None] = {"tmx": 0.0}
    made: dict[str, float] = {}
    ways: dict[str, Callable[[], Any]] = {
        "flex": functools.partial(_flex, query, key, lists),
        "fa4, causal": functools.partial(_fa4, lists, causal=True),
        "fa4": lambda: functools.partial(_package_fa4, lists),
        "fa4, mask": functools.partial(_fa4, lists, causal=False),
    }
    for name, make in ways.items():
        try:
            run = functools.partial(make(), query, key, value)
            error = float((run().float() - want.float()).abs().max())
        except Exception as problem:
            note(f"{name}: {describe(problem)}")
            errors[name] = None
            continue
        errors[name] = error
        if math.isfinite(error) and error <= MOST_ERROR:
            runs[name] = run
            if name in ("flex", "fa4, causal"):
                split = {"lists": lambda: fa4_lists.split(lists)}
                made[name] = interleaved(split, budget_s=0.1, least=3, most=10)["lists"].median
    return runs, errors, made


def _flex(query: Tensor, key: Tensor, lists: Lists) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    torch._dynamo.reset()
    mask = BlockMask.from_kv_blocks(
        *fa4_lists.split(lists), BLOCK, _causal, (query.shape[2], key.shape[2]), compute_q_blocks=False
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=mask, enable_gqa=True)


def _causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return key <= row


def _fa4(lists: Lists, *, causal: bool) -> Callable[..., Tensor]:
    """By ``causal`` every block meets the causal mask and long rows come first; else a row's own block alone does."""
    flash_attn_func, block_sparse_tensors = fa4_lists.functions()
    tensors = block_sparse_tensors(*fa4_lists.split(lists), block_size=(BLOCK, BLOCK))
    words: dict[str, Any] = {"causal": True} if causal else {"mask_mod": _cute_causal()}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        operands = fa4.by_tokens(query, key, value)
        return fa4.result_of(flash_attn_func(*operands, block_sparse_tensors=tensors, **words)).transpose(1, 2)

    return run


def _package_fa4(lists: Lists, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the package calls it: with what its lists take."""
    return fa4_lists.attend(query, key, value, lists, query.shape[3] ** -0.5)


@functools.cache
def _cute_causal() -> Any:
    import cutlass.cute as cute

    # Without types: its compiler reads them.
    @cute.jit  # type: ignore[untyped-decorator]
    def causal(batch, head, row, key, lengths, tensors):  # type: ignore[no-untyped-def]
        return key <= row

    return causal


def _working(name: str, run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """A variant if it runs here."""
    try:
        run()
    except Exception as problem:
        note(f"{name}: {describe(problem)}")
        return {}
    return {name: run}


def finish(records: Records) -> None:
    """Every record stands for itself."""


COLUMNS = ("n", "kernel", "density", "ms", "dense_ms", "of_dense", "whole_of_dense", "rate", "rate_tflops", "error")
CASE = Case(
    "stacked_kernels", "stacked_kernels.json", None, COLUMNS, Parts(names, settings, measure, finish), needs_cuda=True,
    quick_anywhere=False,
)  # fmt: skip
