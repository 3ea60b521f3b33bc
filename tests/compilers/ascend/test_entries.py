"""The three ways to an Ascend NPU, through the real torchair: what each makes, and what each says instead."""

from __future__ import annotations

import textwrap

import pytest
import torch
from expecttest import assert_expected_inline

from tests.support.ascend import npu_ops, programs
from tests.support.ascend.ge.run import execute
from tests.support.ascend.standin.process import RemoteError
from tests.support.oracle import oracle
from tmx_compile import TriangleMixInferenceConfig, tmx_backend
from tmx_compile import backend as api

GEOMETRY, DENSE = (3, 5, 6), (0, 0, 2**31 - 1)
LENGTHS = (1, 2, 3, 8, 9, 10, 14, 15, 16, 40, 77)


def expected(x, valid=None, geometry=GEOMETRY):
    """``programs.Layers`` in float64, rounded between the layers as the model does."""

    def attend(x, geometry):
        q, k, v = x[..., :64], x[..., 64:80], x[..., 80:]
        q, k, v = (t.unflatten(2, (-1, 16)).transpose(1, 2) for t in (q, k, v))
        return oracle(q, k, v, valid, *geometry, 0.25)[0].transpose(1, 2).flatten(2)

    x = x * 2
    dense = attend(x, DENSE).half()
    return attend(torch.cat([dense, x[..., 64:]], 2), geometry)


def close(got, want):
    torch.testing.assert_close(got.double(), want, atol=4e-3, rtol=0)


def listed(types):
    """The operators in lines of one layer's parts: a line ends with each attention call, merge and join."""
    lines, line = [], []
    for name in types:
        line.append(name)
        if name in ("FusedInferAttentionScore", "AttentionUpdate", "ConcatV2", "NetOutput"):
            lines.append(line)
            line = []
    return "\n".join(textwrap.fill(" ".join(line), 100, subsequent_indent="  ") for line in lines)


def test_export_of_one_length(npu, tmp_path):
    ops, model, report = npu.call(programs.export, tmp_path)
    assert [(site["layer"], site["decision"], site["lowering"]) for site in report] == [
        (0, "dense", "ascend"),
        (1, "triangle", "ascend"),
    ]
    assert (tmp_path / "dynamo.pbtxt").stat().st_size < 1 << 20, "the mask is made in the graph"
    close(execute(model, [programs.tensor(40)])[0], expected(programs.tensor(40)))
    assert_expected_inline(
        listed(ops),
        """\
Data Mul Cast StridedSliceV2 StridedSliceV2 StridedSliceV2 Reshape Transpose Reshape Identity
  Reshape Identity Reshape Identity Range Cast Unsqueeze Unsqueeze Greater FusedInferAttentionScore
Reshape Transpose Reshape Identity StridedSliceV2 Reshape ConcatV2
StridedSliceV2 StridedSliceV2 StridedSliceV2 Reshape Transpose Reshape Identity Reshape Identity
  Reshape Identity StridedSliceV2 StridedSliceV2 FusedInferAttentionScore
FusedInferAttentionScore
Reshape Reshape Reshape Reshape AttentionUpdate
Reshape StridedSliceV2 StridedSliceV2 Identity StridedSliceV2 StridedSliceV2
  FusedInferAttentionScore
StridedSliceV2 Identity FusedInferAttentionScore
ConcatV2
Reshape Transpose Reshape Identity Reshape NetOutput""",
    )


def test_export_of_every_length(npu, tmp_path):
    ops, model, report = npu.call(programs.export, tmp_path, dynamic=True)
    assert [site["dynamic"] for site in report] == [True, True]
    for n in LENGTHS:
        close(execute(model, [programs.tensor(n)])[0], expected(programs.tensor(n)))
    assert_expected_inline(
        listed(ops),
        """\
Data Shape Gather Mul Cast StridedSliceV2 StridedSliceV2 StridedSliceV2 Pack Pack Pack Pack Reshape
  Transpose Pack Reshape PadV3 Pack Reshape PadV3 Pack Reshape PadV3 Range Cast Unsqueeze Unsqueeze
  Greater FusedInferAttentionScore
StridedSliceV2 Pack Reshape Transpose Pack Reshape Identity Pack StridedSliceV2 Pack Reshape
  ConcatV2
StridedSliceV2 StridedSliceV2 StridedSliceV2 Pack Pack Pack Pack Reshape Transpose Pack Reshape
  PadV3 Shape Gather Pack Reshape PadV3 Pack Reshape PadV3 Range Cast Add Range Cast Minimum
  GatherV2 GatherV2 FusedInferAttentionScore
FusedInferAttentionScore
Reshape Reshape Reshape Reshape AttentionUpdate
Pack Range Cast Minimum GatherV2 GatherV2 GatherV2 FusedInferAttentionScore
Range Cast Sub Add ClipByValueV2 GatherV2 FusedInferAttentionScore
Range Cast Range Cast Add Add GreaterEqual Add Add SelectV2 Cast Less SelectV2 Pack Reshape ConcatV2
GatherV2 Pack Reshape Transpose Pack Reshape Identity Pack Pack Reshape NetOutput""",
    )


