"""``tmx export``: a model's folder in, an ``.air`` with the right numbers out; and what it says instead."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.support.ascend import commands
from tests.support.ascend.ge.run import execute
from tests.support.ascend.models import Model, geometry, prompt
from tests.support.models import masked_oracle
from tmx_compile.cli import main

QWEN3 = Model("Qwen3", torch.float16)
OPTIONS = ("--layers", "1", "--geometry", "3/5/6", "--min-seq-len", "15", "--dtype", "float16", "--strict")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    QWEN3.build().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("dynamic", "lengths"), [((), (40,)), (("--dynamic",), (40, 16, 15, 7, 77))])
def test_it_writes_the_model_with_its_sparse_layers(npu, stored, tmp_path, dynamic, lengths):
    out = tmp_path / "out"
    data = npu.call(commands.run, out, "export", str(stored), "--to", str(out), "--tokens", "40", *OPTIONS, *dynamic)
    for length in lengths:
        config = geometry(3, 5, 6, layers=(1,) if length > 15 else ())
        want = masked_oracle(QWEN3.build(), config, prompt(length))[:, -1:]
        (got,) = execute(data, [prompt(length)])
        assert got.shape == want.shape
        error = (got.double() - want).square().mean().sqrt() / want.std()
        assert error < 4e-3, length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "2"), "layers must be among the model's 0 to 1, got 2"),
        (("--layers", "1", "--name", "a/b"), "export_name must be a file name without a folder, got 'a/b'"),
        ((), "one of the arguments --deepest --layers --profile is required"),
    ],
)
def test_bad_input_is_one_clear_line(npu, stored, tmp_path, arguments, message):
    given = ("export", str(stored), "--to", str(tmp_path / "out"), "--tokens", "40", *arguments)
    assert message in npu.call(commands.refused, *given)


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_without_torch_npu_it_says_what_to_install(stored, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(stored), "--to", str(tmp_path / "out"), "--tokens", "40", *OPTIONS])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "needs torch_npu" in said
    assert "pip install 'tmx-compile[npu]'" in said
    assert not (tmp_path / "out").exists()
