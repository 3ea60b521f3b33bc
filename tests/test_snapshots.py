# ruff: noqa: E501
"""What the pass does to a real model's graph, as snapshots: before, after, and after each lowering.

``EXPECTTEST_ACCEPT=1 pytest tests/test_snapshots.py`` rewrites them after a change that is meant.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from expecttest import TestCase
from support import tiny_qwen3

from tmx_compile import TriangleMixConfig
from tmx_compile.graph.nodes import INSERTED
from tmx_compile.testing import attention_nodes, captured_graphs, render_graph, rewritten_graphs

N = 70
CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1], num_sink_tokens=4, sliding_window_size=16, num_last_tokens=8, min_seq_len=10
)


def inputs(padded, mark=False):
    ids = torch.zeros(2, N, dtype=torch.long)
    if not padded:
        return (ids,), {"use_cache": False}
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    if mark:
        torch._dynamo.mark_dynamic(ids, 1)
        torch._dynamo.mark_dynamic(mask, 1)
    return (ids,), {"attention_mask": mask}


def before(padded, mark=False):
    args, kwargs = inputs(padded, mark)
    torch._dynamo.reset()
    with torch.no_grad():
        (gm,) = captured_graphs(tiny_qwen3(2), *args, dynamic=None if mark else False, **kwargs)
    return render_graph(gm, only=attention_nodes(gm))


def after_graph(lowering, padded=False, mark=False, **changes):
    args, kwargs = inputs(padded, mark)
    torch._dynamo.reset()
    config, dynamic = CONFIG.replace(**changes), None if mark else False
    with torch.no_grad():
        (gm,) = rewritten_graphs(tiny_qwen3(2), *args, config=config, lowering=lowering, dynamic=dynamic, **kwargs)
    return gm


def after(lowering, padded=False, mark=False, **changes):
    gm = after_graph(lowering, padded, mark, **changes)
    return render_graph(gm, only=attention_nodes(gm))


def layer_1(gm):
    """The nodes that the triangle layer added."""

    def is_layer_1(node):
        return "layers.1." in str(node.meta.get("nn_module_stack"))

    shown = [node for node in gm.graph.nodes if node.meta.get(INSERTED) and is_layer_1(node)]
    return render_graph(gm, only=shown)


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

    def test_blocked(self):
        """Without last rows, which the snapshot of flex shows."""
        self.assertExpectedInline(
            layer_1(after_graph("blocked", num_last_tokens=0)),
            """\
