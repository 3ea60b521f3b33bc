"""``python -m tools.pages``: what it says of a result file whatever that holds."""

import importlib
import json

import pytest

from benchmarks import run as benchmarks
from benchmarks.common import RESULTS
from studies import run as studies
from tools.pages import blocks, page_vllm
from tools.pages.results import MOVED, today

COMMANDS = sorted(
    {
        command
        for path in RESULTS.rglob("*.json")
        for content in [json.loads(path.read_text(encoding="utf-8"))]
        if isinstance(content, dict)
        for command in [content.get("command"), *(part["command"] for part in content.get("runs", {}).values())]
        if command is not None
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stored_command_is_told_as_it_can_be_run_today(command):
    python, option, module, *rest = today(command).split()
    assert (python, option) == ("python", "-m")
    known = {"benchmarks.run": benchmarks.CASES, "studies.run": studies.CASES}
    if module in known:
        assert rest[0] in {case.name for case in known[module]}
    else:
        assert callable(importlib.import_module(module).main)


def test_a_command_that_moved_keeps_its_arguments():
    assert today("python -m benchmarks.run quality --only 'a b'") == "python -m studies.run quality --only 'a b'"
    assert today("python -m benchmarks.run quality_of_life") == "python -m benchmarks.run quality_of_life"
    assert len(COMMANDS) > 20
    assert all(any(command.startswith(f"python -m {old}") for command in COMMANDS) for old in MOVED)


def test_blocks_are_filled_and_what_is_around_them_stays(tmp_path):
    page = tmp_path / "page.md"
    written = (
        "# Title\n\n<!-- begin one -->\n<!-- end one -->\nbetween\n<!-- begin two -->\nold\n<!-- end two -->\nend\n"
    )
    page.write_text(written, encoding="utf-8")
    text = blocks.filled(page, {"two": "2", "one": "1"})
    assert text == (
        "# Title\n\n<!-- begin one -->\n\n1\n\n<!-- end one -->\nbetween\n"
        "<!-- begin two -->\n\n2\n\n<!-- end two -->\nend\n"
    )
    page.write_text(text, encoding="utf-8")
    assert blocks.filled(page, {"one": "1", "two": "2"}) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "page.md is missing; its text is written by hand"),
        ("no marks\n", "page.md lacks the marks <!-- begin one --> and <!-- end one -->"),
        ("<!-- begin one -->\n", "page.md lacks the marks <!-- begin one --> and <!-- end one -->"),
        ("<!-- begin three -->\n<!-- end three -->\n", "page.md has marks of unknown blocks: three; known: one"),
    ],
)
def test_a_page_without_the_marks_is_refused(tmp_path, text, reason):
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        blocks.filled(page, {"one": "1"})


