"""Records of the benchmark on the time to first token, with made-up times."""

from benchmarks import ttft


def ttft_record(variant, tokens, ms, **changes):
    chosen = ttft.VARIANTS[variant]
    record = {
        "part": f"llama/{variant}",
        "model": "Llama-3.1-8B",
        "variant": variant,
        "geometry": list(chosen.geometry.counts) if chosen.geometry else None,
        "triangle_layers": 16 if chosen.geometry else 0,
        "layers": 32,
        "mask": chosen.mask,
        "graphs": chosen.graphs,
        "tokens": tokens,
        **ttft.EMPTY,
        "ms": ms,
        "compilations": 1,
        "lowerings": "triton" if chosen.geometry else "as written",
    }
    return record | changes


def ttft_records():
    spent = {"attention_ms": 8000.0, "matmul_ms": 3500.0, "other_ms": 500.0, "kernels": 999, "longest": []}
    records = [
        ttft_record("dense-causal", 131072, 12000.0, account={**spent, "copy_bytes_per_s": 3e12}, peak_gib=40.0),
        ttft_record("triangle-8-512-128", 131072, 8400.0, compile_s=33.0, peak_gib=41.5),
        ttft_record("dense", 131072, None, oom=True),
        ttft_record("dense", 4096, 300.0),
        ttft_record("triangle-4-32-64", 4096, None, failed="RuntimeError: no luck"),
        ttft_record("dense-causal+graphs", 4096, 200.0),
        ttft_record("triangle-8-512-128+graphs", 4096, 190.0),
    ]
    ttft.finish(records)
    return records
