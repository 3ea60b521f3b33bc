"""Peak memory and time of one long left-padded prefill: Hugging Face under Inductor against the rewritten graph.

Every run is a process of its own (``python -m studies.prefill_memory`` with a task on standard input), because the
peak that the system keeps of a process never falls.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
from typing import Any

import torch

from benchmarks.common import Case, Measured, note
from studies.models import left_padded, smollm2_shape
from studies.processes import in_process, peak_mib, resident_mib
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.bench.timing import seconds

GEOMETRY = {"num_sink_tokens": 8, "sliding_window_size": 512, "num_last_tokens": 128}
FULL: dict[str, Any] = {"tokens": 16384, "padding": 256, "layers": 4, "rounds": 2, "min_seq_len": 2048}
QUICK: dict[str, Any] = {"tokens": 640, "padding": 16, "layers": 2, "rounds": 1, "min_seq_len": 512}


def measure(quick: bool) -> Measured:
    plan = QUICK if quick else FULL
    layers = plan["layers"]
    variants = {"dense": 0, "half": layers // 2, "all": layers}
    settings = {
        **plan,
        **GEOMETRY,
        "model": "SmolLM2-135M's configuration with fewer layers, random weights, max_position_embeddings=32768",
        "dtype": "float32",
        "batch": 1,
        "shapes": "static",
        "call": "input_ids, 2-D attention_mask (left padding), use_cache=True, logits_to_keep=1",
        "dense": "Hugging Face's model under torch.compile(backend='inductor')",
        "lowering": "auto",
        "memory": "peak resident size (VmHWM) of a process that finds its compiled code in a cache, median over "
        "rounds; before_mib is the resident size with the model built and nothing run",
        "time": "the second call in a process, median over rounds; cold_s is the first call of a first process, with "
        "everything compiled",
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    cold: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="tmx-bench-") as cache:
        run = functools.partial(in_process, "studies.prefill_memory", TORCHINDUCTOR_CACHE_DIR=cache)
        for name, deepest in variants.items():
            note(f"prefill_memory: {name}, compiling")
            cold[name] = run({**plan, "deepest": deepest, "timed": False})
        for number in range(plan["rounds"]):
            for name, deepest in variants.items():
                note(f"prefill_memory: {name}, round {number + 1}")
                runs[name].append(run({**plan, "deepest": deepest, "timed": True}))
    records = []
    for name, deepest in variants.items():
        middle = {key: statistics.median(run[key] for run in runs[name]) for key in ("peak_mib", "before_mib", "s")}
        records.append(
            {
                "variant": name,
                "triangle_layers": deepest,
                **middle,
                "added_mib": middle["peak_mib"] - middle["before_mib"],
                "cold_s": cold[name]["first_s"],
                "cold_peak_mib": cold[name]["peak_mib"],
                "lowerings": runs[name][0]["lowerings"],
            }
        )
    for record in records:
        record["speedup"] = records[0]["s"] / record["s"]
        record["added_share"] = record["added_mib"] / records[0]["added_mib"]
    return Measured(settings, records)


def child(task: dict[str, Any]) -> dict[str, Any]:
    """One process: build, note the resident size, prefill once or twice, read the peak."""
    layers = task["layers"]
    model = smollm2_shape(num_hidden_layers=layers, max_position_embeddings=32768)
    ids, mask = left_padded(1, task["tokens"], task["padding"], model.config.vocab_size)
    backend: Any = "inductor"
    if task["deepest"]:
        config = TriangleMixConfig.deepest(
            task["deepest"], num_layers=layers, min_seq_len=task["min_seq_len"], **GEOMETRY
        )
        backend = tmx_backend(config, strict=True)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    logits: list[torch.Tensor] = []

    def prefill() -> None:
        out = compiled(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        logits[:] = [out.logits]

    with torch.no_grad():
        before = resident_mib()
        result = {"before_mib": before, "first_s": seconds(prefill), "s": 0.0}
        if task["timed"]:
            result["s"] = seconds(prefill)
    if not bool(logits[0].isfinite().all()):
        raise RuntimeError("the prefill gave logits that are not finite")
    sites = [] if backend == "inductor" else list(backend.report)
    if sum(site.decision == "triangle" for site in sites) != task["deepest"]:
        raise RuntimeError(f"wanted {task['deepest']} triangle layers, got {sites}")
    lowerings = sorted({site.lowering for site in sites})
    return {**result, "peak_mib": peak_mib(), "lowerings": " ".join(lowerings) or "as written"}


COLUMNS = (
    "variant",
    "triangle_layers",
    "lowerings",
    "before_mib",
    "peak_mib",
    "added_mib",
    "added_share",
    "s",
    "speedup",
    "cold_s",
)
CASE = Case("prefill_memory", "prefill_memory.json", measure, COLUMNS)

if __name__ == "__main__":
    print(json.dumps(child(json.load(sys.stdin))))