def test_both_pages_on_vllm_have_the_same_tables(tmp_path):
    """A record of each kind, and one that no table shows."""
    record = {"runner": "V2 compiled", "n": 32768, "chunk": 8192, "layers": 16, "triangle_layers": 8, "dense_ms": 611.0}
    records = [
        record | {"what": "ttft", "ms": 503.0},
        record | {"what": "short prompts", "n": 256, "batch": 32, "new_tokens": 128, "dense_ms": 1000.0, "ms": 1004.0},
        record
        | {"what": "a decode step", "n": 256, "batch": 1, "dense_ms": 6.8, "ms": 6.812}
        | {"pairs": {"median": 0.99812, "confidence_95": [0.9961, 1.0004]}},
        record | {"what": page_vllm.MIXED, "gpus": 2, "dense_ms": 3000.0, "ms": 2500.0},
        record
        | {"what": page_vllm.MIXED, "layers": 32, "triangle_layers": 16, "dense_ms": 6000.0, "ms": 5000.0}
        | {"dense_decode_tokens_per_s": 100.4, "decode_tokens_per_s": 120.0},
        record | {"what": "waits, dense"},
        *(
            record
            | {"what": f"parts, {kind}", "attention_ms": attention, "matmul_ms": 1257.4, "other_ms": 123.8}
            | {"longest": [["flash", "attention", attention - ours], ["hopper_kernel", "attention", ours]]}
            for kind, attention, ours in (("triangle", 1010.0, 32.2), ("dense", 1943.0, 0.0))
        ),
    ]
    hardware = {"gpu": "A card", "gpu_memory_gib": 79.2, "cpu": "A CPU", "cores": 16, "memory_gib": 125.9, "flags": []}
    versions = {"cuda": "13.0", "python": "3.12.3", "torch": "2.11.0", "transformers": "5.17.0", "tmx_compile": "0.1.0"}
    settings = {"geometry": [8, 512, 128], "vllm": "0.26.0"}
    content = {"quick": False, "command": "python -m studies.vllm_serving", "records": records}
    content |= {"hardware": hardware, "versions": versions, "settings": settings}
    (tmp_path / page_vllm.FILE).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "zh").mkdir()
    layer = {"what": "one layer", "shape": "A model, half", "dtype": "float32", "n": 6144, "dense_ms": 552.1}
    on_cpu = content | {
        "command": "python -m studies.vllm_cpu",
        "records": [layer | {"ms": 90.0, "geometry": [8, 64, 128]}, layer | {"ms": 124.0, "geometry": [8, 256, 128]}],
        "hardware": {name: value for name, value in hardware.items() if "gpu" not in name},
        "settings": {"vllm": "0.32.0"},
    }
    (tmp_path / page_vllm.CPU_FILE).write_text(json.dumps(on_cpu), encoding="utf-8")
    answer = {"runner": "V2 compiled", "gpus": 1, "n": 3000}
    near, far = {"mean": 0.0161}, {"mean": 0.144}
    answers = [
        answer | {"what": "oracle: whole", "to_triangle": near, "to_dense": far},
        answer | {"what": "oracle: whole", "n": 8192, "to_triangle": {"mean": 0.02}, "to_dense": {"mean": 0.2}},
        answer | {"what": "oracle: whole", "gpus": 2, "stages": 2, "to_triangle": near, "to_dense": far},
        answer | {"what": "oracle: dense", "to_triangle": far, "to_dense": near},
        answer | {"what": "oracle: of a batch", "n": 700, "to_triangle": near, "to_dense": near},
        answer | {"what": "ttft", "dense_ms": 1.0, "ms": 1.0},
    ]
    of_answers = content | {"command": "python -m studies.vllm_oracle --quick", "records": answers}
    (tmp_path / page_vllm.ORACLE_FILE).write_text(json.dumps(of_answers), encoding="utf-8")
    engine = {
        "n": 3000,
        "load_average": 6.3,
        "dense_processor_ms": 8000.0,
        "processor_ms": 4000.0,
        "dense_ms": 9000.0,
        "ms": 6000.0,
    }
    whole = on_cpu | {"command": "python -m studies.vllm_cpu_ttft", "records": [engine]}
    whole["settings"] = settings | {"model": "A model", "dtype": "bfloat16", "layers": 30, "triangle_layers": 15}
    (tmp_path / page_vllm.ENGINE_FILE).write_text(json.dumps(whole), encoding="utf-8")
    empty = "\n".join("\n".join(blocks.marks(name)) for name in ("vllm", "vllm_oracle", "vllm_cpu", "vllm_cpu_ttft"))
    for page in page_vllm.PAGES:
        (tmp_path / page).write_text(f"before\n{empty}\nbehind\n", encoding="utf-8")
    english, chinese = page_vllm.generate(tmp_path, tmp_path).values()
    for text, of, whole, stages in (
        (english, "of", "whole", ", pipeline"),
        (chinese, "/", "整个提示词", "，流水线"),
    ):
        assert f"| 32,768 | 8,192 | 8 {of} 16 | V2 compiled | 611 | 503 | 1.21x |" in text
        assert f"| 32 x 256 | 128 | 8 {of} 16 | V2 compiled | 1,000 | 1,004 | 1.00x |  |" in text
        assert f"| 1 x 256 | 8 {of} 16 | V2 compiled | 6.8 | 6.81 | 1.00x | 0.998 (0.996 - 1.000) |" in text
        assert "Llama-3.1-8B, 8/512/128; vLLM 0.26.0, A card" in text
        dense, triangle = ("dense", "triangle") if of == "of" else ("稠密", "三角")
        first = f"| 32,768 | 8,192 | 8 {of} 16 | {dense} | 1,943 |  | 1,257 | 124 |\n"
        assert f"{first}| 32,768 | 8,192 | 8 {of} 16 | {triangle} | 1,010 | 32.2 | 1,257 | 124 |" in text
        assert f"| 32,768 | 8,192 | 8 {of} 16 | V2 compiled, 2 GPUs | 3,000 | 2,500 | 1.20x |  |  |" in text
        assert f"| 32,768 | 8,192 | 16 {of} 32 | V2 compiled | 6,000 | 5,000 | 1.20x | 100 | 120 |" in text
        assert f"| {whole} | 8,192 | V2 compiled | 1 | 0.020 | 0.144 |" in text
        assert f"| {whole}{stages} | 3,000 | V2 compiled | 2 | 0.016 | 0.144 |" in text
        assert "| 3,000 | V2 compiled | 1 | 0.016 | 0.144 |" in text
        assert f"A model, bfloat16, 15 {of} 30 x 8/512/128; vLLM 0.26.0, A CPU" in text
        assert "load average 6" in text
        assert "| 3,000 | 8,000 | 4,000 | 2.00x | 9,000 | 6,000 | 1.50x |" in text
        assert "| A model | float32 | 6,144 | 552 | 124 | 4.45x |" in text
        assert "8/256/128; vLLM 0.32.0, A CPU" in text
        assert text.count("\n| ") == 28
    assert page_vllm.generate(tmp_path / "zh", tmp_path) == {}
