"""What the form for short prompts costs: the first call of a graph that holds both forms, the long one, or neither."""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.common import Case, Parts, Records, cold_compiles
from studies.models import left_padded, small_llama, smollm2_shape
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.request import INDUCTOR, Short

TOKENS, PADDING = 2304, 7
FULL: dict[str, Any] = {"layers": 4, "models": ["Llama", "SmolLM2"]}
QUICK: dict[str, Any] = {"layers": 2, "models": ["Llama"]}
FORMS = ("Inductor alone", "long form", "both forms")


def _settings(quick: bool) -> dict[str, Any]:
    return {
        **(QUICK if quick else FULL),
        "tokens": TOKENS,
        "padding": PADDING,
        "Llama": "random weights, hidden size 64, 4 heads, 2 key heads, head dim 16",
        "SmolLM2": "random weights, SmolLM2-135M's shape but for its layers",
        "shapes": "dynamic length, 2-D attention mask, use_cache=True, logits_to_keep=1",
        "config": "the deepest half of the layers, 4/32/64; lowering auto",
        "long form": "short prompts would be another graph of Dynamo's",
        "both forms": "tmx_backend as it is",
        "first_s": "the first call, a long prompt's: Dynamo, the pass, Inductor, and the run; caches off",
        "first_cpu_s": "processor time of this process and its compilers, which other load changes less than first_s",
        "threads": "one, for Inductor too; a throwaway compile comes first",
    }


def _names(quick: bool) -> Sequence[str]:
    return [f"{model}, {form}" for model in (QUICK if quick else FULL)["models"] for form in FORMS]


def _measure(part: str, quick: bool) -> Records:
    name, form = part.split(", ")
    with torch._inductor.config.patch(compile_threads=1):
        _warm_up()
        return [_first_call(name, (QUICK if quick else FULL)["layers"], form)]


@functools.cache
def _warm_up() -> None:
    """Imports and the compiler's precompiled header must not count for the first."""
    _first_call("Llama", 1, FORMS[0])


def _first_call(name: str, layers: int, form: str) -> dict[str, Any]:
    torch._dynamo.reset()
    gc.collect()
    model = small_llama(layers) if name == "Llama" else smollm2_shape(num_hidden_layers=layers)
    backend = tmx_backend(TriangleMixConfig.deepest(max(1, layers // 2), num_layers=layers), strict=True)
    host = replace(INDUCTOR, short=Short.OTHER_GRAPH) if form == "long form" else INDUCTOR
    compiled = torch.compile(model, backend="inductor" if form == FORMS[0] else backend)
    ids, mask = left_padded(1, TOKENS, PADDING, 128)
    for x in (ids, mask):
        torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad(), cold_compiles(), mock.patch("tmx_compile.backend.INDUCTOR", host):
        start, before = time.perf_counter(), sum(os.times()[:4])
        compiled(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        wall, used = time.perf_counter() - start, sum(os.times()[:4]) - before
    found = {"triangle_sites": len(backend.report.triangle()), "first_s": wall, "first_cpu_s": used}
    return {"model": name, "layers": layers, "form": form, **found}


def _finish(records: Records) -> None:
    plain = {record["model"]: record["first_cpu_s"] for record in records if record["form"] == FORMS[0]}
    for record in records:
        if record["model"] in plain:
            record["over_inductor"] = record["first_cpu_s"] / plain[record["model"]]


COLUMNS = ("model", "layers", "form", "triangle_sites", "first_s", "first_cpu_s", "over_inductor")
CASE = Case("two_forms", "two_forms.json", None, COLUMNS, Parts(_names, _settings, _measure, _finish))