def test_a_short_prompt_is_dense_inside_the_graph_of_every_length(npu, tmp_path):
    _, model, _ = npu.call(programs.export, tmp_path, dynamic=True, config=programs.config(shortest=15))
    for n in LENGTHS:
        x = programs.tensor(n)
        close(execute(model, [x])[0], expected(x, None, DENSE if n <= 15 else GEOMETRY))


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_with_padding(npu, tmp_path, dynamic):
    ops, model, report = npu.call(programs.export, tmp_path, dynamic=dynamic, padded=True)
    assert [site["lowering"] for site in report] == ["ascend", "ascend"]
    assert ops.count("FusedInferAttentionScore") == 5
    for n in LENGTHS if dynamic else (40,):
        x, valid = programs.tensor(n, 4), programs.valid(n)
        close(execute(model, [x, valid])[0], expected(x, valid))


def test_ge_mode(npu):
    graphs, outputs = npu.call(programs.ge_mode, (40, 77, 16, 2, 9))
    assert len(graphs) == 2, "the first length by itself, then one graph for all"
    for n, out in zip((40, 77, 16, 2, 9), outputs, strict=True):
        close(out, expected(programs.tensor(n)))
    assert_expected_inline(
        listed(graphs[1]),
        """\
Data Shape Gather Data Mul Cast StridedSliceV2 StridedSliceV2 StridedSliceV2 Pack Pack Pack Pack
  Reshape Transpose Pack Reshape Identity Pack Reshape Identity Pack Reshape Identity Range Cast
  Unsqueeze Unsqueeze Greater FusedInferAttentionScore
Pack Reshape Transpose Pack Reshape Identity Pack StridedSliceV2 Pack Reshape ConcatV2
StridedSliceV2 StridedSliceV2 StridedSliceV2 Pack Pack Pack Pack Reshape Transpose Pack Reshape
  Identity Pack Reshape Identity Pack Reshape Identity Sub Range Cast Add Range Cast Minimum
  GatherV2 GatherV2 FusedInferAttentionScore
FusedInferAttentionScore
Reshape Reshape Reshape Reshape AttentionUpdate
Pack Range Cast Minimum GatherV2 GatherV2 GatherV2 FusedInferAttentionScore
Range Cast Sub Add ClipByValueV2 GatherV2 FusedInferAttentionScore
Range Cast Range Cast Add Add GreaterEqual Add Add SelectV2 Cast Less SelectV2 Pack Reshape ConcatV2
GatherV2 Pack Reshape Transpose Pack Reshape Identity Pack Pack Reshape NetOutput""",
    )


def test_npugraph_ex(npu):
    ops = npu.call(programs.captured)
    shown = [op.split(".")[1] for op in ops if op.startswith(("npu.", "aten."))]
    assert_expected_inline(
        "\n".join(op for op in shown if op not in ("reshape", "transpose")),
        """\
mul
slice
slice
slice
clone
clone
clone
arange
unsqueeze
unsqueeze
gt
npu_fused_infer_attention_score
permute
clone
permute
slice
cat
slice
slice
slice
clone
clone
clone
slice
slice
npu_fused_infer_attention_score
npu_fused_infer_attention_score
npu_attention_update
slice
slice
clone
slice
slice
npu_fused_infer_attention_score
slice
clone
npu_fused_infer_attention_score
cat
permute
clone
permute""",
    )


def test_training_stays_dense_with_the_reason(npu):
    (_, sparse) = npu.call(programs.trained)
    assert sparse["decision"] == "dense"
    assert sparse["reason"] == "NO_LOWERING"
    assert "torch.no_grad()" in sparse["detail"]


