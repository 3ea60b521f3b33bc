"""The command ``tmx``: what it writes, and what it refuses before any work."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tmx_compile.bench import layer
from tmx_compile.cli import main

SMALL = [
    *("--device", "cpu", "--lengths", "300", "--geometry", "4/32/64", "--heads", "2", "--kv-heads", "1"),
    *("--dim", "8", "--dtype", "float32", "--rounds", "2"),
]


def test_bench_writes_what_it_shows(tmp_path, capsys):
    out = tmp_path / "x.json"
    main(["bench", *SMALL, "--lowering", "operator", "--budget", "0", "--out", str(out)])
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["case"] == "operator"
    assert content["command"].startswith("tmx bench --device cpu --lengths 300 ")
    assert content["hardware"]["cpu"]
    assert content["settings"]["left_out"] == {}
    (record,) = content["records"]
    assert (record["n"], record["geometry"], record["lowering"]) == (300, [4, 32, 64], "operator")
    assert record["rounds"] == 2
    shown = capsys.readouterr().out
    assert "over_floor" in shown
    assert "4/32/64" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "4k"], "argument --lengths: must be a whole number of at least 1, got '4k'"),
        (["--lengths", "200"], "lengths must be over 256 tokens, got 200"),
        (["--geometry", "8/512"], "argument --geometry: must be sinks/window/last rows as in 8/64/128, got '8/512'"),
        (["--geometry", "8/-5/1"], "argument --geometry: must be sinks/window/last rows as in 8/64/128, got '8/-5/1'"),
        (["--heads", "0"], "argument --heads: must be a whole number of at least 1, got '0'"),
        (["--kv-heads", "3"], "kv_heads must divide heads, got 3 and 2"),
        (["--dim", "x"], "argument --dim: must be a whole number of at least 1, got 'x'"),
        (["--dtype", "int8"], "dtypes must be among float32, bfloat16, float16, got 'int8'"),
        (["--lowering", "fast"], "lowerings must be among "),
        (["--budget", "-1"], "argument --budget: must be a number of at least 0, got '-1'"),
        (["--budget", "nan"], "argument --budget: must be a number of at least 0, got 'nan'"),
        (["--device", "tpu"], "device must be one of cpu, cuda, got 'tpu'"),
        (["--out", "/no/such/folder/x.json"], "out must be a file in an existing folder, got '/no/such/folder/x.json'"),
    ],
)
def test_bad_input_is_refused_before_any_work(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(layer, "measure", None)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *SMALL, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["bench", *SMALL, "--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_the_entry_point_is_the_command():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is new in 3.11")
    import tomllib

    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["project"]["scripts"] == {"tmx": "tmx_compile.cli:main"}
