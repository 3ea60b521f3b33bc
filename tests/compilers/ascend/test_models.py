"""Whole models through the real torchair, run from the protobuf by the interpreter, against float64 oracles.

The oracle is Hugging Face's own eager attention in float64, with the triangle mask written out where a layer is
sparse (``tests/support``): nothing of ``tmx_compile`` nor of the interpreter is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.support.ascend import models
from tests.support.ascend.ge.edit import FIA, Editor
from tests.support.ascend.ge.node import GraphError
from tests.support.ascend.ge.run import execute
from tests.support.ascend.models import Model, geometry, prompt
from tests.support.models import masked_oracle

HALF, BF16 = torch.float16, torch.bfloat16
TOLERANCE = {HALF: 4e-3, BF16: 3e-2}
"""Of the root mean square error, relative to the logits' deviation. Two layers in the dtype itself give 1.5e-3 and
1.3e-2; one key too few in the window gives 0.3."""


def error(logits, expected):
    """Root mean square error of the logits, relative to their standard deviation."""
    assert logits.shape == expected.shape
    return ((logits.double() - expected).square().mean().sqrt() / expected.std()).item()


def dense_oracle(model, ids):
    return masked_oracle(model.build(), geometry(0, 0, 0, layers=()), ids)


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_a_dense_export_gives_the_dense_logits(npu, tmp_path, family):
    model = Model(family, HALF, attention="eager")
    data = npu.call(models.dense_export, model, 37, tmp_path)
    ids = prompt(37)
    (logits,) = execute(data, [ids])
    assert logits.dtype == HALF
    assert error(logits, dense_oracle(model, ids)) < TOLERANCE[HALF]


def test_a_dense_graph_of_every_length(npu):
    """GE mode: the weights are inputs of the graph."""
    model, lengths = Model("Qwen3", BF16, layers=1, attention="eager"), (40, 67, 11, 101)
    outputs, graphs = npu.call(models.dense_compiled, model, lengths)
    assert graphs == 1
    for length, logits in zip(lengths, outputs, strict=True):
        assert error(logits, dense_oracle(model, prompt(length))) < TOLERANCE[BF16]


def test_torchairs_own_dynamic_export_loses_weights(npu, tmp_path):
    """Why ``tmx_compile.export`` does something about it.

    torchair puts the node that reads a length right behind the input that has it, between the Data nodes of the
    weights, and then replaces nodes by weights as if only Data nodes stood there. The interpreter sees it.
    """
    data, expected = npu.call(models.table_export, tmp_path / "fixed", dynamic=False)
    torch.testing.assert_close(execute(data, [prompt(37)])[0], expected)
    data, _ = npu.call(models.table_export, tmp_path / "dynamic", dynamic=True)
    with pytest.raises(GraphError, match="1 inputs were given"):
        execute(data, [prompt(37)])


@pytest.fixture(scope="module")
def exported(_npu_process, tmp_path_factory):
    """Exports through ``tmx_compile``, each made once for all tests."""
    made = {}

    def get(case, length=None):
        """The ModelDef for every length, or for one."""
        if (case, length) not in made:
            folder = tmp_path_factory.mktemp("export")
            arguments = (case.model, case.config, length or 40, folder, length is None)
            made[case, length] = _npu_process().call(models.exported, *arguments)
        return made[case, length]

    return get


@dataclass(frozen=True)
class Case:
    """A model, the geometry of its sparse layers, and which those are."""

    model: Model
    geometry: tuple[int, int, int]
    layers: tuple[int, ...] = (0, 1)
    shortest: int = 0

    @property
    def config(self):
        return geometry(*self.geometry, self.layers, self.shortest)

    def error(self, model, ids):
        """Error of the exported model's logits."""
        (logits,) = execute(model, [ids])
        assert logits.dtype == self.model.dtype
        config = self.config if ids.shape[1] > self.shortest else geometry(0, 0, 0, layers=())
        return error(logits, masked_oracle(self.model.build(), config, ids))

    @property
    def tolerance(self):
        return TOLERANCE[self.model.dtype]


