"""``tmx_backend(context_parallel=mesh)`` in one process: what a graph sends, what is refused, a process that dies.

The processes that it takes part with are torch's fake ones, which send nothing.
"""

import contextlib
import multiprocessing
import re
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import init_device_mesh

from studies import context_bytes
from tests.support.lost import lone
from tests.support.processes import fakes
from tests.support.split import CONFIG, Attention, as_written
from tmx_compile import TriangleMixConfig, TriangleMixInferenceConfig, tmx_backend
from tmx_compile.graph.nodes import tensor_of
from tmx_compile.lowering.context_parallel import ContextParallel
from tmx_compile.lowering.context_parallel.heads import share

ALL_TO_ALL = torch.ops._c10d_functional.all_to_all_single.default


class Net(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def graph_of(mesh, config, layer, tokens):
    """The rewritten graph of two layers of one kind, for a piece that nobody allocates."""
    with as_written() as graphs:
        model = torch.compile(
            Net(layer.to("meta"), layer.to("meta")), backend=tmx_backend(config, context_parallel=mesh), dynamic=False
        )
        # The fake processes agree on nothing: what counts is what was written before.
        with contextlib.suppress(RuntimeError):
            model(torch.empty(1, tokens, 4096, dtype=torch.bfloat16, device="meta"))
    return graphs[0]


def sent_to_others(gm, rank):
    """Bytes that the all-to-alls of a graph send to the other processes, by their splits."""
    total = 0
    for node in gm.graph.find_nodes(op="call_function", target=ALL_TO_ALL):
        x, _, sent, _ = node.args
        of_tensor = tensor_of(x)
        row = of_tensor.numel() // max(1, of_tensor.shape[0]) * of_tensor.itemsize
        total += sum(n for to, n in enumerate(sent) if to != rank) * row
    return total


@pytest.mark.parametrize("world", [2, 8])
def test_a_triangle_layer_sends_one_percent_of_its_keys_and_values(world):
    geometry, tokens = (8, 512, 128), 131072
    sizes = context_bytes.Layer()
    config = TriangleMixConfig(*geometry, triangle_layer_indices=[0, 1])
    dense = TriangleMixConfig(*geometry, triangle_layer_indices=[2])
    layer = Attention(32, 8, 128, 4096).to(torch.bfloat16)
    sums = dict.fromkeys(("triangle", "dense"), 0)
    for rank in range(world) if world == 2 else (0, 1, world - 1):
        # Those between the second and the last do as the second does.
        times = world - 2 if world > 2 and rank == 1 else 1
        with fakes(rank, world) as mesh:
            for kind, asked in (("triangle", config), ("dense", dense)):
                gm = graph_of(mesh, asked, layer, tokens // world)
                others = {node.target for node in gm.graph.nodes if "c10d" in str(node.target)} - {ALL_TO_ALL}
                assert {str(target) for target in others} == {"_c10d_functional.wait_tensor.default"}
                sums[kind] += times * sent_to_others(gm, rank) // 2
                torch._dynamo.reset()
    assert sums["triangle"] == context_bytes.triangle(sizes, world, geometry)
    assert sums["dense"] == context_bytes.heads(sizes, world, tokens)
    assert sums["triangle"] <= 0.01 * context_bytes.gathered(sizes, world, tokens)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "expected"),
    [
        (32, 8, 2, (1, 0)),
        (32, 8, 8, (1, 0)),
        (32, 8, 16, (2, 0)),
        (9, 3, 2, (3, 1)),
        (6, 1, 4, (3, 1)),
        (4, 4, 3, (1, 2)),
    ],
)
def test_heads_that_the_processes_do_not_divide(heads, kv_heads, size, expected):
    copies, more = share(heads, kv_heads, size)
    assert (kv_heads * copies + more) % size == 0
    assert (copies, more) == expected


# Refusals ------------------------------------------------------------------------------------------------------------


def test_arguments():
    with fakes(0, 4) as mesh:
        for wrong in (4, "cp", init_device_mesh("cpu", (2, 2))):
            with pytest.raises(ValueError, match="context_parallel must be a DeviceMesh of one dimension, got"):
                tmx_backend(CONFIG, context_parallel=wrong)
        for more in (dict(decode="streaming"), dict(chunked_prefill=True)):
            with pytest.raises(ValueError, match="context_parallel takes neither .*" + next(iter(more))):
                tmx_backend(CONFIG, context_parallel=mesh, **more)
        with pytest.raises(ValueError, match="needs a configuration that is enabled"):
            tmx_backend(TriangleMixInferenceConfig(), context_parallel=mesh)
        with pytest.raises(ValueError, match=r"splits no dynamic layers, got dynamic_layer_indices=\(0,\)"):
            tmx_backend(CONFIG.replace(triangle_layer_indices=[1], dynamic_layer_indices=[0]), context_parallel=mesh)


def causal(x, **changes):
    return F.scaled_dot_product_attention(x, x, x, is_causal=True, **changes)


def documents(x):
    numbers = (torch.arange(x.shape[2]) // 50)[None]
    row = torch.arange(x.shape[2])
    mask = (row[:, None] >= row) & (numbers[:, :, None] == numbers[:, None, :])
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, None])


