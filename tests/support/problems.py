"""Problems for every lowering: the conformance cases, random ones, and the check against the oracle."""

import torch
from hypothesis import strategies as st

from tests.support.calls import Case, LoweringBackend, OneCall
from tests.support.oracle import oracle, tolerance
from tmx_compile.operator import ALL_ROWS

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

CASES = {
    "one token": Case(1, 1, 4, 32, 64),
    "two tokens": Case(2, 2, 1, 0, 0),
    "prime length": Case(331, 331, 4, 32, 16, heads=6, kv_heads=2),
    "no sinks": Case(200, 200, 0, 17, 5),
    "no last rows": Case(200, 200, 3, 17, 0),
    "own key only": Case(130, 130, 0, 0, 0),
    "sinks beyond the end": Case(70, 70, 500, 3, 2),
    "window beyond the end": Case(70, 70, 2, 500, 2),
    "last rows beyond the end": Case(70, 70, 2, 3, 500),
    "everything beyond the end": Case(2, 2, 9, 9, 9),
    "huge counts": Case(65, 65, 2**31 - 1, 2**31 - 1, 2**31 - 1),
    "window of many blocks": Case(700, 700, 8, 256, 32),
    "sinks across a block border": Case(300, 300, 70, 10, 8),
    "multi-query": Case(150, 150, 4, 20, 8, heads=5, kv_heads=1),
    "batch": Case(129, 129, 4, 20, 8, batch=3, heads=4, kv_heads=4),
    "head dim 8": Case(100, 100, 4, 20, 8, dim=8),
    "head dim 80": Case(100, 100, 4, 20, 8, dim=80),
    "odd head dim": Case(100, 100, 4, 20, 8, dim=33),
    "head dim 256": Case(100, 100, 4, 20, 8, dim=256),
    "value dim differs": Case(100, 100, 4, 20, 8, dim=24, v_dim=16),
    "bfloat16": Case(257, 257, 4, 32, 16, heads=6, kv_heads=2, dim=64, dtype=bf16),
    "float16": Case(257, 257, 4, 32, 16, heads=6, kv_heads=2, dim=64, dtype=f16),
    "more keys than rows": Case(90, 240, 4, 20, 8),
    "one row, many keys": Case(1, 240, 4, 20, 0),
    "strided": Case(200, 200, 4, 20, 8, heads=4, kv_heads=2, strided=True),
    "left padding": Case(200, 200, 4, 20, 8, batch=3, valid=((0, 200), (60, 200), (199, 200))),
    "right padding": Case(200, 200, 4, 20, 8, batch=3, valid=((0, 200), (0, 130), (0, 1))),
    "padding on both sides": Case(200, 200, 40, 20, 30, batch=2, valid=((67, 140), (3, 150))),
    "shorter than sinks and last": Case(200, 200, 40, 20, 30, batch=2, valid=((190, 200), (100, 105))),
    "no valid key": Case(100, 100, 4, 20, 8, batch=2, valid=((0, 100), (0, 0))),
    "holes": Case(200, 200, 10, 20, 8, batch=2, valid=((10, 190), (0, 200)), holes=True),
    "holes, own key only": Case(100, 100, 0, 0, 0, batch=1, valid=((5, 100),), holes=True),
    "padding and more keys than rows": Case(90, 240, 4, 20, 8, batch=2, valid=((0, 240), (150, 240))),
    "padding, bfloat16": Case(200, 200, 4, 20, 8, batch=2, valid=((0, 200), (60, 200)), dtype=bf16),
    "a window of the layer's own": Case(200, 200, 4, 20, 8, heads=4, kv_heads=2, reach=50),
    "a reach of two blocks, no last rows": Case(300, 300, 70, 20, 0, reach=128),
    "a reach inside the last rows": Case(200, 200, 4, 20, 100, reach=30),
    "padding and a reach": Case(200, 200, 10, 20, 30, batch=2, valid=((0, 200), (60, 190)), holes=True, reach=70),
    "more keys than rows and a reach": Case(90, 240, 40, 20, 8, reach=110),
    "right padding, window beyond the end": Case(120, 120, 4, 500, 8, batch=2, valid=((0, 120), (0, 70))),
    "right padding, last rows beyond the end": Case(90, 90, 2, 3, 500, batch=3, valid=((0, 90), (5, 60), (0, 1))),
    "right padding, all rows are last rows": Case(90, 90, 0, 0, 2**31 - 1, batch=2, valid=((0, 90), (5, 60))),
    "rows behind the keys": Case(40, 130, 4, 50, 8, batch=3, valid=((0, 130), (7, 80), (0, 95)), holes=True),
    "padding, multi-query": Case(150, 150, 4, 20, 8, batch=2, heads=4, valid=((20, 150), (0, 90))),
}


