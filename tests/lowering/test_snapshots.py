# ruff: noqa: E501
"""What each lowering makes of a triangle layer of a real model, as snapshots.

``EXPECTTEST_ACCEPT=1 pytest tests/lowering/test_snapshots.py`` rewrites them after a change that is meant.
"""

import re

from expecttest import TestCase

from tests.support.snapshots import after_graph, layer_1


class Snapshots(TestCase):
    maxDiff = None

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
%25 = getitem(%20, (:, None, :, None)) : b8[1, 1, 70, 1]
%26 = getitem(%24, (:, None)) : b8[1, 1, 70, 70]
%27 = .reshape(f32[2, 4, 70, 16], 2, 2, 2, 70, 16) : f32[2, 2, 2, 70, 16]
%28 = .to(%27, f32) : f32[2, 2, 2, 70, 16]
%29 = .to(f32[2, 2, 70, 16], f32) : f32[2, 2, 70, 16]
%30 = einsum(bgrqd,bgkd->bgrqk, %28, %29) : f32[2, 2, 2, 70, 70]
%31 = mul(%30, 0.25) : f32[2, 2, 2, 70, 70]
%32 = getitem(%26, (:, :, None)) : b8[1, 1, 1, 70, 70]
%33 = invert(%32) : b8[1, 1, 1, 70, 70]
%34 = .masked_fill(%31, %33, -inf) : f32[2, 2, 2, 70, 70]
%35 = softmax(%34, -1) : f32[2, 2, 2, 70, 70]
%36 = .to(f32[2, 2, 70, 16], f32) : f32[2, 2, 70, 16]
%37 = einsum(bgrqk,bgkd->bgrqd, %35, %36) : f32[2, 2, 2, 70, 16]
%38 = .reshape(%37, 2, 4, 70, 16) : f32[2, 4, 70, 16]
%39 = .to(%38, f32) : f32[2, 4, 70, 16]
%40 = where(%25, %39, 0.0) : f32[2, 4, 70, 16]
%41 = .permute(%40, (0, 2, 1, 3)) : f32[2, 70, 4, 16]
%42 = .contiguous(%41) : f32[2, 70, 4, 16]
%43 = .permute(%42, (0, 2, 1, 3)) : f32[2, 4, 70, 16]""",
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
