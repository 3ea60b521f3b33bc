"""Temporary: which kernel is the faster one for short prompts."""

import itertools
import subprocess
import sys

import torch

from studies.short_prompts import _operands, _sparse


def say(*x):
    print(*x, flush=True)


def warm():
    """Compile every kernel that the study needs, several processes at a time."""
    running = []
    for heads, dim in itertools.product(((32, 8), (8, 8), (16, 2), (9, 3)), (64, 128)):
        running.append(subprocess.Popen([sys.executable, __file__, f"warm_one:{heads[0]}:{heads[1]}:{dim}"]))
    for process in running:
        process.wait()


def warm_one(h, kv, dim):
    for n, batch in ((2112, 1), (4096, 1), (8192, 1), (16384, 1), (2112, 4), (16384, 4)):
        for training in (False, True):
            if training and (batch > 1 or (h, kv) not in ((32, 8), (9, 3))):
                continue
            qkv = _operands(n, batch, (h, kv), dim, "bfloat16", training)
            for counts in ((4, 32, 64), (8, 512, 128), (64, 1024, 128)):
                with torch.set_grad_enabled(training):
                    out = _sparse(qkv, counts, training)
                if training:
                    torch.autograd.grad(out, qkv, torch.randn_like(out))
    torch.cuda.synchronize()


for name in sys.argv[1:]:
    name, *numbers = name.split(":")
    try:
        globals()[name](*map(int, numbers))
    except Exception as error:
        say(name, "failed", type(error), str(error)[:500])
