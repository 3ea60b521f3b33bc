# ruff: noqa: E501
"""What the pass does to a real model's graph, as snapshots: before and after.

``EXPECTTEST_ACCEPT=1 pytest tests/backend/test_snapshots.py`` rewrites them after a change that is meant.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from expecttest import TestCase

from tests.support.snapshots import N, after, before, whole


class Snapshots(TestCase):
    maxDiff = None

    def test_before_with_padding(self):
        self.assertExpectedInline(
            before(padded=True),
            """\
%0 = .to(i64[2, 70], device=cpu, dtype=b8) : b8[2, 70]
%1 = arange(2, device=cpu) : i64[2]
%2 = arange(70, device=cpu) : i64[70]
%3 = add(%2, 0) : i64[70]
%4 = arange(70, device=cpu) : i64[70]
%5 = add(%4, 0) : i64[70]
%6 = getitem(%1, (:, None, None, None)) : i64[2, 1, 1, 1]
%7 = getitem(%3, (None, None, :, None)) : i64[1, 1, 70, 1]
%8 = getitem(%5, (None, None, None, :)) : i64[1, 1, 1, 70]
%9 = .new_ones(%7, (), dtype=b8) : b8[]
%10 = le(%8, %7) : b8[1, 1, 70, 70]
%11 = .to(%10, cpu) : b8[1, 1, 70, 70]
%12 = and_(%9, %11) : b8[1, 1, 70, 70]
%13 = getitem(%0, (%6, %8)) : b8[2, 1, 1, 70]
%14 = .to(%13, cpu) : b8[2, 1, 1, 70]
%15 = and_(%12, %14) : b8[2, 1, 70, 70]
%16 = .expand(%15, 2, -1, 70, 70) : b8[2, 1, 70, 70]
%17 = getitem(f32[2, 2, 70, 16], (:, :, None, :, :)) : f32[2, 2, 1, 70, 16]
%18 = .expand(%17, 2, 2, 2, 70, 16) : f32[2, 2, 2, 70, 16]
%19 = .reshape(%18, 2, 4, 70, 16) : f32[2, 4, 70, 16]
%20 = getitem(f32[2, 2, 70, 16], (:, :, None, :, :)) : f32[2, 2, 1, 70, 16]
%21 = .expand(%20, 2, 2, 2, 70, 16) : f32[2, 2, 2, 70, 16]
%22 = .reshape(%21, 2, 4, 70, 16) : f32[2, 4, 70, 16]
%23 = scaled_dot_product_attention(f32[2, 4, 70, 16], %19, %22, attn_mask=%16, dropout_p=0.0, is_causal=False, scale=0.25) : f32[2, 4, 70, 16]
%24 = getitem(f32[2, 2, 70, 16], (:, :, None, :, :)) : f32[2, 2, 1, 70, 16]
%25 = .expand(%24, 2, 2, 2, 70, 16) : f32[2, 2, 2, 70, 16]
%26 = .reshape(%25, 2, 4, 70, 16) : f32[2, 4, 70, 16]
%27 = getitem(f32[2, 2, 70, 16], (:, :, None, :, :)) : f32[2, 2, 1, 70, 16]
%28 = .expand(%27, 2, 2, 2, 70, 16) : f32[2, 2, 2, 70, 16]
%29 = .reshape(%28, 2, 4, 70, 16) : f32[2, 4, 70, 16]
%30 = scaled_dot_product_attention(f32[2, 4, 70, 16], %26, %29, attn_mask=%16, dropout_p=0.0, is_causal=False, scale=0.25) : f32[2, 4, 70, 16]""",
        )

    def test_after_with_padding(self):
        """The operator, the dense layer without its mask, and one key mask for both."""
        self.assertExpectedInline(
            after("operator", padded=True),
            """\