%0 = arange(3, device=cpu, dtype=i64) : i64[3]
%1 = getitem(%0, (:, None, None)) : i64[3, 1, 1]
%2 = mul(%1, 32) : i64[3, 1, 1]
%3 = add(%2, 0) : i64[3, 1, 1]
%4 = arange(32, device=cpu, dtype=i64) : i64[32]
%5 = getitem(%4, (None, :, None)) : i64[1, 32, 1]
%6 = add(%3, %5) : i64[3, 32, 1]
%7 = arange(64, device=cpu, dtype=i64) : i64[64]
%8 = sub(%7, 32) : i64[64]
%9 = getitem(%8, (None, None, :)) : i64[1, 1, 64]
%10 = add(%3, %9) : i64[3, 1, 64]
%11 = le(%10, %6) : b8[3, 32, 64]
%12 = sub(%6, %10) : i64[3, 32, 64]
%13 = le(%12, 16) : b8[3, 32, 64]
%14 = and_(%11, %13) : b8[3, 32, 64]
%15 = ge(%10, 0) : b8[3, 1, 64]
%16 = and_(%14, %15) : b8[3, 32, 64]
%17 = arange(4, device=cpu, dtype=i64) : i64[4]
%18 = getitem(%17, (None, None, :)) : i64[1, 1, 4]
%19 = le(%18, %6) : b8[3, 32, 4]
%20 = sub(%6, %18) : i64[3, 32, 4]
%21 = gt(%20, 16) : b8[3, 32, 4]
%22 = and_(%19, %21) : b8[3, 32, 4]
%23 = arange(4, device=cpu, dtype=i64) : i64[4]
%24 = .clamp(%23, max=69) : i64[4]
%25 = .index_select(f32[2, 2, 70, 16], 2, %24) : f32[2, 2, 4, 16]
%26 = getitem(%25, (:, None)) : f32[2, 1, 2, 4, 16]
%27 = .expand(%26, -1, 3, -1, -1, -1) : f32[2, 3, 2, 4, 16]
%28 = arange(4, device=cpu, dtype=i64) : i64[4]
%29 = .clamp(%28, max=69) : i64[4]
%30 = .index_select(f32[2, 2, 70, 16], 2, %29) : f32[2, 2, 4, 16]
%31 = getitem(%30, (:, None)) : f32[2, 1, 2, 4, 16]
%32 = .expand(%31, -1, 3, -1, -1, -1) : f32[2, 3, 2, 4, 16]
%33 = cat([%22, %16], 2) : b8[3, 32, 68]
%34 = getitem(%33, None) : b8[1, 3, 32, 68]
%35 = pad(f32[2, 2, 70, 16], (0, 0, 32, 26), mode=constant, value=0.0) : f32[2, 2, 128, 16]
%36 = getitem(%35, (:, :, 0:)) : f32[2, 2, 128, 16]
%37 = .reshape(%36, 2, 2, 4, 32, 16) : f32[2, 2, 4, 32, 16]
%38 = .transpose(%37, 1, 2) : f32[2, 4, 2, 32, 16]
%39 = getitem(%38, (:, 0:3)) : f32[2, 3, 2, 32, 16]
%40 = getitem(%38, (:, 1:4)) : f32[2, 3, 2, 32, 16]
%41 = cat([%39, %40], 3) : f32[2, 3, 2, 64, 16]
%42 = cat([%27, %41], 3) : f32[2, 3, 2, 68, 16]
%43 = .flatten(%42, 0, 1) : f32[6, 2, 68, 16]
%44 = pad(f32[2, 2, 70, 16], (0, 0, 32, 26), mode=constant, value=0.0) : f32[2, 2, 128, 16]
%45 = getitem(%44, (:, :, 0:)) : f32[2, 2, 128, 16]
%46 = .reshape(%45, 2, 2, 4, 32, 16) : f32[2, 2, 4, 32, 16]
%47 = .transpose(%46, 1, 2) : f32[2, 4, 2, 32, 16]
%48 = getitem(%47, (:, 0:3)) : f32[2, 3, 2, 32, 16]
%49 = getitem(%47, (:, 1:4)) : f32[2, 3, 2, 32, 16]
%50 = cat([%48, %49], 3) : f32[2, 3, 2, 64, 16]
%51 = cat([%32, %50], 3) : f32[2, 3, 2, 68, 16]
%52 = .flatten(%51, 0, 1) : f32[6, 2, 68, 16]
%53 = pad(f32[2, 4, 70, 16], (0, 0, 0, 26), mode=constant, value=None) : f32[2, 4, 96, 16]
%54 = .reshape(%53, 2, 4, 3, 32, 16) : f32[2, 4, 3, 32, 16]
%55 = .transpose(%54, 1, 2) : f32[2, 3, 4, 32, 16]
%56 = .flatten(%55, 0, 1) : f32[6, 4, 32, 16]
%57 = .expand(%34, 2, -1, -1, -1) : b8[2, 3, 32, 68]
%58 = .flatten(%57, 0, 1) : b8[6, 32, 68]
%59 = getitem(%58, (:, None)) : b8[6, 1, 32, 68]
%60 = scaled_dot_product_attention(%56, %43, %52, attn_mask=%59, enable_gqa=True, scale=0.25) : f32[6, 4, 32, 16]
%61 = .reshape(%60, 2, 3, 4, 32, 16) : f32[2, 3, 4, 32, 16]
%62 = .transpose(%61, 1, 2) : f32[2, 4, 3, 32, 16]
%63 = .reshape(%62, 2, 4, 96, 16) : f32[2, 4, 96, 16]
%64 = getitem(%63, (:, :, :70)) : f32[2, 4, 70, 16]
%65 = .permute(%64, (0, 2, 1, 3)) : f32[2, 70, 4, 16]
%66 = .contiguous(%65) : f32[2, 70, 4, 16]
%67 = .permute(%66, (0, 2, 1, 3)) : f32[2, 4, 70, 16]""",
        )

    def test_reference(self):
        self.assertExpectedInline(
            layer_1(after_graph("reference")),
            """\
