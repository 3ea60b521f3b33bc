"""Two processes of a split prompt, of which the second dies before a call, or inside one."""

from __future__ import annotations

import datetime
import os
import traceback
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.support.processes import join
from tests.support.split import CONFIG, Net, as_written
from tmx_compile import tmx_backend


def lone(rank, folder, where):
    """Write what the survivor is told; the one that dies exits with 1."""
    join(rank, 2, folder, datetime.timedelta(seconds=10))
    model = torch.compile(Net(), backend=tmx_backend(CONFIG, context_parallel=init_device_mesh("cpu", (2,))))
    x = torch.randn(1, 100, 64)
    with as_written() as graphs:
        model(x)
        if rank == 1 and where == "before":
            os._exit(1)
        if rank == 1:
            # After the processes agreed.
            graphs[0].forward = lambda *inputs: os._exit(1)
        try:
            model(x)
        except Exception:
            Path(folder, "told").write_text(traceback.format_exc())
    os._exit(0)