def step(x, mask=None, joins=True):
    """One row over a cache and its own key; ``mask`` (B, 101) bool."""
    row = x[:, :, -1:]
    held = torch.cat([x, row], 2) if joins else F.pad(x, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(row, held, held, attn_mask=None if mask is None else mask[:, None, None])


def of_data(x):
    """(B, 101): which keys count, as an attention mask tells."""
    return F.pad(x[:, 0, :, 0] < 2, (0, 1), value=True)


def windowed(x, window):
    row, key = (torch.arange(x.shape[2])[shape] for shape in ((slice(None), None), (None, slice(None))))
    return F.scaled_dot_product_attention(x, x, x, attn_mask=((key <= row) & (key > row - window))[None, None])


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda x: F.scaled_dot_product_attention(x, x, x), "cannot split .*: the mask is not causal"),
        (lambda x: causal(x, dropout_p=0.1), "cannot split .*: attention dropout is active"),
        (documents, "packed documents|more than causal"),
        (step, "a step over a split cache needs an attention mask, which tells on which process"),
        (lambda x: step(x, of_data(x), joins=False), "cannot split .*: the mask is not causal"),
        # A window of its own: another one on every process, whether it is shorter than the piece or not.
        (lambda x: step(x, of_data(x) & (torch.arange(101) > 60)), "its mask is more than causal and a padding mask"),
        (lambda x: step(x, of_data(x) & (torch.arange(101) > -9)), "its mask is more than causal and a padding mask"),
        (lambda x: F.scaled_dot_product_attention(x[:, :, 8:], x, x, is_causal=True), "cannot split"),
    ],
)
@pytest.mark.parametrize("layer", [0, 1], ids=["triangle", "dense"])
def test_what_cannot_be_split_is_an_error(attend, reason, layer):
    """As written it would attend within the piece: wrong, and nobody would know."""

    class Layer(nn.Module):
        def forward(self, x):
            return attend(x)

    config = TriangleMixConfig(4, 8, 4, triangle_layer_indices=[layer], min_seq_len=64)
    with fakes(1, 2) as mesh, as_written():
        model = torch.compile(Net(Layer()), backend=tmx_backend(config, context_parallel=mesh))
        with pytest.raises(BackendCompilerFailed, match=f"LoweringError: context_parallel .*(?:{reason})"):
            model(torch.randn(2, 2, 100, 16))


@pytest.mark.parametrize("window", [30, 300])
def test_a_window_is_that_of_the_prompt(window):
    """A piece is shorter than the window: it shows no key beyond it, and the prompt has some."""

    class Layer(nn.Module):
        def forward(self, x):
            return windowed(x, window)

    seen, asked = [], ContextParallel.supports

    def supports(self, call):
        seen.append(call.geometry.reach)
        return asked(self, call)

    with fakes(1, 2) as mesh, as_written(), mock.patch.object(ContextParallel, "supports", supports):
        model = torch.compile(Net(Layer()), backend=tmx_backend(CONFIG, context_parallel=mesh), dynamic=False)
        with contextlib.suppress(RuntimeError):
            model(torch.randn(2, 2, 100, 16))
    assert seen == [window - 1]


def test_what_a_step_exchanges():
    """Partial results of one layer to all, and a check of the mask that all layers share: alike in all layers."""

    class Layer(nn.Module):
        def forward(self, x):
            return x[:, :, -1:] + step(x, of_data(x))

    codes = []
    for config in (CONFIG, CONFIG.replace(triangle_layer_indices=[0])):
        with fakes(0, 3) as mesh, as_written() as graphs:
            model = torch.compile(Net(Layer()), backend=tmx_backend(config, context_parallel=mesh), dynamic=False)
            with contextlib.suppress(RuntimeError):
                model(torch.randn(2, 2, 100, 16))
        names = [str(node.target) for node in graphs[0].graph.nodes if "c10d" in str(node.target)]
        assert [name.split(".")[1] for name in names if "wait" not in name] == ["all_reduce", "all_gather_into_tensor"]
        codes.append(graphs[0].code)
    assert codes[0] == codes[1]


def test_gradients():
    class Layer(nn.Module):
        def forward(self, x):
            return causal(x)

    with fakes(0, 2) as mesh:
        model = torch.compile(Net(Layer()), backend=tmx_backend(CONFIG, context_parallel=mesh))
        with pytest.raises(
            BackendCompilerFailed, match=r"LoweringError: .*inference only, and a gradient is asked for"
        ):
            model(torch.randn(1, 2, 100, 16, requires_grad=True))


def test_an_npu(monkeypatch):
    """As on a machine with one: refused before torchair gets anything."""
    monkeypatch.setattr("tmx_compile.compilers.torchair.on_npu", lambda gm, example_inputs: True)
    with fakes(0, 2) as mesh, torch.no_grad():
        model = torch.compile(Net(Attention()), backend=tmx_backend(CONFIG, context_parallel=mesh))
        with pytest.raises(BackendCompilerFailed, match=r"LoweringError: on NPUs there is neither .* a split prompt"):
            model(torch.randn(1, 100, 64))


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_process_that_dies(where):
    """The other gets an error that names itself and the graph; it waits no longer than its group's patience."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=lone, args=(rank, folder, where)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 1]
        told = Path(folder, "told").read_text()
    if where == "before":
        assert re.search(r"process 0 of 2 got no answer of the others before the graph of layers\.0 to layers\.2", told)
    else:
        assert "context_parallel: process 0 of 2, in the graph of layers.0 to layers.2" in told