%0 = arange(70, device=cpu, dtype=i64) : i64[70]
%1 = add(%0, 0) : i64[70]
%2 = getitem(%1, (None, :, None)) : i64[1, 70, 1]
%3 = arange(70, device=cpu, dtype=i64) : i64[70]
%4 = getitem(%3, (None, None, :)) : i64[1, 1, 70]
%5 = lt(%4, 4) : b8[1, 1, 70]
%6 = sub(%2, %4) : i64[1, 70, 70]
%7 = le(%6, 16) : b8[1, 70, 70]
%8 = or_(%5, %7) : b8[1, 70, 70]
%9 = ge(%2, 62) : b8[1, 70, 1]
%10 = lt(%2, 70) : b8[1, 70, 1]
%11 = and_(%9, %10) : b8[1, 70, 1]
%12 = or_(%8, %11) : b8[1, 70, 70]
%13 = le(%4, %2) : b8[1, 70, 70]
%14 = and_(%12, %13) : b8[1, 70, 70]
%15 = ge(%4, 0) : b8[1, 1, 70]
%16 = and_(%14, %15) : b8[1, 70, 70]
%17 = lt(%4, 70) : b8[1, 1, 70]
%18 = and_(%16, %17) : b8[1, 70, 70]
%19 = eq(%4, %2) : b8[1, 70, 70]
%20 = .any(%18, -1) : b8[1, 70]
%21 = getitem(%20, (..., None)) : b8[1, 70, 1]
%22 = invert(%21) : b8[1, 70, 1]
%23 = and_(%19, %22) : b8[1, 70, 70]
%24 = or_(%18, %23) : b8[1, 70, 70]
%25 = .reshape(f32[2, 4, 70, 16], 2, 2, 2, 70, 16) : f32[2, 2, 2, 70, 16]
%26 = .to(%25, f32) : f32[2, 2, 2, 70, 16]
%27 = .to(f32[2, 2, 70, 16], f32) : f32[2, 2, 70, 16]
%28 = einsum(bgrqd,bgkd->bgrqk, %26, %27) : f32[2, 2, 2, 70, 70]
%29 = mul(%28, 0.25) : f32[2, 2, 2, 70, 70]
%30 = getitem(%24, (:, None, None)) : b8[1, 1, 1, 70, 70]
%31 = invert(%30) : b8[1, 1, 1, 70, 70]
%32 = .masked_fill(%29, %31, -inf) : f32[2, 2, 2, 70, 70]
%33 = softmax(%32, -1) : f32[2, 2, 2, 70, 70]
%34 = .to(f32[2, 2, 70, 16], f32) : f32[2, 2, 70, 16]
%35 = einsum(bgrqk,bgkd->bgrqd, %33, %34) : f32[2, 2, 2, 70, 16]
%36 = .reshape(%35, 2, 4, 70, 16) : f32[2, 4, 70, 16]
%37 = getitem(%20, (:, None, :, None)) : b8[1, 1, 70, 1]
%38 = where(%37, %36, 0.0) : f32[2, 4, 70, 16]
%39 = .to(%38, f32) : f32[2, 4, 70, 16]
%40 = .permute(%39, (0, 2, 1, 3)) : f32[2, 70, 4, 16]
%41 = .contiguous(%40) : f32[2, 70, 4, 16]
%42 = .permute(%41, (0, 2, 1, 3)) : f32[2, 4, 70, 16]""",
        )

    def test_flex(self):
        # How many entries of a block mask stay empty depends on the version of torch.
        text = re.sub(r"(None, ){2,}", "None..., ", layer_1(after_graph("flex")))
        self.assertExpectedInline(
            text,
            """\
%0 = .contiguous(f32[2, 4, 70, 16]) : f32[2, 4, 70, 16]
%1 = .contiguous(f32[2, 2, 70, 16]) : f32[2, 2, 70, 16]
%2 = .contiguous(f32[2, 2, 70, 16]) : f32[2, 2, 70, 16]
%3 = arange(3, device=cpu, dtype=i64) : i64[3]
%4 = getitem(%3, (None, :, None)) : i64[1, 3, 1]
%5 = mul(%4, 64) : i64[1, 3, 1]
%6 = add(%5, 0) : i64[1, 3, 1]
%7 = add(%6, 63) : i64[1, 3, 1]
%8 = clamp(%7, max=69) : i64[1, 3, 1]
%9 = sub(%6, 16) : i64[1, 3, 1]
%10 = .clamp(%9, min=0) : i64[1, 3, 1]
%11 = rshift(%10, 6) : i64[1, 3, 1]
%12 = rshift(%8, 6) : i64[1, 3, 1]
%13 = mul(%11, 0) : i64[1, 3, 1]
%14 = add(%13, 0) : i64[1, 3, 1]
%15 = minimum(%11, %14) : i64[1, 3, 1]
%16 = mul(%11, 0) : i64[1, 3, 1]
%17 = add(%16, 1) : i64[1, 3, 1]
%18 = minimum(%11, %17) : i64[1, 3, 1]
%19 = sub(%18, %15) : i64[1, 3, 1]
%20 = .clamp(%19, min=0) : i64[1, 3, 1]
%21 = arange(5, device=cpu, dtype=i64) : i64[5]
%22 = getitem(%21, (None..., :)) : i64[1, 1, 5]
%23 = lt(%22, %20) : b8[1, 3, 5]
%24 = add(%15, %22) : i64[1, 3, 5]
%25 = add(%11, %22) : i64[1, 3, 5]
%26 = sub(%25, %20) : i64[1, 3, 5]
%27 = where(%23, %24, %26) : i64[1, 3, 5]
%28 = minimum(%27, %12) : i64[1, 3, 5]
%29 = .to(%28, i32) : i32[1, 3, 5]
%30 = add(%20, %12) : i64[1, 3, 1]
%31 = sub(%30, %11) : i64[1, 3, 1]
%32 = add(%31, 1) : i64[1, 3, 1]
%33 = .clamp(%32, min=0) : i64[1, 3, 1]
%34 = .to(%33, i32) : i32[1, 3, 1]
%35 = getitem(%34, (:, None, :, 0)) : i32[1, 1, 3]
%36 = .reshape(%29, 1, 15) : i32[1, 15]
%37 = pad(%36, (0, 4), mode=constant, value=None) : i32[1, 19]
%38 = as_strided(%37, (1, 1, 3, 4), (19, 19, 5, 1)) : i32[1, 1, 3, 4]
%39 = get_attr
    %0 = placeholder
    %1 = placeholder
    %2 = placeholder
    %3 = placeholder
    %4 = placeholder
    return %0