QWEN, LLAMA = Case(Model("Qwen3", HALF), (3, 5, 6)), Case(Model("Llama", BF16), (4, 16, 8))
CASES = {
    "qwen": QWEN,
    "llama": LLAMA,
    "no sinks, no last rows, one layer": Case(Model("Qwen3", BF16), (0, 7, 0), (1,)),
    "no window, one last row, one layer": Case(Model("Llama", HALF), (8, 0, 1), (1,)),
    "dense up to 20": Case(Model("Qwen3", HALF), (2, 3, 4), shortest=20),
}


def lengths(case):
    """Short and long ones, primes, and those where a part of the mask begins or ends."""
    sink, window, last = case.geometry
    edges = {sink, window, last, sink + window + 1, sink + last, sink + window + 1 + last, case.shortest}
    near = {edge + step for edge in edges for step in (-1, 0, 1)}
    return sorted({n for n in near if n > 1} | {1, 2, 37, 64, 101, 211})


@pytest.mark.parametrize("name", CASES)
def test_one_graph_is_right_for_every_length(exported, name):
    case = CASES[name]
    model = exported(case)
    errors = {n: case.error(model, prompt(n)) for n in lengths(case)}
    assert {n: e for n, e in errors.items() if e >= case.tolerance} == {}


@pytest.mark.parametrize("name", ["qwen", "llama"])
@pytest.mark.parametrize("length", [61, 12])
def test_a_graph_of_one_length(exported, name, length):
    case = CASES[name]
    assert case.error(exported(case, length), prompt(length)) < case.tolerance


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_ge_mode_with_the_weights_as_inputs(npu, name):
    case, some = CASES[name], (40, 67, 12, 30, 101)
    outputs, graphs = npu.call(models.compiled, case.model, case.config, some)
    assert graphs == 1 + 1, "one graph for the first length, one for all others"
    for length, logits in zip(some, outputs, strict=True):
        assert error(logits, masked_oracle(case.model.build(), case.config, prompt(length))) < case.tolerance


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_padded_sequences(npu, tmp_path, dtype):
    """One graph for every length, and a mask that differs between the sequences. Rows of padding are not looked at."""
    case = Case(Model("Llama", dtype, layers=1), (3, 5, 6), (0,))
    model = npu.call(models.exported, case.model, case.config, 40, tmp_path, True, padded=True)
    for length in (40, 12, 61, 3):
        ids, mask = prompt(length, 2), models.padding(length)
        (logits,) = execute(model, [ids, mask])
        expected = masked_oracle(case.model.build(), case.config, ids, mask)
        assert error(logits[mask.bool()], expected[mask.bool()]) < case.tolerance, length


def test_what_the_comparison_can_see():
    """The tolerance lies far below what any one key more or less makes of the logits."""
    ids, model = prompt(101), LLAMA.model.build()
    right = masked_oracle(model, LLAMA.config, ids)
    for change in ((3, 16, 8), (5, 16, 8), (4, 15, 8), (4, 17, 8), (4, 16, 7), (4, 16, 9)):
        assert error(masked_oracle(model, geometry(*change), ids), right) > 3 * LLAMA.tolerance


def each(**attrs):
    """A mistake in the attributes of every fused call of one sparse mode."""
    mode = attrs.pop("of")

    def plant(editor):
        for op in editor.nodes(FIA, sparse_mode=mode):
            editor.set(op, **{name: value(op) if callable(value) else value for name, value in attrs.items()})

    return plant


def swapped_tokens(editor):
    for op in editor.nodes(FIA, sparse_mode=4):
        editor.set(op, pre_tokens=op.attr["next_tokens"].i, next_tokens=op.attr["pre_tokens"].i)


