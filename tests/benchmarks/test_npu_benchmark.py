"""The benchmark for NPUs: its steps on a CPU, what it refuses, and that a wrong result is no measurement."""

import builtins
import json
import sys
import types

import pytest
import torch

from benchmarks import npu, npu_platform
from benchmarks.npu_platform import Cpu, Npu


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        npu.main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_machine_without_torch_npu_is_told_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(npu_platform.importlib.util, "find_spec", lambda name: None)
    text = refused(capsys)
    assert 'this needs an Ascend NPU: torch_npu is not installed: pip install "tmx-compile[npu]"' in text


def test_an_import_that_fails_is_told_with_its_reason(capsys, monkeypatch):
    real = builtins.__import__

    def fails(name, *rest, **named):
        if name == "torch_npu":
            raise ImportError("libascendcl.so: cannot open shared object file")
        return real(name, *rest, **named)

    monkeypatch.setattr(npu_platform.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(builtins, "__import__", fails)
    text = refused(capsys)
    assert "is CANN's set_env.sh sourced? (libascendcl.so: cannot open shared object file)" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--device", "cpu"], "--device cpu goes with --quick"),
        (["--device", "cpu", "--quick", "prefill"], "unknown part prefill; known: layer, ttft"),
        (["--device", "cpu", "--quick", "--lengths", "512,256"], "--lengths must be over 256 tokens, got 512,256"),
        (
            ["--device", "cpu", "--quick", "--geometry", "4/32"],
            "--geometry: must be sinks/window/last rows as in 8/64/128, got '4/32'",
        ),
        (["--device", "cpu", "--quick", "--modes", "fast"], "--modes must be among inductor, got fast"),
    ],
)
def test_what_cannot_be_run_is_refused(capsys, arguments, reason):
    assert reason in refused(capsys, *arguments)


def test_a_quick_run_on_a_cpu_goes_through_every_step(tmp_path):
    arguments = ["--device", "cpu", "--quick", "--lengths", "320", "--geometry", "0/16/3"]
    npu.main([*arguments, "--out", str(tmp_path)])
    result = json.loads((tmp_path / npu.FILE).read_text(encoding="utf-8"))
    assert result["quick"]
    assert result["settings"]["device"] == "cpu"
    assert result["command"] == "python -m benchmarks.npu " + " ".join(arguments)
    kinds = {(r["part"], tuple(r["geometry"]), r["mode"]) for r in result["records"]}
    geometries = ((), (0, 16, 3))
    assert kinds == {(p, g, m) for p in ("layer", "ttft") for g in geometries for m in ("eager", "inductor")}
    for r in result["records"]:
        assert r["failed"] is None
        assert r["ms"] > 0
        assert r["dense_ms"] == min(x["ms"] for x in result["records"] if x["part"] == r["part"] and not x["geometry"])
        if r["part"] == "layer":
            assert 0 < r["error"] < npu.TOLERANCE["float32"]
            assert r["speedup"] == pytest.approx(r["dense_ms"] / r["ms"], rel=1e-4)
        else:
            assert r["reduction"] == pytest.approx(r["ms"] / r["dense_ms"] - 1, abs=1e-4)
            assert (r["triangle_layers"], r["layers"]) == (2 if r["geometry"] else 0, 4)


class Wrong(Cpu):
    """Dense attention that is not causal."""

    def dense(self, query, key, value, scale):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)


def test_a_wrong_result_is_told_and_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(npu, "Cpu", Wrong)
    with pytest.raises(SystemExit, match="1 of 2 measurements failed"):
        npu.main(["layer", "--device", "cpu", "--quick", "--lengths", "320", "--modes", "none"])
    assert "wrong result: error" in capsys.readouterr().err
    dense, triangle = npu.layer(Wrong(), npu.Plan(**{**vars(npu.QUICK), "lengths": (320,), "modes": ()}))
    assert dense["failed"].startswith("RuntimeError: wrong result: error")
    assert dense["ms"] is None
    assert triangle["ms"] > 0
    assert triangle["speedup"] is None


def test_a_graph_without_its_triangle_layer_is_told():
    class Short(npu.Plan):
        def config(self, geometry, layers):
            return npu.Plan(min_seq_len=4096).config(geometry, layers)

    plan = Short(**{**vars(npu.QUICK), "lengths": (320,)})
    failed = {(r["mode"], bool(r["geometry"])): r["failed"] for r in npu.layer(Cpu(), plan)}
    assert failed["inductor", False] is None
    assert "did not become a triangle layer" in failed["inductor", True]


def test_the_npu_is_asked_for_right_down_causal_attention_with_its_compressed_mask():
    """What torch_npu is called with, and the device's clock, on a stand-in of both."""
    calls = []

    def fused(query, key, value, **named):
        calls.append(named)
        assert all(x.is_contiguous() for x in (query, key, value))
        return query.clone(), None

    log = []

    class Event:
        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, other):
            return 2.5

    platform = Npu.__new__(Npu)
    platform._npu = types.SimpleNamespace(npu_fused_infer_attention_score=fused)
    platform._mask, platform._flush = object(), torch.empty(1)
    platform._events = [Event(), Event()]
    query = torch.randn(1, 20, 4, 16).transpose(1, 2)
    assert torch.equal(platform.dense(query, query[:, :2], query[:, :2], 0.25), query)
    assert calls == [
        {
            "atten_mask": platform._mask,
            "num_heads": 4,
            "num_key_value_heads": 2,
            "scale": 0.25,
            "input_layout": "BNSD",
            "sparse_mode": 3,
        }
    ]
    assert platform.seconds(lambda: log.append("run")) == 0.0025
    assert log == ["record", "run", "record", "synchronize"]
    assert "torch_npu" not in sys.modules
