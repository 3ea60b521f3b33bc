"""The Hopper kernel's machine code: it cannot run without such a GPU, but it can be compiled and read anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

SCRIPT = Path(__file__).parents[2] / "support" / "hopper_code.py"
# Of one multiprocessor of an H100.
SHARED_BYTES = 232448


@pytest.mark.parametrize(
    "settings",
    [
        dict(dim=128, group=4, padded=False, reach=False),
        dict(dim=128, group=5, padded=True, reach=True),
        dict(dim=64, group=1, padded=True, reach=False),
        dict(dim=128, group=4, padded=False, reach=False, sink=64, window=1024),
        dict(dim=128, group=4, padded=True, reach=False, sink=4, window=32),
        dict(dim=128, group=4, padded=True, reach=True, sink=0, window=512),
        dict(dim=128, group=1, padded=True, reach=False, sink=0, window=400),
    ],
    ids=str,
)
def test_the_code_is_what_the_design_needs(settings, tmp_path):
    """Products that run beside the softmax, nothing in slow memory, and no descriptor that a path leaves unwritten."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps(settings)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["products"] >= 32
    assert found["shared_bytes"] <= SHARED_BYTES
    assert not found["serialized"]
    # Numbers of an item may be kept there, nothing of its blocks.
    assert found["spilled_bytes"] <= 256
    assert found["loops"] >= 2
    assert found["spills_in_loops"] == 0
    assert found["undefined"] == []


def test_the_other_kernels_compile_for_ampere(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = SCRIPT.with_name("compiled_kernels.py")
    done = subprocess.run([sys.executable, script, "80"], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [False, True]
