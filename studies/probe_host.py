"""Temporary: which kernel is the faster one for short prompts."""

import itertools
import subprocess
import sys

import torch

from studies.short_prompts import _calls, _graph, _operands, _sparse
from tmx_compile.lowering.triton import hopper_launch, launch, tuning
from tmx_compile.lowering.triton.prepared import kind
from tmx_compile.mask.geometry import Geometry


def say(*x):
    print(*x, flush=True)


def ms(run):
    out = {}
    replay = _graph(run, out, "x")
    if replay is None:
        return f"{_calls(run, 0.02):.4f}c"
    return f"{sorted(replay() for _ in range(5))[2]:.4f}"


@torch.no_grad()
def kernels():
    for heads, dim, batch in (
        ((32, 8), 128, 1),
        ((32, 8), 64, 1),
        ((9, 3), 64, 1),
        ((9, 3), 128, 1),
        ((8, 8), 128, 1),
        ((16, 2), 128, 4),
    ):
        for n in (2112, 4096, 8192):
            for counts in ((4, 32, 64), (8, 512, 128), (64, 1024, 128)):
                q, k, v = _operands(n, batch, heads, dim, "bfloat16", False)
                g, s = Geometry(*counts), dim**-0.5
                slots = counts[0] + counts[1]
                shapes = tuning.choose(2, dim, slots)
                one = ms(lambda: launch.attend(q, k, v, None, None, g, s, shapes=shapes))
                two = ms(
                    lambda: launch.attend(
                        q, k, v, None, None, g, s, shapes=tuning.LARGE if shapes is tuning.SMALL else tuning.SMALL
                    )
                )
                hop = hopper_launch.Launch(*map(kind, (q, k, v)), None, g, s)
                say(
                    "kernel",
                    heads,
                    dim,
                    batch,
                    n,
                    counts,
                    "general",
                    one,
                    "other",
                    two,
                    "hopper",
                    ms(lambda: hop(q, k, v, None, None)),
                )


def warm():
    """Compile every kernel that the study needs, several processes at a time."""
    running = []
    for heads, dim in itertools.product(((32, 8), (8, 8), (16, 2), (9, 3)), (64, 128)):
        running.append(subprocess.Popen([sys.executable, __file__, f"warm_one:{heads[0]}:{heads[1]}:{dim}"]))
    for process in running:
        process.wait()


def warm_one(h, kv, dim):
    for n, batch in ((2112, 1), (16384, 1), (2112, 4), (16384, 4)):
        for training in (False, True):
            if training and (batch, n) != (1, 2112):
                continue
            qkv = _operands(n, batch, (h, kv), dim, "bfloat16", training)
            for counts in ((4, 32, 64), (8, 512, 128), (64, 1024, 128)):
                with torch.set_grad_enabled(training):
                    out = _sparse(qkv, counts, training)
                if training:
                    torch.autograd.grad(out, qkv, torch.randn_like(out))
                elif n == 2112:
                    g, s = Geometry(*counts), dim**-0.5
                    for shapes in (tuning.LARGE, tuning.SMALL):
                        launch.attend(*qkv, None, None, g, s, shapes=shapes)
                    hopper_launch.Launch(*map(kind, qkv), None, g, s)(*qkv, None, None)
    torch.cuda.synchronize()


for name in sys.argv[1:]:
    name, *numbers = name.split(":")
    try:
        globals()[name](*map(int, numbers))
    except Exception as error:
        say(name, "failed", type(error), str(error)[:500])
