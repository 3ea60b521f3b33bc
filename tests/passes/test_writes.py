"""A small draw of the programs with writes: the compiled one equals the eager one, or the site stays dense."""

import logging

import pytest

from tests.support.writes import judge as judging
from tests.support.writes.generator import draw
from tests.support.writes.judge import FAILURES, judge
from tests.support.writes.run import way_of

BATCHES, CASES = 8, 10


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL)


def judged(seed):
    return judge(seed, **way_of(seed, 0.0, 0.1))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_writes(batch, record_property):
    outcomes = [judged(f"suite {batch}:{number}") for number in range(CASES)]
    record_property("programs with writes", ", ".join(f"{o.kind}" for o in outcomes))
    failed = [f"{o.seed} {o.way} {o.kind}: {o.message}\n{o.program.source}" for o in outcomes if o.kind in FAILURES]
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("number", range(4))
def test_writes_through_inductor(number):
    outcome = judge(f"inductor:{number}", inductor=True)
    assert outcome.kind not in FAILURES, f"{outcome.message}\n{outcome.program.source}"


def test_a_draw_is_not_mostly_dense():
    outcomes = [judged(f"share:{number}") for number in range(20)]
    assert sum(any(decision == "triangle" for decision, _ in o.decisions) for o in outcomes) >= 6


def test_a_seed_is_one_program():
    once, again = ([draw(f"same:{number}") for number in range(20)] for _ in range(2))
    assert once == again


def test_a_lost_write_is_seen(monkeypatch):
    """The comparison is no mirror: a backend that forgets the assignments to slices gives other numbers or state."""

    def forgetful(config, **options):
        def backend(gm, inputs):
            for node in list(gm.graph.nodes):
                if getattr(node.target, "__name__", "") == "setitem" and not node.users:
                    gm.graph.erase_node(node)
            gm.recompile()
            return gm.forward

        return backend

    monkeypatch.setattr(judging, "tmx_backend", forgetful)
    assert any(judge(f"lost:{number}").kind in ("wrong", "state") for number in range(40))


def test_the_oracle_of_a_real_window_is_sparse(monkeypatch):
    """A backend that leaves everything dense, and says it did not, is caught by the mask written out."""
    from tmx_compile.report import SiteRecord

    def pretending(config, *, report, **options):
        def backend(gm, inputs):
            for layer in config.layers():
                report.sites.append(SiteRecord(0, "", layer, (), (), (), "", False, "triangle", "", "", "", 0, 0))
            return gm.forward

        return backend

    monkeypatch.setattr(judging, "tmx_backend", pretending)
    outcomes = [judge(f"window:{number}") for number in range(16)]
    real = [outcome for outcome in outcomes if outcome.program.geometry is not None and not outcome.program.outside]
    assert real
    assert "wrong" in {outcome.kind for outcome in real}
    assert {outcome.kind for outcome in outcomes if outcome.program.geometry is None} <= {"equal", "reference"}
