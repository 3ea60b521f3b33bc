"""What calibrating SmolLM2-135M costs in time and memory, and which layers it finds.

Each part is a process of its own (``python -m studies.calibration`` with a task on standard input), because the peak
that the system keeps of a process never falls. The calibrations also leave their profiles beside the results.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any

import torch

from benchmarks.common import RESULTS, Case, Parts, Records, note
from benchmarks.models import smollm2
from benchmarks.texts import token_stream
from studies.processes import in_process, peak_mib, reset_peak, resident_mib
from studies.texts import CALIBRATION
from tmx_compile import TriangleMixConfig, calibrate
from tmx_compile.analysis import Sample
from tmx_compile.analysis.judge.language_model import call_arguments, sample_at
from tmx_compile.mask.geometry import Geometry

PROFILES = RESULTS / "profiles"
GEOMETRY = Geometry(8, 64, 128)
FULL: dict[str, Any] = {"tokens": 2048, "samples": 16, "direct_samples": 4, "layers": 30, "greedy": 15, "shortlist": 4}
QUICK: dict[str, Any] = {"tokens": 256, "samples": 2, "direct_samples": 1, "layers": 3, "greedy": 1, "shortlist": 2}
POSITIONS = 64

# One batch, for memory: what a calibration is compared with, and the calibrations themselves.
ONE_BATCH = ("forward", "forward-backward", "training-step", "one-gradient", "one-direct")
CALIBRATIONS = ("gradient", "direct")


def names(quick: bool) -> list[str]:
    return [*ONE_BATCH, *CALIBRATIONS]


def settings(quick: bool) -> dict[str, Any]:
    return {
        **(QUICK if quick else FULL),
        "geometry": list(GEOMETRY.counts),
        "positions": POSITIONS,
        "model": "SmolLM2-135M-Instruct (4-bit weights, computed in bfloat16)",
        "dtype": "bfloat16",
        "batch": 1,
        "text": "pydoc_data.topics: all chapters that benchmarks/texts.py does not keep for evaluation",
        "answer": "the token that follows in the text",
        "memory": "peak resident size (VmHWM) of a process less its size with the model loaded and nothing run",
        "time": "s: wall clock; cpu_s: processor time of the process, all threads together",
        "forward": "Hugging Face's model in eager mode under no_grad, logits of the last position",
        "forward-backward": "the same with gradients of all activations back to the embeddings, weights frozen",
        "training-step": "the same with gradients of all weights, and logits and loss of all positions",
        "one-gradient": "calibrate(estimator='gradient') with one batch, capture included",
        "one-direct": "calibrate(estimator='direct') with one batch and no greedy rounds, capture included",
    }


def measure(name: str, quick: bool) -> Records:
    task = {**(QUICK if quick else FULL), "name": name, "quick": quick}
    return [in_process("studies.calibration", task)]


def finish(records: Records) -> None:
    """How much memory each takes beside the forward-backward pass."""
    base = next((r["added_mib"] for r in records if r["part"] == "forward-backward"), None)
    for record in records:
        record["of_forward_backward"] = record["added_mib"] / base if base else None


def child(task: dict[str, Any]) -> dict[str, Any]:
    """One process: load, note the resident size, do the task, read the peak."""
    name, tokens, layers = task["name"], task["tokens"], task["layers"]
    model, tokenizer = smollm2(layers)
    model = model.to(torch.bfloat16)
    stream = token_stream(tokenizer, CALIBRATION)
    count = {"gradient": task["samples"], "direct": task["direct_samples"]}.get(name, 1)
    keep = POSITIONS if name.endswith("direct") else 1
    extra, cpu = call_arguments(model, keep), torch.device("cpu")
    samples = [sample_at(stream, i * (tokens + 1), tokens, cpu, extra) for i in range(count)]
    gc.collect()
    reset_peak()
    before, started, used = resident_mib(), time.perf_counter(), time.process_time()
    found = {}
    if name in ONE_BATCH[:3]:
        _plain(name, model, samples[0])
    else:
        found = _calibrate(task, model, samples)
    seconds, used, peak = time.perf_counter() - started, time.process_time() - used, peak_mib()
    return {
        "batches": count,
        "before_mib": before,
        "peak_mib": peak,
        "added_mib": peak - before,
        "s": seconds,
        "s_per_batch": seconds / count,
        "cpu_s": used,
        **found,
    }


def _plain(name: str, model: Any, sample: Sample) -> None:
    """What people would run without this package."""
    ids = sample.inputs.kwargs["input_ids"]
    if name == "training-step":
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return
    model.requires_grad_(False)
    if name == "forward":
        with torch.no_grad():
            model(**sample.inputs.kwargs)
        return
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits
    logits[0, -1, int(sample.answer)].backward()


def _calibrate(task: dict[str, Any], model: Any, samples: list[Sample]) -> dict[str, Any]:
    name = task["name"]
    direct = name.endswith("direct")
    found = calibrate(
        model,
        samples,
        config=TriangleMixConfig(*GEOMETRY.counts),
        estimator="direct" if direct else "gradient",
        greedy=task["greedy"] if name == "direct" else 0,
        shortlist=task["shortlist"],
        positions=POSITIONS,
    )
    if name in CALIBRATIONS and not task["quick"]:
        PROFILES.mkdir(exist_ok=True)
        found.to_profile(PROFILES / f"smollm2-135m-{GEOMETRY.slug}-{name}.json", task["greedy"])
    record: dict[str, Any] = {"ranking": list(found.ranking)}
    if found.greedy:
        record["greedy_kl"] = [value for _, value in found.greedy]
    record["scores"] = {kind: [float(f"{v:.4g}") for v in s.values()] for kind, s in found.scores.items()}
    return record


COLUMNS = (
    "part",
    "batches",
    "before_mib",
    "peak_mib",
    "added_mib",
    "of_forward_backward",
    "s",
    "s_per_batch",
    "cpu_s",
    "ranking",
)
CASE = Case("calibration", "calibration.json", None, COLUMNS, Parts(names, settings, measure, finish))

if __name__ == "__main__":
    note(f"calibration: process {os.getpid()}")
    print(json.dumps(child(json.load(sys.stdin))))
