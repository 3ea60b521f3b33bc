"""Each program of the folder in a process of its own, and the records that they print."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.common import RESULTS, Case, Parts

PROGRAMS = (
    *("transformers_generate", "transformers_compile_config", "transformers_images", "transformers_serve"),
    *("accelerate_offload", "peft_lora", "trl_sft", "torchao_int8", "bitsandbytes_int8"),
    *("lm_eval_hflm", "litgpt_model", "x_transformers_decoder", "nanogpt_form", "gpt_fast_form"),
)


def settings(quick: bool) -> dict[str, Any]:
    from studies.clients.common import CONFIG, LAYERS, TOKENS

    sink, window, last = CONFIG.geometry.counts
    return {
        "model": f"random weights, {LAYERS} layers, float32",
        "tokens": TOKENS,
        "triangle_layers": sorted(CONFIG.layers()),
        "geometry": [sink, window, last],
        "compiler": "none: the graphs that would go to Inductor run as the pass leaves them",
        "error": "largest difference from the same call uncompiled, the masks of the triangle layers written out and "
        "the softmax in float64, relative to the largest number",
        "change": "the same difference between that call and the dense one",
    }


def run(program: str, quick: bool) -> list[dict[str, Any]]:
    """The records of one program; a library that is missing is one of them."""
    command = [sys.executable, "-W", "ignore", "-m", f"studies.clients.{program}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent.parent, check=False)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]
    if done.returncode:
        sys.stderr.write(done.stderr)
        failed = (done.stderr.splitlines() or ["no output"])[-1][:300]
        records.append({"client": program, "version": "", "way": "", "failed": failed})
    return records


COLUMNS = ("client", "version", "way", "triangle", "reasons", "graphs", "error", "change", "seconds", "failed")
CASE = Case(
    "clients",
    "clients.json",
    None,
    COLUMNS,
    Parts(lambda quick: PROGRAMS, settings, run, lambda records: None),
    on_request=True,
)
