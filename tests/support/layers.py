"""Layers of bare attention, alone and in stacks, for tests of what the backend decides and computes."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.oracle import oracle
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.errors import StrictModeError

N = 150
CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1], num_sink_tokens=4, sliding_window_size=16, num_last_tokens=8, min_seq_len=100
)
DENSE = (0, 0, 2**31 - 1)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *args):
        return self.call(*args)


class OneLayer(nn.Module):
    """A function or a module in the place of layer 0, and nothing else: its result is the model's."""

    def __init__(self, call):
        super().__init__()
        self.layers = nn.ModuleList([call if isinstance(call, nn.Module) else Call(call)])

    def forward(self, *args):
        return self.layers[0](*args)


def qkv(x):
    """Three different tensors of one layer input."""
    return x, x.roll(1, -1), x.flip(-1)


def causal(x):
    return F.scaled_dot_product_attention(*qkv(x), is_causal=True)


class Layer(nn.Module):
    def __init__(self, attend=causal):
        super().__init__()
        self.attend = attend

    def forward(self, x, *rest):
        return x + self.attend(x, *rest)


class Stack(nn.Module):
    def __init__(self, attend=causal, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Layer(attend) for _ in range(layers))

    def forward(self, x, *rest):
        for layer in self.layers:
            x = layer(x, *rest)
        return x


def expected(x, config, layers=2):
    """``Stack()(x)`` in float64."""
    x = x.double()
    for index in range(layers):
        geometry = config.geometry.counts if index in config.layers() else DENSE
        x = x + oracle(*qkv(x), None, *geometry, x.shape[-1] ** -0.5)[0]
    return x


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def reasons(report):
    return [site.reason for site in report]


def check_dense(model, reason, *args, layer=-1, **kwargs):
    """One layer's site is recorded with a reason, the model's numbers are its own, and strict mode refuses."""
    backend = tmx_backend(CONFIG)
    torch.manual_seed(1)
    got = torch.compile(model, backend=backend)(*args, **kwargs)
    torch.manual_seed(1)
    assert torch.equal(got, model(*args, **kwargs))
    assert backend.report.triangle() == []
    assert backend.report.sites[layer].reason == reason.name
    torch._dynamo.reset()
    with pytest.raises(Exception, match=re.escape(reason.value)) as error:
        torch.compile(model, backend=tmx_backend(CONFIG, strict=True))(*args, **kwargs)
    assert isinstance(getattr(error.value, "inner_exception", error.value), StrictModeError)
    return backend.report
