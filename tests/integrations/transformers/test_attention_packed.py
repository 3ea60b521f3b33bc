"""Packed sequences under the switch, and prompts that a graph cannot tell from them: without a mask and a cache."""

import sys

import pytest
import torch
from torch._dynamo import symbolic_convert
from torch._dynamo.side_effects import SideEffects
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_compatibility_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from tests.support.switched import CONFIG, decisions, plan_oracle, prompt, registered, switched_model
from tmx_compile.integrations.transformers import packed
from tmx_compile.integrations.transformers.causal_mask import CausalMask
from tmx_compile.integrations.transformers.judge import Judge
from tmx_compile.integrations.transformers.packed import is_packed, numbers_of
from tmx_compile.report import Reason, Rejected

LENGTHS = (60, 40)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.fixture(autouse=True)
def attention():
    with registered() as attention:
        yield attention


def close(got, want):
    torch.testing.assert_close(got.double(), want, atol=5e-5, rtol=0)


def test_a_compiled_prompt_without_a_mask_and_a_cache(attention):
    """One graph for all long prompts."""
    model = torch.compile(switched_model(), backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n in (100, 77):
            ids = prompt(2, n)
            close(model(ids, use_cache=False).logits, plan_oracle("Llama", CONFIG, ids))
    assert {decisions(attention.report)[layer] for layer in (1, 2)} == {("triangle", "")}
    assert {site.graph for site in attention.report} == {0}


@pytest.mark.parametrize("compiled", [False, True])
def test_each_sequence_is_a_prompt_of_its_own(attention, compiled):
    ids = prompt(2, 100)
    model = switched_model()
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with torch.no_grad():
        got = run(ids, position_ids=POSITIONS, use_cache=False).logits
    parts = [plan_oracle("Llama", CONFIG, part) for part in ids.split(LENGTHS, 1)]
    close(got, torch.cat(parts, 1))
    assert {decisions(attention.report)[layer] for layer in (1, 2)} == {("triangle", "")}


def test_a_compiled_training_step(attention):
    """The gradients of sequences in one row are the sums of each one's own."""
    whole = sum(LENGTHS)
    ids = prompt(1, 100)
    packed, alone = switched_model().train(), switched_model().train()
    torch.compile(packed, backend="aot_eager", fullgraph=True)(
        ids, position_ids=POSITIONS, use_cache=False
    ).logits.square().mean().backward()
    for part in ids.split(LENGTHS, 1):
        (alone(part, use_cache=False).logits.square().mean() * part.shape[1] / whole).backward()
    for (name, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=name)


def _packed(numbers, positions):
    return packed_sequence_compatibility_function(causal_mask_function, positions, numbers)


def _packed_windows(numbers, positions):
    return packed_sequence_compatibility_function(sliding_window_causal_mask_function(9), positions, numbers)


def _without_positions(numbers, positions):
    return and_masks(packed_sequence_mask_function(numbers), causal_mask_function)


def _of_the_users_own(numbers, positions):
    return and_masks(_packed(numbers, positions), lambda b, h, q, kv: q - kv < 5)


FUNCTIONS = {
    _packed: True,
    _packed_windows: False,
    _without_positions: False,
    _of_the_users_own: False,
    lambda *_: sliding_window_causal_mask_function(9): False,
    lambda *_: causal_mask_function: False,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("make", "expected"), FUNCTIONS.items())
def test_which_functions_are_of_packed_sequences(make, expected, compiled):
    """By what they close over, which traced code cannot look at."""

    def asked(numbers, positions):
        return positions + (1 if is_packed(make(numbers, positions)) else 0)

    run = torch.compile(asked, backend="eager", fullgraph=True) if compiled else asked
    zeros = torch.zeros(1, 6, dtype=torch.long)
    assert run(zeros, zeros).unique().tolist() == [int(expected)]


def test_a_compiled_function_that_comes_from_outside():
    """What it closes over may be another thing when the graph runs again."""
    function = _packed(torch.zeros(1, 6), torch.zeros(1, 6))
    asked = torch.compile(lambda x, function: x + (1 if is_packed(function) else 0), backend="eager", fullgraph=True)
    assert asked(torch.zeros(1), function).item() == 0
    assert is_packed(function)


def _gone(*args, **kwargs):
    raise RuntimeError("this Dynamo has another one")


INSIDES = {
    "its module": lambda patch: patch.setitem(sys.modules, "torch._dynamo.symbolic_convert", None),
    "a class": lambda patch: patch.delattr(symbolic_convert, "InstructionTranslator"),
    "the translator at work": lambda patch: patch.delattr(symbolic_convert.InstructionTranslator, "current_tx"),
    "cells": lambda patch: patch.delattr(SideEffects, "load_cell"),
    "cells that raise": lambda patch: patch.setattr(SideEffects, "load_cell", _gone),
    "cells with more arguments": lambda patch: patch.setattr(SideEffects, "load_cell", lambda self, tx, cell: _gone()),
}


@pytest.mark.parametrize("missing", INSIDES)
def test_a_dynamo_with_other_insides_leaves_dense_layers_and_a_reason(attention, missing, monkeypatch):
    """What is read of Dynamo is no interface: without a piece of it nothing breaks, and no result changes."""
    ids = prompt(2, 100)
    model = torch.compile(switched_model(), backend="eager", fullgraph=True)
    read = packed.is_local_packed

    def elsewhere(name):
        # Dynamo itself cannot do without them: they are missing while we read.
        with monkeypatch.context() as patch:
            INSIDES[missing](patch)
            return read(name)

    monkeypatch.setattr(packed, "is_local_packed", elsewhere)
    with torch.no_grad():
        got = model(ids, position_ids=POSITIONS, use_cache=False).logits
    dense = CONFIG.replace(triangle_layer_indices=[7])
    close(got, torch.cat([plan_oracle("Llama", dense, part) for part in ids.split(LENGTHS, 1)], 1))
    assert {decisions(attention.report)[layer] for layer in (1, 2)} == {("dense", "MASK_UNKNOWN")}


def test_numbers():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    function = _packed((torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(1), positions)
    assert numbers_of(function, 2, 6, "cpu").tolist() == [[1, 1, 1, 2, 2, 3], [1] * 6]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_a_traced_prompt_stays_dense(attention, device, monkeypatch):
    """It may be one sequence, and what takes several is plain PyTorch."""
    n = 20000
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mask = CausalMask((1, 1, n, n), torch.ones(1, n, dtype=torch.int64), 0, 0, None, None)
    layer = switched_model().model.layers[1].self_attn
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(1, 4, n, 16, device=device)
        found = Judge(attention.request, CONFIG).call(layer, query, query, query, mask, None, {})
    assert isinstance(found, Rejected) == (device == "cuda")
    assert device == "cpu" or (found.reason, "pass it" in str(found)) == (Reason.NO_LOWERING, True)
