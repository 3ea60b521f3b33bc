"""The tables of docs/vllm.md and of its Chinese page: what a GPU and a CPU gained in vLLM."""

from __future__ import annotations

from pathlib import Path

from tools.pages.blocks import filled
from tools.pages.markdown import Fields, ms, slashed, table, times
from tools.pages.results import load, machine_and_versions

PAGES = ("vllm.md", "zh/vllm.md")
FILE, CPU_FILE = "vllm.json", "vllm_cpu.json"
MIXED = "8 requests that decode, 3 long prompts"
_ENGLISH = {
    "first": ("tokens", "rows of a step", "runner", "dense, ms", "triangle, ms", "dense / triangle"),
    "others": ("prompts x tokens", "new tokens", "runner", "dense, ms", "triangle, ms", "dense / triangle"),
    "layer": ("model", "dtype", "tokens", "dense, ms", "triangle, ms", "dense / triangle"),
    "to first": "Time to the first token:",
    "of others": "All answers to short prompts at once, whose rows are dense in both:",
    "of mixed": "All answers where 8 short prompts decode while 3 long ones come:",
}
_CHINESE = {
    "first": ("token 数", "每步行数", "运行器", "稠密，毫秒", "三角，毫秒", "稠密 / 三角"),
    "others": ("提示词数 x token 数", "新 token", "运行器", "稠密，毫秒", "三角，毫秒", "稠密 / 三角"),
    "layer": ("模型", "dtype", "token 数", "稠密，毫秒", "三角，毫秒", "稠密 / 三角"),
    "to first": "首个 token 的时间：",
    "of others": "同时回答若干短提示词所用的时间，两种情况下它们的行都是稠密的：",
    "of mixed": "8 个短提示词正在解码时来了 3 个长提示词，全部回答所用的时间：",
}


def generate(results: Path, docs: Path) -> dict[Path, str]:
    """The pages of ``docs`` with their blocks from the files in ``results``; empty where nothing was measured.

    Raises:
        ValueError: a page is missing or lacks the marks, or the result file lacks a field.
    """
    parts = {"vllm": (FILE, section), "vllm_cpu": (CPU_FILE, cpu_section)}
    known = {name: (load(results / file), write) for name, (file, write) in parts.items() if (results / file).is_file()}
    if not known:
        return {}
    return {
        docs / page: filled(docs / page, {name: write(result, of) for name, (result, write) in known.items()})
        for page, of in zip(PAGES, (_ENGLISH, _CHINESE), strict=True)
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


def cpu_section(result: Fields, words: dict) -> str:
    """One layer's attention, with the wider of the windows."""
    machine, _ = machine_and_versions(result)
    geometry = max(record["geometry"] for record in result["records"])
    rows = [
        [record["shape"].partition(",")[0], record["dtype"], f"{record['n']:,}", *_pair(record)]
        for record in result["records"]
        if record["geometry"] == geometry
    ]
    about = (
        f"{slashed(geometry)}; vLLM {result['settings']['vllm']}, {machine} "
        f"(`{' '.join(result['command'].split()[:3])}`, `benchmarks/results/{CPU_FILE}`)."
    )
    return "\n\n".join([table(words["layer"], rows), about])


def _of(result: Fields, what: str) -> list[Fields]:
    found = [record for record in result["records"] if record["what"] == what and "ms" in record]
    return sorted(found, key=lambda record: (record["n"], record["chunk"]))


def _first(record: Fields) -> list[str]:
    return [f"{record['n']:,}", f"{min(record['chunk'], record['n']):,}", *_times(record)]


def _other(record: Fields) -> list[str]:
    return [f"{record['batch']} x {record['n']:,}", f"{record['new_tokens']}", *_times(record)]


def _times(record: Fields) -> list[str]:
    return [record["runner"], *_pair(record)]


def _pair(record: Fields) -> list[str]:
    return [ms(record["dense_ms"]), ms(record["ms"]), times(record["dense_ms"] / record["ms"])]