def check(case, compiled, tol=None, dynamic=False):
    *qkv, key_mask = case.tensors()
    sinks = case.sink_logits()
    if dynamic:
        for x, dim in ((qkv[0], 2), (qkv[1], 2), (qkv[2], 2), (key_mask, 1)):
            if x is not None:
                torch._dynamo.mark_dynamic(x, dim)
    with torch.no_grad():
        out = compiled(*qkv, key_mask, *(() if sinks is None else (sinks,)))
    want, _ = oracle(*qkv, key_mask, *case.arguments, sink_logits=sinks, softcap=case.softcap)
    assert out.shape == want.shape
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.double(), want, atol=tol or tolerance(case.dtype), rtol=0)


def check_static(case, lowering, inductor):
    """The case through one lowering, with constant lengths."""
    backend = LoweringBackend(lowering, inductor)
    check(case, torch.compile(OneCall(*case.one_call), backend=backend, dynamic=False))


# Learned sinks and a softcap. A cap of 1.5 bends most scores.
SCORES = {
    "sinks": Case(131, 131, 4, 20, 16, heads=6, kv_heads=2, sinks=True),
    "sinks, no last rows, bfloat16": Case(130, 130, 4, 20, 0, batch=2, heads=4, dim=64, dtype=bf16, sinks=True),
    "sinks, left padding": Case(150, 150, 4, 20, 8, batch=3, valid=((0, 150), (60, 150), (149, 150)), sinks=True),
    "sinks, holes and a reach": Case(
        120, 120, 10, 20, 30, batch=2, valid=((0, 120), (60, 110)), holes=True, reach=70, sinks=True
    ),
    "sinks, no valid key": Case(70, 70, 4, 20, 8, batch=2, valid=((0, 70), (0, 0)), sinks=True),
    "sinks, more keys than rows": Case(60, 140, 4, 20, 8, dim=24, v_dim=16, sinks=True),
    "sinks, all rows are last rows": Case(90, 90, 0, 0, 2**31 - 1, batch=2, valid=((0, 90), (5, 60)), sinks=True),
    "softcap": Case(131, 131, 4, 20, 16, heads=6, kv_heads=2, softcap=1.5),
    "softcap of Gemma 2, bfloat16": Case(130, 130, 4, 20, 8, batch=2, heads=4, dim=64, dtype=bf16, softcap=50.0),
    "softcap, padding on both sides": Case(
        150, 150, 40, 20, 30, batch=2, valid=((67, 140), (3, 120)), holes=True, softcap=1.5
    ),
    "softcap, a window of the layer's own": Case(140, 140, 4, 20, 8, heads=4, kv_heads=2, reach=50, softcap=1.5),
    "both": Case(131, 131, 4, 20, 16, batch=2, heads=4, valid=((0, 131), (40, 131)), sinks=True, softcap=1.5),
    "both, one row": Case(1, 140, 4, 20, 0, heads=4, kv_heads=2, sinks=True, softcap=1.5),
}

LENGTHS, NEVER = st.integers(1, 260), st.just(False)
COUNTS = st.one_of(st.integers(0, 40), st.sampled_from([64, 100, 129, 1000]))
SHORT = {
    "lengths": st.sampled_from([1, 2, 3, 31, 64, 97]),
    "counts": st.sampled_from([0, 1, 2, 5, 16, 40, 1000, ALL_ROWS]),
    "documents": st.integers(0, 3).map(lambda n: n == 0),
    "scores": st.booleans(),
}


@st.composite
def cases(draw, lengths=LENGTHS, counts=COUNTS, documents=NEVER, scores=NEVER):
    """A random problem in float64; ``SHORT`` has the arguments for an operator that takes every one of them."""
    kv_len = draw(lengths)
    q_len = draw(st.integers(1, kv_len)) if draw(st.booleans()) else kv_len
    batch = draw(st.integers(1, 3))
    valid = None
    if draw(st.booleans()):
        ends = [sorted((draw(st.integers(0, kv_len)), draw(st.integers(0, kv_len)))) for _ in range(batch)]
        valid = tuple(map(tuple, ends))
    kv_heads = draw(st.integers(1, 2))
    return Case(
        q_len,
        kv_len,
        draw(counts),
        draw(counts),
        draw(counts),
        batch=batch,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        dim=draw(st.sampled_from([1, 4, 8])),
        v_dim=draw(st.sampled_from([None, 3])),
        dtype=f64,
        valid=valid,
        holes=draw(st.booleans()),
        strided=draw(st.booleans()),
        reach=draw(st.one_of(st.none(), st.integers(0, 60), st.just(1000))),
        documents=draw(documents),
        sinks=draw(scores),
        softcap=1.5 if draw(scores) else None,
    )
