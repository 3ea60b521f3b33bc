"""What the stored soak says: no graph more than under Inductor alone, memory flat, every answer the oracle's."""

import json

import pytest

from benchmarks.common import RESULTS
from studies.soak import CASE, COLUMNS, FULL, LIMITS, PARTS

RESULT = json.loads((RESULTS / CASE.file_name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("part", PARTS)
def test_the_stored_soak(part, limit):
    assert not RESULT["quick"]
    assert all(record.keys() == set(COLUMNS) for record in RESULT["records"])
    alone, ours = (
        [r for r in RESULT["records"] if (r["part"], r["recompile_limit"], r["compiler"]) == (part, limit, compiler)]
        for compiler in ("inductor", "tmx")
    )
    plan = FULL[part]
    blocks = list(range(plan["block"], plan["prompts"] + 1, plan["block"]))
    assert [r["prompts"] for r in alone] == [r["prompts"] for r in ours] == blocks
    assert ours[-1]["graphs"] <= alone[-1]["graphs"]
    assert ours[-1]["limit_reached"] == alone[-1]["limit_reached"] == (limit == LIMITS[0])
    assert {(r["uncompiled_dense"], r["other_tokens"]) for r in ours} == {(0, 0)}
    assert ours[-1]["largest_difference"] < 1e-3
    assert (ours[-1]["uncompiled_sparse"] > 0) == (limit == LIMITS[0])
    later = ours[len(ours) // 2 :]
    assert len({(r["graphs"], r["tensors"]) for r in later}) == 1
    sizes = [r["resident_mib"] for r in later]
    assert max(sizes) < 1.05 * min(sizes)