%0 = .to(i64[2, 70], b8) : b8[2, 70]
%1 = .expand(%0, 2, 70) : b8[2, 70]
%2 = where(%1, 0.0, -inf) : f32[2, 70]
%3 = .to(%2, f32) : f32[2, 70]
%4 = getitem(%3, (:, None, None, :)) : f32[2, 1, 1, 70]
%5 = aten._scaled_dot_product_flash_attention_for_cpu.default(f32[2, 4, 70, 16], f32[2, 2, 70, 16], f32[2, 2, 70, 16], 0.0, True, attn_mask=%4, scale=0.25)
%6 = getitem(%5, 0) : f32[2, 4, 70, 16]
%7 = tmx.triangle_attention.default(f32[2, 4, 70, 16], f32[2, 2, 70, 16], f32[2, 2, 70, 16], %1, 4, 16, 8, 0.25)
%8 = getitem(%7, 0) : f32[2, 4, 70, 16]""",
        )

    def test_before_without_padding(self):
        """The packed-sequence mask of transformers: two document comparisons beside the causal one."""
        self.assertExpectedInline(
            before(padded=False),
            """\
%0 = arange(70, device=cpu) : i64[70]
%1 = add(%0, 0) : i64[70]
%2 = .unsqueeze(%1, 0) : i64[1, 70]
%3 = .expand(%2, 2, -1) : i64[2, 70]
%4 = getitem(%3, (:, :1)) : i64[2, 1]
%5 = sub(%4, 1) : i64[2, 1]
%6 = diff(%3, dim=-1, prepend=%5) : i64[2, 70]
%7 = ne(%6, 1) : b8[2, 70]
%8 = .cumsum(%7, -1) : i64[2, 70]
%9 = .expand(%2, 2, -1) : i64[2, 70]
%10 = arange(2, device=cpu) : i64[2]
%11 = arange(70, device=cpu) : i64[70]
%12 = add(%11, 0) : i64[70]
%13 = arange(70, device=cpu) : i64[70]
%14 = add(%13, 0) : i64[70]
%15 = getitem(%10, (:, None, None, None)) : i64[2, 1, 1, 1]
%16 = getitem(%12, (None, None, :, None)) : i64[1, 1, 70, 1]
%17 = getitem(%14, (None, None, None, :)) : i64[1, 1, 1, 70]
%18 = .new_ones(%16, (), dtype=b8) : b8[]
%19 = getitem(%8, (%15, %16)) : i64[2, 1, 70, 1]
%20 = getitem(%8, (%15, %17)) : i64[2, 1, 1, 70]
%21 = eq(%19, %20) : b8[2, 1, 70, 70]
%22 = .to(%21, cpu) : b8[2, 1, 70, 70]
%23 = and_(%18, %22) : b8[2, 1, 70, 70]
%24 = getitem(%9, (%15, %16)) : i64[2, 1, 70, 1]
%25 = getitem(%9, (%15, %17)) : i64[2, 1, 1, 70]
%26 = le(%25, %24) : b8[2, 1, 70, 70]
%27 = .to(%26, cpu) : b8[2, 1, 70, 70]
%28 = and_(%23, %27) : b8[2, 1, 70, 70]
%29 = .expand(%28, 2, -1, 70, 70) : b8[2, 1, 70, 70]
%30 = getitem(f32[2, 2, 70, 16], (:, :, None, :, :)) : f32[2, 2, 1, 70, 16]
%31 = .expand(%30, 2, 2, 2, 70, 16) : f32[2, 2, 2, 70, 16]
%32 = .reshape(%31, 2, 4, 70, 16) : f32[2, 4, 70, 16]
%33 = getitem(f32[2, 2, 70, 16], (:, :, None, :, :)) : f32[2, 2, 1, 70, 16]
%34 = .expand(%33, 2, 2, 2, 70, 16) : f32[2, 2, 2, 70, 16]
%35 = .reshape(%34, 2, 4, 70, 16) : f32[2, 4, 70, 16]
%36 = scaled_dot_product_attention(f32[2, 4, 70, 16], %32, %35, attn_mask=%29, dropout_p=0.0, is_causal=False, scale=0.25) : f32[2, 4, 70, 16]
%37 = getitem(f32[2, 2, 70, 16], (:, :, None, :, :)) : f32[2, 2, 1, 70, 16]
%38 = .expand(%37, 2, 2, 2, 70, 16) : f32[2, 2, 2, 70, 16]
%39 = .reshape(%38, 2, 4, 70, 16) : f32[2, 4, 70, 16]
%40 = getitem(f32[2, 2, 70, 16], (:, :, None, :, :)) : f32[2, 2, 1, 70, 16]
%41 = .expand(%40, 2, 2, 2, 70, 16) : f32[2, 2, 2, 70, 16]
%42 = .reshape(%41, 2, 4, 70, 16) : f32[2, 4, 70, 16]
%43 = scaled_dot_product_attention(f32[2, 4, 70, 16], %39, %42, attn_mask=%29, dropout_p=0.0, is_causal=False, scale=0.25) : f32[2, 4, 70, 16]""",
        )

    def test_after_without_padding(self):
        self.assertExpectedInline(
            after("operator"),
            """\
