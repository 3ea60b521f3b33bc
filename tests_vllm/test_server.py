"""The OpenAI server with the real client: many requests at once, every answer the oracle's; clients that go away."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.serve_vllm import NAME, Server
from tests_vllm.support import BLOCK, NEW_TOKENS, SETTINGS, VOCABULARY, Oracle, prompts

REQUESTS = 200


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[Server]:
    """With a tokenizer whose words are the numbers of the tokens."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t2", eos_token="t1").save_pretrained(model)
    arguments = ["--max-model-len", "512", "--max-num-batched-tokens", "128", "--block-size", str(BLOCK)]
    arguments += ["--dtype", "float32", "--max-num-seqs", "8"]
    talking = {"VLLM_LOGGING_LEVEL": "INFO"}
    with Server(Path(model), SETTINGS | {"stats_log_interval": 1}, *arguments, environment=talking) as running:
        yield running


def complete(client: Any, tokens: list[int], new_tokens: int = NEW_TOKENS, **more: Any) -> Any:
    extra = {"ignore_eos": True}
    return client.completions.create(
        model=NAME, prompt=tokens, max_tokens=new_tokens, temperature=0, extra_body=extra, **more
    )


def numbers(text: str) -> list[int]:
    return [int(word.removeprefix("t")) for word in text.split()]


def test_many_requests_at_once_get_the_oracles_answers(server: Server, oracle: Oracle) -> None:
    """Prompts of all kinds, in a random order, chunked, batched, from the cache and streamed."""
    names = random.Random(0).choices(list(prompts()), k=REQUESTS)
    client = server.client()

    def one(place: int) -> list[int]:
        tokens = prompts()[names[place]]
        if place % 2:
            parts = complete(client, tokens, stream=True)
            return numbers("".join(choice.text for part in parts for choice in part.choices))
        return numbers(complete(client, tokens).choices[0].text)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, range(REQUESTS)))
    assert len(answers) == REQUESTS
    for name, answer in zip(names, answers, strict=True):
        assert answer == oracle.answer(prompts()[name]).tokens, name


def test_clients_that_go_away_take_nothing_with_them(server: Server, oracle: Oracle) -> None:
    client = server.client()
    for _ in range(5):
        stream = complete(client, prompts()["long"], 100, stream=True)
        next(iter(stream))
        stream.close()
    assert numbers(complete(client, prompts()["middle"]).choices[0].text) == oracle.answer(prompts()["middle"]).tokens


def counted(server: Server) -> dict[str, float]:
    """What the metrics endpoint tells: by kind the tokens of prompts, by outcome the requests."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    counter = re.compile(r'trianglemix:(prompt_tokens|requests)_total\{.*(?:kind|outcome)="(\w+)".*\} (\S+)')
    return {f"{match[1]} {match[2]}": float(match[3]) for match in map(counter.match, lines) if match}


def test_the_metrics_endpoint_counts_tokens_and_requests(server: Server) -> None:
    before = counted(server)
    tokens = [*range(20, 220)]
    complete(server.client(), tokens)
    complete(server.client(), tokens)
    complete(server.client(), tokens[:40])
    after = counted(server)
    # Of 200 tokens the last 24 are dense; the second time 160 come from the cache. 40 are a short prompt.
    assert {kind: after[kind] - before[kind] for kind in after} == {
        "prompt_tokens triangle": 176 + 16, "prompt_tokens dense": 24 + 24 + 40, "prompt_tokens cached": 160,
        "requests triangle": 2, "requests SHORT_PROMPT": 1, "requests NOT_FASTER": 0,
    }  # fmt: skip


def test_the_server_tells_what_is_on(server: Server) -> None:
    complete(server.client(), prompts()["fork"])
    said = server.said()
    assert "triangle layers 1,3 of 4 (dense: 2 NOT_SELECTED), geometry 4/16/24" in said[0]
    assert any("triangle tokens" in line for line in said)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=10) as answer:
        assert answer.status == 200


def test_a_killed_engine_is_an_error_and_never_an_answer(server: Server) -> None:
    """The last one of this server: it ends as vLLM's own does, and so do the requests that it had."""
    stream = complete(server.client(), prompts()["long"], 200, stream=True)
    next(iter(stream))
    children = psutil.Process(server.process.pid).children(recursive=True)
    (engine,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    engine.kill()
    parts: list[Any] = []
    with contextlib.suppress(openai.OpenAIError, httpx.HTTPError):
        parts.extend(stream)
    assert sum(len(numbers(choice.text)) for part in parts for choice in part.choices) < 200
    assert server.process.wait(120) is not None
    with pytest.raises(openai.APIConnectionError):
        complete(server.client().with_options(max_retries=0), prompts()["short"])
