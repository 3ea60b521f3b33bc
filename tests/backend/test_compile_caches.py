"""Compile caches across processes: the same work hits, changed work misses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tmx_compile

_PROGRAM = """
import json, sys, torch, torch.nn.functional as F
from torch._dynamo.utils import counters
import tmx_compile
from tmx_compile import TriangleMixConfig, tmx_backend

settings = json.loads(sys.argv[1])

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(32, 32)
    def forward(self, x):
        q = self.q(x).unflatten(2, (2, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention(), Attention()])
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

torch.manual_seed(0)
model, x = Model(), torch.randn(1, 300, 32)
config = TriangleMixConfig(min_seq_len=100, num_sink_tokens=2, num_last_tokens=4, **settings["config"])
with torch.no_grad():
    out = torch.compile(model, backend=tmx_backend(config, lowering=settings["lowering"]))(x)
count = counters["inductor"]
print(json.dumps({
    "hits": count["fxgraph_cache_hit"], "misses": count["fxgraph_cache_miss"], "bypass": count["fxgraph_cache_bypass"],
    "aot_hits": counters["aot_autograd"]["autograd_cache_hit"],
    "aot_bypass": counters["aot_autograd"]["autograd_cache_bypass"],
    "sum": out.double().sum().item(), "version": tmx_compile.__version__,
}))
"""


def run(cache, package=None, lowering="blocked", **config):
    config = {"triangle_layer_indices": [1], "sliding_window_size": 16} | config
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_AUTOTUNE_REMOTE_CACHE": "0"}
    env["PYTHONPATH"] = str(package or Path(tmx_compile.__file__).parent.parent)
    settings = json.dumps({"config": config, "lowering": lowering})
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, settings],
        env=env,
        cwd=cache.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("lowering", ["flex", "blocked"])
def test_a_second_process_hits_and_changes_miss(tmp_path, lowering):
    cache = tmp_path / "cache"
    first = run(cache, lowering=lowering)
    assert (first["hits"], first["misses"], first["bypass"]) == (0, 1, 0)
    second = run(cache, lowering=lowering)
    assert (second["hits"] + second["aot_hits"] > 0, second["misses"]) == (True, 0)
    assert second["aot_bypass"] == 0
    assert second["sum"] == first["sum"]

    window = run(cache, lowering=lowering, sliding_window_size=40)
    assert (window["aot_hits"], window["hits"], window["misses"]) == (0, 0, 1)
    assert window["sum"] != first["sum"]
    layers = run(cache, lowering=lowering, triangle_layer_indices=[0])
    assert (layers["aot_hits"], layers["hits"], layers["misses"]) == (0, 0, 1)
    assert layers["sum"] != first["sum"]


def test_a_changed_package_misses(tmp_path):
    cache, package = tmp_path / "cache", tmp_path / "package"
    assert run(cache)["misses"] == 1
    shutil.copytree(Path(tmx_compile.__file__).parent, package / "tmx_compile")
    # The same sources elsewhere are the same package.
    assert run(cache, package)["misses"] == 0
    version = package / "tmx_compile" / "version.py"
    version.write_text(re.sub(r'__version__ = "[^"]+"', '__version__ = "99.0"', version.read_text()))
    changed = run(cache, package)
    assert changed["version"] == "99.0"
    assert (changed["hits"], changed["aot_hits"], changed["misses"]) == (0, 0, 1)
    # And so does a change of any source file under the same version.
    shutil.rmtree(package)
    shutil.copytree(Path(tmx_compile.__file__).parent, package / "tmx_compile")
    blocked = package / "tmx_compile" / "lowering" / "blocked.py"
    blocked.write_text(blocked.read_text() + "\n# changed\n")
    assert run(cache, package)["misses"] == 1
