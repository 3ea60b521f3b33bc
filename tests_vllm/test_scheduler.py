"""What the scheduler does to a prompt: prefix-cache hits, preemption, drafts to verify."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests_vllm.support import SETTINGS, SHOWS, TOLERANCE, Engine, Oracle, check, gap, prompts

LAST = SETTINGS["num_last_tokens"]


@pytest.fixture
def empty(engine: Engine) -> Engine:
    """The engine, with nothing in its prefix cache."""
    assert engine.llm.reset_prefix_cache()
    return engine


def ask(engine: Engine, name: str):
    (answer,), (cached,) = engine.ask([prompts()[name]])
    return answer, cached


def test_a_hit_never_covers_last_rows(empty: Engine, oracle: Oracle) -> None:
    hits = []
    # "cut" ends where rows of "long" streamed: its last rows are computed anew.
    for name in ("long", "long", "fork", "cut"):
        answer, cached = ask(empty, name)
        check(oracle, name, answer)
        assert cached <= len(prompts()[name]) - LAST
        hits.append(cached)
    assert hits == [0, 256, 192, 160]


def test_without_the_cap_the_last_rows_are_wrong(
    empty: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: this is what the cap is for, and the prompts do show it."""
    rule = empty.core.scheduler.kv_cache_manager.trianglemix_rule
    monkeypatch.setattr(rule, "longest_hit", lambda request: 2**62)
    ask(empty, "long")
    answer, cached = ask(empty, "cut")
    assert cached == 192
    assert gap(answer, oracle.answer(prompts()["cut"])) > SHOWS / 10
    empty.llm.reset_prefix_cache()


def test_short_and_long_prompts_do_not_share(empty: Engine, oracle: Oracle) -> None:
    ask(empty, "long")
    answer, cached = ask(empty, "beginning")
    assert cached == 0
    check(oracle, "beginning", answer)
    # Among themselves short prompts do, up to their last token.
    answer, cached = ask(empty, "beginning")
    assert cached == 32
    check(oracle, "beginning", answer)


def test_without_the_salt_a_short_prompt_takes_streamed_rows(
    empty: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the salt."""
    hasher = empty.core.request_block_hasher
    monkeypatch.setattr(hasher.trianglemix_rule, "salt", "")
    ask(empty, "long")
    answer, cached = ask(empty, "beginning")
    assert cached == 32
    # The keys of layer 2 and 3 of rows 21 to 31 come from rows that did not see the keys between sinks and window.
    assert gap(answer, oracle.answer(prompts()["beginning"])) > SHOWS / 10
    empty.llm.reset_prefix_cache()


def test_a_salt_of_the_users_still_keeps_requests_apart(empty: Engine) -> None:
    ask(empty, "middle")
    request = {"prompt_token_ids": prompts()["middle"], "cache_salt": "mine"}
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    (result,) = empty.llm.generate([request], parameters, use_tqdm=False)
    assert result.num_cached_tokens == 0
    (result,) = empty.llm.generate([request], parameters, use_tqdm=False)
    assert result.num_cached_tokens == 128


def preemptions(engine: Engine) -> int:
    return next(each.value for each in engine.llm.get_metrics() if each.name == "vllm:num_preemptions")


@pytest.mark.parametrize("cached", [True, False], ids=["found in the cache again", "computed again"])
def test_preempted_requests_get_the_same_answers(engine: Engine, oracle: Oracle, cached: bool) -> None:
    """Two prompts, and fewer blocks than these and what they generate need."""
    asked, new_tokens = [prompts()["fork"][:190], prompts()["middle"]], 40
    before = preemptions(engine)
    with engine.blocks(13):
        answers, _ = engine.ask(asked, new_tokens=new_tokens, skip_reading_prefix_cache=not cached)
    assert preemptions(engine) > before
    for tokens, answer in zip(asked, answers, strict=True):
        want = oracle.answer(tokens, new_tokens=new_tokens)
        assert answer.tokens == want.tokens
        assert gap(answer, want) < TOLERANCE
        assert gap(answer, oracle.answer(tokens, (), new_tokens)) > SHOWS / 10


@pytest.fixture(scope="module")
def guessing(model: str) -> Iterator[Engine]:
    """Drafts by n-grams, verified several rows at a time.

    The last engine of this process, and no file behind this one makes another: with numba, which this one imports, vLLM
    0.32 starts no further engine (its look for kernels in all modules fails on a module of llvmlite).
    """
    made = Engine(
        model,
        # Of one token too: in random text no two follow each other twice.
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 2,
        },
        async_scheduling=False,
    )
    yield made
    made.close()


def test_drafts_are_verified_by_rows_that_see_every_key(guessing: Engine, oracle: Oracle) -> None:
    names, new_tokens = ["long", "middle", "short"], 24
    answers, _ = guessing.ask([prompts()[name] for name in names], new_tokens=new_tokens)
    for name, answer in zip(names, answers, strict=True):
        want = oracle.answer(prompts()[name], new_tokens=new_tokens)
        assert answer.tokens == want.tokens
        assert gap(answer, want) < TOLERANCE
    drafts = sum(each.value for each in guessing.llm.get_metrics() if each.name == "vllm:spec_decode_num_drafts")
    assert drafts > 0
