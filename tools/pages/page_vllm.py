"""The tables of docs/vllm.md and of its Chinese page: what a GPU and a CPU gained in vLLM."""

from __future__ import annotations

from pathlib import Path

from tools.pages.blocks import filled
from tools.pages.markdown import Fields, ms, slashed, table, times
from tools.pages.results import load, machine_and_versions

PAGES = ("vllm.md", "zh/vllm.md")
FILE, CPU_FILE, ORACLE_FILE, ENGINE_FILE = "vllm.json", "vllm_cpu.json", "vllm_oracle.json", "vllm_cpu_ttft.json"
MIXED = "8 requests that decode, 3 long prompts"
_ENGLISH = {
    "first": ("tokens", "rows of a step", "triangle layers", "runner", "dense, ms", "triangle, ms", "dense / triangle"),
    "others": (
        *("prompts x tokens", "new tokens", "triangle layers", "runner", "dense, ms", "triangle, ms"),
        *("dense / triangle", "ratio of medians, 95%"),
    ),
    "steps": (
        *("requests x tokens", "triangle layers", "runner", "dense, ms", "triangle, ms"),
        *("dense / triangle", "of pairs: median, 95%"),
    ),
    "decoding": ("decode dense, tokens/s", "triangle"),
    "layer": ("model", "dtype", "tokens", "dense, ms", "triangle, ms", "dense / triangle"),
    "engine": ("tokens", "dense, ms", "triangle, ms", "dense / triangle", "passed, dense, ms", "triangle", "ratio"),
    "oracle": ("what", "tokens", "runner", "GPUs", "off", "off from the wrong mask"),
    "to first": "Time to the first token:",
    "of others": "All answers to short prompts at once, whose rows are dense in both:",
    "of steps": "One decode step:",
    "parts": (
        "tokens",
        "rows of a step",
        "triangle layers",
        "",
        "attention, ms",
        "streaming rows",
        "products",
        "other",
    ),
    "of parts": "Where the GPU's time goes, of one prompt under a profiler:",
    "kinds": ("dense", "triangle"),
    "of mixed": "All answers where 8 short prompts decode while 3 long ones come:",
    "of": "of",
    "stages": ", pipeline",
    "what": {},
}
_CHINESE = {
    "first": ("token 数", "每步行数", "三角层", "运行器", "稠密，毫秒", "三角，毫秒", "稠密 / 三角"),
    "others": (
        *("提示词数 x token 数", "新 token", "三角层", "运行器", "稠密，毫秒", "三角，毫秒"),
        *("稠密 / 三角", "中位数之比，95%"),
    ),
    "steps": (
        *("请求数 x token 数", "三角层", "运行器", "稠密，毫秒", "三角，毫秒"),
        *("稠密 / 三角", "成对之比：中位数，95%"),
    ),
    "decoding": ("稠密时解码，token/秒", "三角"),
    "layer": ("模型", "dtype", "token 数", "稠密，毫秒", "三角，毫秒", "稠密 / 三角"),
    "engine": ("token 数", "稠密，毫秒", "三角，毫秒", "稠密 / 三角", "经过时间：稠密，毫秒", "三角", "比值"),
    "oracle": ("情形", "token 数", "运行器", "GPU 数", "偏差", "与错误掩码的偏差"),
    "to first": "首个 token 的时间：",
    "of others": "同时回答若干短提示词所用的时间，两种情况下它们的行都是稠密的：",
    "of steps": "一个解码步：",
    "parts": ("token 数", "每步行数", "三角层", "", "注意力，毫秒", "其中流式行", "矩阵乘", "其他"),
    "of parts": "GPU 的时间花在哪里（性能剖析下的一个提示词）：",
    "kinds": ("稠密", "三角"),
    "of mixed": "8 个短提示词正在解码时来了 3 个长提示词，全部回答所用的时间：",
    "of": "/",
    "stages": "，流水线",
    "what": {
        "whole": "整个提示词",
        "whole, last rows apart": "整个提示词，末尾行单独计算",
        "dense": "稠密",
        "chunks": "分块",
        "of a batch": "混合批次",
        "chunks of one row": "只有一行的块",
        "chunks of one row while 3 decode": "只有一行的块，同时有 3 个请求解码",
        "chunks of one row while 3 decode, taken for decode steps": "同上（3 个请求），当作解码步（反例）",
        "prefix cache, first": "前缀缓存，首次",
        "prefix cache, again": "前缀缓存，再次",
        "prefix cache, a beginning of it": "前缀缓存，其开头",
        "prefix cache, another end": "前缀缓存，另一结尾",
        "prefix cache, hits not capped": "前缀缓存，命中不设上限（反例）",
        "preempted": "被抢占",
        "long": "长提示词",
        "n-gram drafts": "n-gram 草稿",
        "drafts of a model": "草稿模型的草稿",
    },
}