%0 = scaled_dot_product_attention(f32[2, 4, 70, 16], f32[2, 2, 70, 16], f32[2, 2, 70, 16], enable_gqa=True, is_causal=True, scale=0.25) : f32[2, 4, 70, 16]
%1 = tmx.triangle_attention.default(f32[2, 4, 70, 16], f32[2, 2, 70, 16], f32[2, 2, 70, 16], None, 4, 16, 8, 0.25)
%2 = getitem(%1, 0) : f32[2, 4, 70, 16]""",
        )

    def test_before_with_padding_and_dynamic_length(self):
        self.assertExpectedInline(
            before(padded=True, mark=True),
            """\
%0 = .to(i64[2, s0], device=cpu, dtype=b8) : b8[2, s0]
%1 = arange(2, device=cpu) : i64[2]
%2 = arange(s1, device=cpu) : i64[s1]
%3 = add(%2, 0) : i64[s1]
%4 = arange(s1, device=cpu) : i64[s1]
%5 = add(%4, 0) : i64[s1]
%6 = getitem(%1, (:, None, None, None)) : i64[2, 1, 1, 1]
%7 = getitem(%3, (None, None, :, None)) : i64[1, 1, s1, 1]
%8 = getitem(%5, (None, None, None, :)) : i64[1, 1, 1, s1]
%9 = .new_ones(%7, (), dtype=b8) : b8[]
%10 = le(%8, %7) : b8[1, 1, s1, s1]
%11 = .to(%10, cpu) : b8[1, 1, s1, s1]
%12 = and_(%9, %11) : b8[1, 1, s1, s1]
%13 = getitem(%0, (%6, %8)) : b8[2, 1, 1, s1]
%14 = .to(%13, cpu) : b8[2, 1, 1, s1]
%15 = and_(%12, %14) : b8[2, 1, s1, s1]
%16 = .expand(%15, 2, -1, s1, s1) : b8[2, 1, s1, s1]
%17 = getitem(f32[2, 2, s1, 16], (:, :, None, :, :)) : f32[2, 2, 1, s1, 16]
%18 = .expand(%17, 2, 2, 2, s1, 16) : f32[2, 2, 2, s1, 16]
%19 = .reshape(%18, 2, 4, s1, 16) : f32[2, 4, s1, 16]
%20 = getitem(f32[2, 2, s1, 16], (:, :, None, :, :)) : f32[2, 2, 1, s1, 16]
%21 = .expand(%20, 2, 2, 2, s1, 16) : f32[2, 2, 2, s1, 16]
%22 = .reshape(%21, 2, 4, s1, 16) : f32[2, 4, s1, 16]
%23 = scaled_dot_product_attention(f32[2, 4, s1, 16], %19, %22, attn_mask=%16, dropout_p=0.0, is_causal=False, scale=0.25) : f32[2, 4, s1, 16]
%24 = getitem(f32[2, 2, s1, 16], (:, :, None, :, :)) : f32[2, 2, 1, s1, 16]
%25 = .expand(%24, 2, 2, 2, s1, 16) : f32[2, 2, 2, s1, 16]
%26 = .reshape(%25, 2, 4, s1, 16) : f32[2, 4, s1, 16]
%27 = getitem(f32[2, 2, s1, 16], (:, :, None, :, :)) : f32[2, 2, 1, s1, 16]
%28 = .expand(%27, 2, 2, 2, s1, 16) : f32[2, 2, 2, s1, 16]
%29 = .reshape(%28, 2, 4, s1, 16) : f32[2, 4, s1, 16]
%30 = scaled_dot_product_attention(f32[2, 4, s1, 16], %26, %29, attn_mask=%16, dropout_p=0.0, is_causal=False, scale=0.25) : f32[2, 4, s1, 16]""",
        )

    def test_after_with_padding_and_dynamic_length(self):
        self.assertExpectedInline(
            after("operator", padded=True, mark=True),
            """\
