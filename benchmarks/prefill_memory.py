"""Peak memory and time of one long left-padded prefill: Hugging Face under Inductor against the rewritten graph.

Every run is a process of its own (``python -m benchmarks.prefill_memory`` with a task on standard input), because the
peak that the system keeps of a process never falls.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Case, Measured, note, seconds
from benchmarks.models import left_padded, smollm2_shape
from tmx_compile import TriangleMixConfig, tmx_backend

ROOT = Path(__file__).parent.parent
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
        for name, deepest in variants.items():
            note(f"prefill_memory: {name}, compiling")
            cold[name] = _in_process({**plan, "deepest": deepest, "timed": False}, cache)
        for number in range(plan["rounds"]):
            for name, deepest in variants.items():
                note(f"prefill_memory: {name}, round {number + 1}")
                runs[name].append(_in_process({**plan, "deepest": deepest, "timed": True}, cache))
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
                "coldpeak_mib": cold[name]["peak_mib"],
                "lowerings": runs[name][0]["lowerings"],
            }
        )
    for record in records:
        record["speedup"] = records[0]["s"] / record["s"]
        record["added_share"] = record["added_mib"] / records[0]["added_mib"]
    return Measured(settings, records)


def _in_process(task: dict[str, Any], cache: str) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.prefill_memory"],
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


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


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    """The peak resident size of this program.

    Linux folds the parent's peak into ``ru_maxrss`` when a child starts; the high-water mark of the memory map is the
    same number without it.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def reset_peak() -> None:
    """Forget the peak so far (loading a model may need more than running it). Linux alone."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


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