def generate(results: Path, docs: Path) -> dict[Path, str]:
    """The pages of ``docs`` with their blocks from the files in ``results``; empty where nothing was measured.

    Raises:
        ValueError: a page is missing or lacks the marks, or the result file lacks a field.
    """
    parts = {
        "vllm": (FILE, section),
        "vllm_oracle": (ORACLE_FILE, oracle_section),
        "vllm_cpu": (CPU_FILE, cpu_section),
        "vllm_cpu_ttft": (ENGINE_FILE, engine_section),
    }
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
    first, others, steps, mixed = (_of(result, what) for what in ("ttft", "short prompts", "a decode step", MIXED))
    about = (
        f"Llama-3.1-8B, {slashed(settings['geometry'])}; vLLM {settings['vllm']}, {machine} {_made_by(result, FILE)}"
    )
    of = words["of"]
    parts = [words["to first"], table(words["first"], [_first(record, of) for record in first])]
    spent = [
        _part(record, of, name)
        for what, name in zip(("dense", "triangle"), words["kinds"], strict=True)
        for record in result["records"]
        if record["what"] == f"parts, {what}"
    ]
    if spent:
        parts += [words["of parts"], table(words["parts"], sorted(spent, key=lambda row: row[:2]))]
    if others:
        parts += [words["of others"], table(words["others"], [_other(record, of) for record in others])]
    if steps:
        parts += [words["of steps"], table(words["steps"], [_step(record, of) for record in steps])]
    if mixed:
        rows = [[*_first(record, of), *_decoding(record)] for record in mixed]
        parts += [words["of mixed"], table((*words["first"], *words["decoding"]), rows)]
    return "\n\n".join([*parts, about])


def oracle_section(result: Fields, words: dict) -> str:
    """The largest mean difference of each kind, and the smallest from the model with the wrong mask."""
    groups: dict[tuple[str, str, int, bool], list[Fields]] = {}
    for record in result["records"]:
        what = record["what"].removeprefix("oracle: ")
        # Where both masks are one there is nothing to tell; so it is with short prompts.
        if "to_dense" in record and record["to_triangle"] != record["to_dense"]:
            group = what, record["runner"], record["gpus"], "stages" in record
            groups.setdefault(group, []).append(record)
    rows = []
    for (what, runner, gpus, stages), records in groups.items():
        right, wrong = ("to_dense", "to_triangle") if what == "dense" else ("to_triangle", "to_dense")
        off = max(record[right]["mean"] for record in records)
        other = min(record[wrong]["mean"] for record in records)
        longest = max(record["n"] for record in records)
        name = words["what"].get(what, what) + (words["stages"] if stages else "")
        rows.append([name, f"{longest:,}", runner, str(gpus), f"{off:.3f}", f"{other:.3f}"])
    machine, _ = machine_and_versions(result)
    about = f"{slashed(result['settings']['geometry'])}; vLLM {result['settings']['vllm']}, {machine} "
    return "\n\n".join([table(words["oracle"], rows), about + _made_by(result, ORACLE_FILE)])


