"""Processes with gloo that run a list of checks, started once for a whole file."""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

WORLD = 2
# Of a collective: the other process failed a check, and nothing more will come from it.
PATIENCE = datetime.timedelta(seconds=30)


def outcomes(checks, world=WORLD, patience=PATIENCE):
    """Run each of {name: function of no arguments, importable} in so many processes: {name: (text of each process,)}.

    The text is empty where the check held, else a traceback; what stands behind a failed check is not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (checks, folder, world, patience), nprocs=world)
        texts = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
    return {name: tuple(text[name] for text in texts) for name in checks}


def join(rank, world, folder, patience=PATIENCE):
    """Become one of the processes, as torchrun would have it; they meet in a folder."""
    # Transformers asks for these.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=patience)


def _worker(rank, checks, folder, world, patience):
    join(rank, world, folder, patience)
    told = dict.fromkeys(checks, "not run: a check before it failed")
    for name, check in checks.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            check()
            told[name] = ""
        except Exception:
            told[name] = traceback.format_exc()
            break
    torch.save(told, Path(folder) / f"{rank}.pt")
    if not any(told.values()):
        dist.destroy_process_group()


@contextlib.contextmanager
def fakes(rank, world):
    """The mesh of so many processes, of which there is only this one: what it sends goes nowhere."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
