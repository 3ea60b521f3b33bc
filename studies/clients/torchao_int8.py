"""torchao: ``quantize_`` to int8 weights, then compile as ever."""

from __future__ import annotations

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from studies.clients.common import CHANGE, CONFIG, TOLERANCE, Result, attentions, compared, main, prompt, qwen3
from tmx_compile import tmx_backend


def quantised(kind: type) -> Result:
    model = qwen3()
    quantize_(model, kind())
    backend = tmx_backend(CONFIG, model=model, strict=True)
    model.compile(backend=backend)
    with torch.no_grad():
        # A rounded activation may fall to the other side.
        rounded = kind is Int8DynamicActivationInt8WeightConfig
        tolerance, change = (5e-2, 10) if rounded else (TOLERANCE, CHANGE)
        call = lambda: model(prompt()).logits  # noqa: E731
        return compared(call, backend, attentions(model), tolerance=tolerance, change=change)


if __name__ == "__main__":
    main(
        "torchao",
        {
            "int8 weights": lambda: quantised(Int8WeightOnlyConfig),
            "int8 weights and activations": lambda: quantised(Int8DynamicActivationInt8WeightConfig),
        },
    )