def engine_section(result: Fields, words: dict) -> str:
    """Whole engine: processor time, then the time that passed."""
    machine, _ = machine_and_versions(result)
    settings, rows = result["settings"], []
    loads = sorted({f"{record['load_average']:.0f}" for record in result["records"]}, key=int)
    load = loads[0] if len(loads) == 1 else f"{loads[0]} to {loads[-1]}"
    for record in result["records"]:
        processor = record["dense_processor_ms"], record["processor_ms"]
        passed = record["dense_ms"], record["ms"]
        rows.append([f"{record['n']:,}"])
        for dense, triangle in (processor, passed):
            rows[-1] += [ms(dense), ms(triangle), times(dense / triangle)]
    about = (
        f"{settings['model']}, {settings['dtype']}, {settings['triangle_layers']} {words['of']} {settings['layers']} x "
        f"{slashed(settings['geometry'])}; vLLM {settings['vllm']}, {machine}, load average {load} "
        f"{_made_by(result, ENGINE_FILE)}"
    )
    return "\n\n".join([table(words["engine"], rows), about])


def cpu_section(result: Fields, words: dict) -> str:
    """One layer's attention, with the wider of the windows."""
    machine, _ = machine_and_versions(result)
    geometry = max(record["geometry"] for record in result["records"])
    rows = [
        [record["shape"].partition(",")[0], record["dtype"], f"{record['n']:,}", *_pair(record)]
        for record in result["records"]
        if record["geometry"] == geometry
    ]
    about = f"{slashed(geometry)}; vLLM {result['settings']['vllm']}, {machine} {_made_by(result, CPU_FILE)}"
    return "\n\n".join([table(words["layer"], rows), about])


def _made_by(result: Fields, file: str) -> str:
    return f"(`{' '.join(result['command'].split()[:3])}`, `benchmarks/results/{file}`)."


def _of(result: Fields, what: str) -> list[Fields]:
    found = [record for record in result["records"] if record["what"] == what and "ms" in record]
    return sorted(found, key=lambda record: (record.get("gpus", 1), record["layers"], record["n"], record.get("chunk")))


def _layers(record: Fields, of: str) -> str:
    return f"{record['triangle_layers']} {of} {record['layers']}"


def _first(record: Fields, of: str) -> list[str]:
    return [*_sizes(record, of), *_times(record)]


def _part(record: Fields, of: str, kind: str) -> list[str]:
    ours = sum(took for name, _, took in record["longest"] if name == "hopper_kernel")
    times_of = [ms(record[f"{name}_ms"]) for name in ("attention", "matmul", "other")]
    return [*_sizes(record, of), kind, times_of[0], ms(ours) if ours else "", *times_of[1:]]


def _sizes(record: Fields, of: str) -> list[str]:
    return [f"{record['n']:,}", f"{min(record['chunk'], record['n']):,}", _layers(record, of)]


def _other(record: Fields, of: str) -> list[str]:
    prompts = f"{record['batch']} x {record['n']:,}"
    return [prompts, f"{record['new_tokens']}", _layers(record, of), *_times(record), _ratio(record)]


def _step(record: Fields, of: str) -> list[str]:
    requests = f"{record['batch']} x {record['n']:,}"
    return [requests, _layers(record, of), *_times(record), _ratio(record)]


def _ratio(record: Fields) -> str:
    found = record.get("ratio", record.get("pairs"))
    return "" if found is None else f"{found['median']:.3f} ({' - '.join(f'{x:.3f}' for x in found['confidence_95'])})"


def _decoding(record: Fields) -> list[str]:
    found = (record.get(f"{prefix}decode_tokens_per_s") for prefix in ("dense_", ""))
    return ["" if each is None else f"{each:.0f}" for each in found]


def _times(record: Fields) -> list[str]:
    gpus = record.get("gpus", 1)
    return [record["runner"] + (f", {gpus} GPUs" if gpus > 1 else ""), *_pair(record)]


def _pair(record: Fields) -> list[str]:
    return [ms(record["dense_ms"]), ms(record["ms"]), times(record["dense_ms"] / record["ms"])]
