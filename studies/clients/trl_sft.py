"""TRL: ``SFTTrainer`` with gradient checkpointing, for one step of plain descent; the weights are compared."""

from __future__ import annotations

import copy
import tempfile

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from studies.clients.common import CONFIG, Result, attentions, compared, main, prompt, qwen3, tokenizer
from tmx_compile import tmx_backend


def train() -> Result:
    model = qwen3()
    start = copy.deepcopy(model.state_dict())
    backend = tmx_backend(CONFIG, model=model, strict=True)
    model.compile(backend=backend)
    data = Dataset.from_dict({"input_ids": prompt(2).tolist()})

    def steps() -> torch.Tensor:
        model.load_state_dict(start)
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                output_dir=folder,
                max_steps=1,
                per_device_train_batch_size=2,
                gradient_checkpointing=True,
                max_length=None,
                optim="sgd",
                learning_rate=1.0,
                max_grad_norm=0.0,
                lr_scheduler_type="constant",
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            )
            SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer()).train()
        return torch.cat([(weight - start[name]).flatten() for name, weight in model.named_parameters()])

    return compared(steps, backend, attentions(model))


if __name__ == "__main__":
    main("trl", {"`SFTTrainer`, gradient checkpointing": train})
