"""The model of a split prompt: it finds the constants that records were made with, and predicts by them."""

import pytest

from studies import context_bytes
from studies.context_scale import RANKS, TOKENS, Constants, by_cards, fitted, of_record, predicted

MADE = Constants(2.0, 3e-3, 5e-8, 0.03, 3e8, 8)
LAYER, GEOMETRY = context_bytes.Layer(), (8, 512, 128)


def content():
    one = [{"variant": "one", "n": n, "ms": 2.0 + 3e-3 * n + 5e-8 * n * n} for n in (8192, 32768, 131072, 262144)]
    sent = [{"variant": "all-to-all", "bytes": n, "ms": 0.03 + n / 2 / 3e8} for n in (2**12, 2**20, 2**24, 2**28)]
    return {"settings": {"layers": 8}, "records": [*one, *sent, {"variant": "one", "error": "none"}]}


def test_fits_what_was_made():
    found = fitted(content())
    for name in ("fixed", "linear", "square", "latency", "rate", "layers"):
        assert getattr(found, name) == pytest.approx(getattr(MADE, name), rel=1e-3), name


def test_two_cards():
    """By hand: half the work, two all-to-alls in a layer of each kind."""
    n = 131072
    found = predicted(MADE, n, 2, GEOMETRY, LAYER)
    dense = (n // 2) * (2 * 4096 + 2 * 1024) * 2 / 2
    triangle = 128 * 8192 + 512 * 4096 + 128 * (8192 + 128)
    collectives = 4 * (4 * 0.03 + (dense + triangle) / 3e8)
    assert found["dense_bytes"] == dense
    assert found["collectives_ms"] == pytest.approx(collectives)
    assert found["ms"] == pytest.approx(2.0 + 3e-3 * n / 2 + 5e-8 * n * n / 2 + collectives)
    assert predicted(MADE, n, 1, GEOMETRY, LAYER)["ms"] == pytest.approx(2.0 + 3e-3 * n + 5e-8 * n * n)


def test_more_cards_than_heads_share_no_more():
    """Of 64 cards 32 have a head: the square part is split by no more."""
    work = [predicted(MADE, 2**20, ranks, GEOMETRY, LAYER) for ranks in (32, 64)]
    squares = [
        each["ms"] - each["collectives_ms"] - 2.0 - 3e-3 * 2**20 / n for each, n in zip(work, (32, 64), strict=True)
    ]
    assert squares[0] == pytest.approx(squares[1])


def test_by_cards_and_records():
    found = {**content(), "settings": {"layers": 8, "geometry": GEOMETRY, "heads": 32, "kv_heads": 8, "hidden": 4096}}
    told = by_cards(found, 32)
    assert list(told) == list(TOKENS)
    assert {tuple(each) for each in told.values()} == {RANKS}
    record = of_record(found, {"n": 131072, "ranks": 2})
    assert record["ms"] == pytest.approx(predicted(MADE, 131072, 2, GEOMETRY, LAYER)["ms"], rel=1e-3)
    assert record["share"] == pytest.approx(record["collectives_ms"] / record["ms"])
    # Four times the layers.
    assert told[131072][2]["ms"] == pytest.approx(4 * record["ms"])