def test_a_cann_without_an_operator_is_named_with_what_to_do(npu, tmp_path):
    with pytest.raises(RemoteError) as caught:
        npu.call(programs.export, tmp_path, lacks="AttentionUpdate")
    assert caught.value.kind == "TriangleMixError"
    text = str(caught.value)
    assert "Install a CANN that fits torch_npu" in text
    assert "OperatorFactory find optype AttentionUpdate failed, maybe you need upgrade cann version" in text


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("backend", dict(target="npu"), "target must be one of auto, inductor, ascend, got 'npu'"),
        ("backend", dict(target="ascend", lowering="flex"), "lowering 'flex' is not for torchair"),
        (
            "backend",
            dict(target="ascend", compiler_config=3),
            "compiler_config must be a torchair.CompilerConfig, got 3",
        ),
        ("backend", dict(target="inductor", lowering="ascend"), "give target='ascend'"),
        ("export", dict(model=3), "model must be a torch.nn.Module, got 3"),
        ("export", dict(dynamic=2), "dynamic must be True or False, got 2"),
        ("export", dict(export_name="a/b"), "export_name must be a file name without a folder, got 'a/b'"),
        ("export", dict(config=3), "config must be a TriangleMixConfig"),
    ],
)
def test_bad_arguments(npu, name, arguments, message):
    with pytest.raises(RemoteError) as caught:
        npu.call(programs.entry, name, **arguments)
    assert caught.value.kind == "ValueError"
    assert message in str(caught.value)


def test_explain_tells_what_the_target_gets(npu):
    for target, lowering in (("ascend", "ascend"), ("inductor", "blocked"), ("auto", "blocked")):
        report = npu.call(programs.explained, target)
        assert report[1]["lowering"] == lowering
        assert report[1]["decision"] == "triangle"


def test_a_symbolic_link_is_refused(npu, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RemoteError, match="symbolic link"):
        npu.call(programs.entry, "export", export_path=str(tmp_path / "link"))


def test_float32_is_refused_and_strict_mode_says_so(npu, tmp_path):
    with pytest.raises(RemoteError, match="float16 and bfloat16, not float32") as caught:
        npu.call(programs.export, tmp_path, dtype="float32")
    assert caught.value.kind == "StrictModeError"


def test_operators_of_torch_npu_are_called_as_their_schemas_say(npu):
    """What the CPU kernels of the other tests take, the real operators take, with the same defaults."""
    real = npu.call(programs.schemas)
    for name, own in (("npu_fused_infer_attention_score", npu_ops.FIA), ("npu_attention_update", npu_ops.UPDATE)):
        theirs = torch._C.parse_schema(real[name].replace("npu::", ""))
        found = {argument.name: argument for argument in theirs.arguments}
        for argument in torch._C.parse_schema(" ".join(own.split())).arguments:
            other = found[argument.name]
            assert (str(argument.type), argument.default_value) == (str(other.type), other.default_value)


# Here, without torch_npu ---------------------------------------------------------------------------------------------


def test_without_torch_npu_the_extra_is_named():
    with pytest.raises(ImportError, match=r"pip install 'tmx-compile\[npu\]'"):
        tmx_backend(programs.config(), target="ascend")


def test_auto_is_inductor_without_an_npu(eager):
    backend = tmx_backend(programs.config())
    with torch.no_grad():
        torch.compile(programs.Layers(), backend=backend)(programs.tensor(40))
    assert len(eager) == 1
    assert backend.report.triangle()[0].lowering != "ascend"


@pytest.mark.parametrize("wanted", [True, False])
def test_the_inference_configuration_says_whether_auto_takes_torchair(wanted, monkeypatch, eager):
    """As on a machine with an NPU; torchair itself is not there, and its name in the error shows who was asked."""
    monkeypatch.setattr(api.torchair, "on_npu", lambda gm, example_inputs: True)
    serving = TriangleMixInferenceConfig(
        enable_trianglemix=True, triangle_layer_indices=(1,), use_npu_optimization=wanted
    )
    model = torch.compile(programs.Layers(), backend=tmx_backend(serving))
    with torch.no_grad():
        if wanted:
            with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="target 'ascend' needs torch_npu"):
                model(programs.tensor(40))
        else:
            model(programs.tensor(40))
    assert len(eager) == (not wanted)


@pytest.mark.parametrize("other", [dict(target="ascend"), dict(compiler_config=3)])
def test_the_inference_configuration_is_not_contradicted(other):
    serving = TriangleMixInferenceConfig(
        enable_trianglemix=True, triangle_layer_indices=(1,), use_npu_optimization=False
    )
    with pytest.raises(ValueError, match="use_npu_optimization=False"):
        tmx_backend(serving, **other)
