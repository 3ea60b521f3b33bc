"""Weights that are not the checkpoint's own: adapters of single requests, and quantised ones."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from tests_vllm.support import NEW_TOKENS, TOP, Answer, Engine, Oracle, check, prompts

RANK, SCALE = 4, 2.0
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def make_adapter(model: str, folder: Path) -> str:
    """Save an adapter of a model in the form of PEFT, and beside it the model with the adapter merged; its folder."""
    merged = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(1)
    tensors = {}
    for name, weight in merged.named_parameters():
        module = name.removesuffix(".weight")
        if not module.endswith(ADAPTED):
            continue
        a, b = torch.randn(RANK, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], RANK) * 0.1
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        weight.data += SCALE * (b @ a)
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK * SCALE,
        "target_modules": sorted(name.rpartition(".")[2] for name in ADAPTED),
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    merged.save_pretrained(folder / "merged")
    return str(adapter)


def test_adapters_of_single_requests(model: str, oracle: Oracle, tmp_path: Path) -> None:
    """Apart from requests without one, which vLLM's CPU build gets wrong in one batch with them."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("one", 1, make_adapter(model, tmp_path))
    changed = Oracle(str(tmp_path / "merged"))
    engine = Engine(model, enable_lora=True, max_lora_rank=8, max_num_batched_tokens=128)
    parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=TOP, ignore_eos=True, detokenize=False)
    for lora, names in ((None, ("long", "short")), (adapter, ("long", "short", "middle"))):
        asked: list[Any] = [{"prompt_token_ids": prompts()[name]} for name in names]
        results = engine.llm.generate(asked, parameters, use_tqdm=False, lora_request=lora)
        for name, result in zip(names, results, strict=True):
            (output,) = result.outputs
            tops = [{token: each.logprob for token, each in step.items()} for step in output.logprobs]
            check(oracle if lora is None else changed, name, Answer(list(output.token_ids), tops))
    engine.close()


def off_by(mine: Answer, theirs: Answer) -> float:
    """The mean difference of the prompt's own log-probabilities."""
    assert mine.prompt is not None
    assert theirs.prompt is not None
    return statistics.fmean(abs(x - y) for x, y in zip(mine.prompt, theirs.prompt, strict=True))


def make_int8(model: str, folder: Path) -> None:
    """Save a model with weights of eight bits, and scales for their rows; and as ``plain`` what these stand for."""
    plain = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    state = dict(plain.state_dict())
    for name, weight in plain.named_parameters():
        if "proj" not in name:
            continue
        scale = weight.data.abs().amax(1, keepdim=True) / 127
        whole = (weight.data / scale).round().clamp(-127, 127)
        weight.data = whole * scale
        state[name], state[f"{name}_scale"] = whole.to(torch.int8), scale
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    plain.save_pretrained(folder / "plain")
    plain.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "int8").mkdir()
    plain.config.save_pretrained(folder / "int8")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "int8" / "model.safetensors")


def test_weights_of_eight_bits(model: str, tmp_path: Path) -> None:
    """As far from the oracle as a prompt is that stays dense, whose activations are rounded too; and far from dense."""
    make_int8(model, tmp_path)
    oracle = Oracle(str(tmp_path / "plain"))
    engine = Engine(str(tmp_path / "int8"), dtype="bfloat16")
    names = ("long", "middle", "short")
    answers, _ = engine.ask([prompts()[name] for name in names], prompt=True)
    rounding = off_by(answers[-1], oracle.answer(prompts()["short"]))
    for name, answer in zip(names[:2], answers, strict=False):
        assert off_by(answer, oracle.answer(prompts()[name])) < 2 * rounding
        assert off_by(answer, oracle.answer(prompts()[name], ())) > 3 * rounding
    engine.close()
