"""The tables of docs/vllm.md and of its Chinese page: what a GPU gained in vLLM."""

from __future__ import annotations

from pathlib import Path

from tools.pages.blocks import filled
from tools.pages.markdown import Fields, ms, slashed, table, times
from tools.pages.results import load, machine_and_versions

PAGES = ("vllm.md", "zh/vllm.md")
FILE = "vllm.json"
MIXED = "8 requests that decode, 3 long prompts"
_ENGLISH = {
    "first": ("tokens", "rows of a step", "runner", "dense, ms", "triangle, ms", "dense / triangle"),
    "others": ("prompts x tokens", "new tokens", "runner", "dense, ms", "triangle, ms", "dense / triangle"),
    "to first": "Time to the first token:",
    "of others": "All answers to short prompts at once, whose rows are dense in both:",
    "of mixed": "All answers where 8 short prompts decode while 3 long ones come:",
}
_CHINESE = {
    "first": ("token 数", "每步行数", "运行器", "稠密，毫秒", "三角，毫秒", "稠密 / 三角"),
    "others": ("提示词数 x token 数", "新 token", "运行器", "稠密，毫秒", "三角，毫秒", "稠密 / 三角"),
    "to first": "首个 token 的时间：",
    "of others": "同时回答若干短提示词所用的时间，两种情况下它们的行都是稠密的：",
    "of mixed": "8 个短提示词正在解码时来了 3 个长提示词，全部回答所用的时间：",
}


def generate(results: Path, docs: Path) -> dict[Path, str]:
    """The pages of ``docs`` with their block from the file in ``results``; empty where nothing was measured.

    Raises:
        ValueError: a page is missing or lacks the marks, or the result file lacks a field.
    """
    if not (results / FILE).is_file():
        return {}
    result = load(results / FILE)
    words = (_ENGLISH, _CHINESE)
    return {
        docs / page: filled(docs / page, {"vllm": section(result, of)}) for page, of in zip(PAGES, words, strict=True)
    }


def section(result: Fields, words: dict) -> str:
    """Times to the first token, then short prompts."""
    settings = result["settings"]
    machine, _ = machine_and_versions(result)
    first, others, mixed = (_of(result, what) for what in ("ttft", "short prompts", MIXED))
    total, triangle = first[0]["layers"], first[0]["triangle_layers"]
    about = (
        f"Llama-3.1-8B x {total}, {triangle} x {slashed(settings['geometry'])}; vLLM {settings['vllm']}, {machine} "
        f"(`{' '.join(result['command'].split()[:3])}`, `benchmarks/results/{FILE}`)."
    )
    parts = [words["to first"], table(words["first"], [_first(record) for record in first])]
    if others:
        parts += [words["of others"], table(words["others"], [_other(record) for record in others])]
    if mixed:
        parts += [words["of mixed"], table(words["first"], [_first(record) for record in mixed])]
    return "\n\n".join([*parts, about])


def _of(result: Fields, what: str) -> list[Fields]:
    found = [record for record in result["records"] if record["what"] == what and "ms" in record]
    return sorted(found, key=lambda record: (record["n"], record["chunk"]))


def _first(record: Fields) -> list[str]:
    return [f"{record['n']:,}", f"{min(record['chunk'], record['n']):,}", *_times(record)]


def _other(record: Fields) -> list[str]:
    return [f"{record['batch']} x {record['n']:,}", f"{record['new_tokens']}", *_times(record)]


def _times(record: Fields) -> list[str]:
    return [record["runner"], ms(record["dense_ms"]), ms(record["ms"]), times(record["dense_ms"] / record["ms"])]