def without_mask(editor):
    for op in editor.nodes(FIA, sparse_mode=4):
        editor.unfeed(op, "atten_mask")


def full_instead_of_band(editor):
    for op in editor.nodes(FIA, sparse_mode=4):
        editor.unfeed(op, "atten_mask")
        editor.set(op, sparse_mode=0)


def turned_mask(editor):
    (op,) = editor.nodes("Greater")
    op.type = "Less"


def later(editor, op, name, by):
    """Rows are taken ``by`` further on."""
    gather = editor.upstream(op, name, "GatherV2")
    editor.insert(gather, "indices", "Add", {"x1": None, "x2": torch.tensor(by)})


def sinks_misaligned(editor):
    for op in editor.nodes(FIA, sparse_mode=0):
        later(editor, op, "key0", 1)
        later(editor, op, "value0", 1)


def sink_values_misaligned(editor):
    for op in editor.nodes(FIA, sparse_mode=0):
        later(editor, op, "value0", 1)


def last_rows_misaligned(editor):
    for op in editor.nodes(FIA, sparse_mode=3):
        later(editor, op, "query", -1)


def merge_with_swapped_weights(editor):
    for op in editor.nodes("AttentionUpdate"):
        editor.swap(op, "lse0", "lse1")


def merge_of_one_part(editor):
    for op in editor.nodes("AttentionUpdate"):
        op.input[editor.input(op, "go1")] = op.input[editor.input(op, "go0")]


def parts_in_another_order(editor):
    for update in editor.nodes("AttentionUpdate"):
        (merged,) = (op for op in editor.graph.op if f"{update.name}:0" in op.input)
        (concat,) = (op for op in editor.graph.op if op.type == "ConcatV2" and f"{merged.name}:0" in op.input)
        editor.swap(concat, "x0", "x2")


# Each is found in the logits, or refused with this text.
MISTAKES = {
    "a key more in the window": (each(of=4, pre_tokens=lambda op: op.attr["pre_tokens"].i + 1), None),
    "a key less in the window": (each(of=4, pre_tokens=lambda op: op.attr["pre_tokens"].i - 1), None),
    "a key of the future": (each(of=4, next_tokens=1), None),
    "swapped tokens": (swapped_tokens, None),
    "no mask for the band": (without_mask, "sparse_mode 4 needs atten_mask"),
    "all keys instead of the band": (full_instead_of_band, None),
    "the mask the other way round": (turned_mask, "needs the strict upper triangle"),
    "sinks misaligned": (sinks_misaligned, None),
    "sink values misaligned": (sink_values_misaligned, None),
    "last rows misaligned": (last_rows_misaligned, None),
    "last rows counted from the top": (each(of=3, sparse_mode=2), None),
    "no last rows": (each(of=3, sparse_mode=4, pre_tokens=5, next_tokens=0), None),
    "merge with swapped weights": (merge_with_swapped_weights, None),
    "merge of one part with itself": (merge_of_one_part, None),
    "parts in another order": (parts_in_another_order, None),
    "no log-sum-exp": (each(of=4, softmax_lse_flag=False), "AttentionUpdate .* must be"),
    "another scale": (each(of=4, scale=0.125), None),
    "no groups of heads": (each(of=4, num_key_value_heads=0), "num_key_value_heads is 4, key has 2"),
    "another layout": (each(of=4, input_layout="BSND"), "num_heads is 4, query has 3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistakes_are_caught(exported, name):
    """In the protobuf of the graph that the tests above find right."""
    editor, ids = Editor(exported(QWEN)), prompt(37)
    assert QWEN.error(editor.model, ids) < QWEN.tolerance
    plant, refusal = MISTAKES[name]
    plant(editor)
    if refusal is None:
        assert QWEN.error(editor.model, ids) > 20 * QWEN.tolerance
    else:
        with pytest.raises(GraphError, match=refusal):
            QWEN.error(editor.model, ids)