%40 = get_attr
    %0 = placeholder
    %1 = placeholder
    %2 = placeholder
    %3 = placeholder
    %4 = add(%2, 0)
    %5 = le(%3, %4)
    %6 = lt(%3, 4)
    %7 = sub(%4, %3)
    %8 = le(%7, 16)
    %9 = or_(%6, %8)
    %10 = and_(%5, %9)
    return %10
%41 = flex_attention(%0, %1, %2, %39, (70, 70, %35, %38, None..., 64, 64, %40), 0.25, {BLOCKS_ARE_CONTIGUOUS: False, OUTPUT_LOGSUMEXP: False, OUTPUT_MAX: False, PRESCALE_QK: False, ROWS_GUARANTEED_SAFE: False, WRITE_DQ: True}, (), ())
%42 = getitem(%41, 0) : f32[2, 4, 70, 16]
%43 = arange(70, device=cpu, dtype=i64) : i64[70]
%44 = arange(8, device=cpu, dtype=i64) : i64[8]
%45 = add(%44, 62) : i64[8]
%46 = .clamp(%45, min=0) : i64[8]
%47 = getitem(f32[2, 4, 70, 16], (:, :, 62:)) : f32[2, 4, 8, 16]
%48 = add(%46, 0) : i64[8]
%49 = getitem(%48, (:, None)) : i64[8, 1]
%50 = getitem(%43, (None, :)) : i64[1, 70]
%51 = le(%50, %49) : b8[8, 70]
%52 = getitem(%43, (None, :)) : i64[1, 70]
%53 = scaled_dot_product_attention(%47, f32[2, 2, 70, 16], f32[2, 2, 70, 16], attn_mask=%51, enable_gqa=True, scale=0.25) : f32[2, 4, 8, 16]
%54 = getitem(%42, (:, :, :62)) : f32[2, 4, 62, 16]
%55 = .permute(%54, (0, 2, 1, 3)) : f32[2, 62, 4, 16]
%56 = .permute(%53, (0, 2, 1, 3)) : f32[2, 8, 4, 16]
%57 = cat([%55, %56], 1) : f32[2, 70, 4, 16]
%58 = .permute(%57, (0, 2, 1, 3)) : f32[2, 4, 70, 16]""",
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


def whole():
    """Whole graphs, not only their attention: whatever a graph may hold."""
    graphs = [
        after_graph("flex", padded=True),
        after_graph("blocked", padded=True, mark=True),
        after_graph("operator", padded=True, mark=True),
        after_graph("reference"),
    ]
    return "\n\n".join(map(render_graph, graphs))


def test_a_render_has_no_addresses_names_or_paths():
    text = whole()
    assert not re.search(r"0x[0-9a-f]{4,}|\bobject at\b|<function|<built-in|l_args|L_args|/site-packages/", text)
    assert not re.search(r"FakeTensor|GraphModule", text)


def test_a_render_is_the_same_in_every_process():
    """Nothing of it hangs on hash seeds, on addresses or on what was traced before."""
    here = whole()
    code = "import sys; sys.path.insert(0, 'tests'); import test_snapshots; print(test_snapshots.whole())"
    root = Path(__file__).parent.parent
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.rstrip("\n") == here