%0 = arange(2, device=cpu) : i64[2]
%1 = unsqueeze(%0, 1) : i64[2, 1]
%2 = .size(f32[2, 2, s0, 16], 2) : s0
%3 = arange(%2, device=cpu) : i64[s0]
%4 = aten._unsafe_index.Tensor(i64[2, s1], [%1, %3]) : i64[2, s0]
%5 = .to(%4, b8) : b8[2, s0]
%6 = .size(f32[2, 2, s0, 16], 2) : s0
%7 = .expand(%5, 2, %6) : b8[2, s0]
%8 = where(%7, 0.0, -inf) : f32[2, s0]
%9 = .to(%8, f32) : f32[2, s0]
%10 = getitem(%9, (:, None, None, :)) : f32[2, 1, 1, s0]
%11 = aten._scaled_dot_product_flash_attention_for_cpu.default(f32[2, 4, s0, 16], f32[2, 2, s0, 16], f32[2, 2, s0, 16], 0.0, True, attn_mask=%10, scale=0.25)
%12 = getitem(%11, 0) : f32[2, 4, s0, 16]
%13 = tmx.triangle_attention.default(f32[2, 4, s0, 16], f32[2, 2, s0, 16], f32[2, 2, s0, 16], %7, 4, 16, 8, 0.25)
%14 = getitem(%13, 0) : f32[2, 4, s0, 16]""",
        )


def test_two_configurations_give_two_graphs():
    texts = [
        after("operator"),
        after("operator", num_sink_tokens=5),
        after("operator", sliding_window_size=17),
        after("operator", num_last_tokens=9),
        after("operator", triangle_layer_indices=[0]),
        after("operator", triangle_layer_indices=[0, 1]),
        after("operator", triangle_layer_indices=[]),
        after("blocked"),
    ]
    assert len(set(texts)) == len(texts)
    assert after("operator") == texts[0]


def test_what_does_not_concern_the_graph_does_not_change_it():
    assert after("operator", min_seq_len=10) == after("operator", min_seq_len=20)
    # Too short a prompt: nothing is touched.
    assert after("operator", min_seq_len=N) == before(padded=False)


def test_a_render_has_no_addresses_names_or_paths():
    text = whole()
    assert not re.search(r"0x[0-9a-f]{4,}|\bobject at\b|<function|<built-in|l_args|L_args|/site-packages/", text)
    assert not re.search(r"FakeTensor|GraphModule", text)


def test_a_render_is_the_same_in_every_process():
    """Nothing of it hangs on hash seeds, on addresses or on what was traced before."""
    here = whole()
    code = "from tests.support.snapshots import whole; print(whole())"
    root = Path(__file__).parents[2]
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.rstrip("\n") == here
