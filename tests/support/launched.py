"""Models that Transformers and torch split over two processes, as ``torchrun`` starts them: nothing here is spawned.

``torchrun --standalone --nproc-per-node 2 -m tests.support.launched FOLDER`` finds a model in the folder, and leaves
there what became of each check.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from tests.support.models import masked, masked_oracle, tiny_llama
from tests.support.oracle import attended
from tests.support.processes import WORLD
from tests.support.sharded import CONFIG, N, close
from tmx_compile import tmx_backend
from tmx_compile.integrations.transformers import register_attention

# Of the whole launch: what hangs is ended.
PATIENCE_S = 300
# So few bytes that Dynamo cuts the graph between layers, as DDP has it do with models of usual size.
BUCKET = 1 << 16


def layers_sparse(report):
    return {layer for site in report.triangle() for layer in site.layers or (site.layer,)}


def as_written():
    """Nothing is compiled by Inductor: the graphs run as the pass leaves them."""
    return mock.patch("torch._inductor.compile_fx.compile_fx", lambda gm, *args, **kwargs: gm.forward)


def tensor_parallel(folder, switched):
    """A prompt through a model that is loaded in parts. The first such call also opens the process group."""
    plain = LlamaForCausalLM.from_pretrained(folder).eval()
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    assert dist.get_backend() == "gloo"
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert (weight.to_local() if isinstance(weight, DTensor) else weight).shape == (32, 64)
    ids = torch.randint(0, 128, (2, N))
    if switched:
        report = register_attention(CONFIG, strict=True).report
        model.set_attn_implementation("tmx")
    else:
        backend = tmx_backend(CONFIG, strict=True)
        model.compile(backend=backend)
        report = backend.report
    with torch.no_grad(), as_written():
        logits = model(ids).logits
    close(logits, masked_oracle(plain, CONFIG, ids), 2e-4)
    assert layers_sparse(report) == {1, 2}, report


@mock.patch("torch.distributed._DEFAULT_FIRST_BUCKET_BYTES", BUCKET)
def step(folder, wrap, switched):
    """Loss and gradients of a wrapped model whose processes have a half of the batch each, against one process's."""
    plain = LlamaForCausalLM.from_pretrained(folder).train()
    model = copy.deepcopy(plain)
    ids = torch.randint(0, 128, (2, N))
    own = ids[dist.get_rank() :][:1]
    if switched:
        report = register_attention(CONFIG, strict=True).report
        model.set_attn_implementation("tmx")
        wrapped = wrap(model)
    else:
        wrapped = wrap(model)
        backend = tmx_backend(CONFIG, model=model, assume_causal=True)
        wrapped.compile(backend=backend)
        report = backend.report
    with as_written():
        loss = wrapped(input_ids=own, labels=own, use_cache=False).loss
        loss.backward()
    sparse = attended(N, N, None, *CONFIG.geometry.counts)
    reference = masked(plain, 1, N, dict.fromkeys(CONFIG.layers(), sparse))
    losses = [reference(input_ids=each[None], labels=each[None], use_cache=False).loss for each in ids]
    (sum(losses) / len(losses)).backward()
    close(loss, losses[dist.get_rank()].detach(), 2e-4)
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert a.grad is not None, name
        close(a.grad, b.grad, 5e-4)
    assert layers_sparse(report) == {1, 2}, report


def fully_sharded(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated(model):
    return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=BUCKET / 2**20)


CHECKS = {
    "tp_plan": partial(tensor_parallel, switched=False),
    "tp_plan, switched": partial(tensor_parallel, switched=True),
    "FSDP2": partial(step, wrap=fully_sharded, switched=False),
    "FSDP2, switched": partial(step, wrap=fully_sharded, switched=True),
    "DDP": partial(step, wrap=replicated, switched=False),
    "DDP, switched": partial(step, wrap=replicated, switched=True),
}


def launched():
    """Have ``torchrun`` run all checks: {name: (text of each process,)}, empty where the check held."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama().save_pretrained(folder)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
        command += ["-m", "tests.support.launched", folder]
        root = Path(__file__).parents[2]
        paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        files = [Path(folder) / f"{rank}.pt" for rank in range(WORLD)]
        texts = [torch.load(file) if file.exists() else {} for file in files]
    missing = f"not run; torchrun said {done.returncode}: {done.stderr[-2000:]}"
    return {name: tuple(text.get(name, missing) for text in texts) for name in CHECKS}


def main(folder):
    rank, told = int(os.environ["RANK"]), {}
    for name, check in CHECKS.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        told[name] = "raised"
        try:
            check(folder)
            told[name] = ""
        except Exception:
            told[name] = traceback.format_exc()
            raise
        finally:
            torch.save(told, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
