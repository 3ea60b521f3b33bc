"""Tiny models of real classes and what becomes of them in the process with torch_npu (see ``standin``).

Both processes build the same weights from the same seed, so that only geometry and lengths travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from tmx_compile import TriangleMixConfig

VOCABULARY = 128


@dataclass(frozen=True)
class Model:
    """A model: 4 heads, 2 key heads, head dim 16.

    The weights are larger than Hugging Face's own, so that attention is far from uniform and a wrong key shows.
    """

    family: str
    dtype: torch.dtype
    layers: int = 2
    attention: str = "sdpa"

    def build(self) -> torch.nn.Module:
        """A fresh copy."""
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.family}Config")(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
            initializer_range=0.15,
        )
        config._attn_implementation = self.attention
        return getattr(transformers, f"{self.family}ForCausalLM")(config).eval().to(self.dtype)


class Logits(torch.nn.Module):
    """The logits of a prompt without a cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    """Token numbers that depend on the length alone."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def padding(length: int) -> torch.Tensor:
    """An attention mask for two sequences: one with a third of padding on the left, one with a fifth on the right."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, : length // 3] = 0
    mask[1, length - length // 5 :] = 0
    return mask


def geometry(
    sink: int, window: int, last: int, layers: tuple[int, ...] = (0, 1), shortest: int = 0
) -> TriangleMixConfig:
    """A configuration; prompts of at most ``shortest`` tokens stay dense."""
    return TriangleMixConfig(
        num_sink_tokens=sink,
        sliding_window_size=window,
        num_last_tokens=last,
        triangle_layer_indices=list(layers),
        min_seq_len=shortest,
    )


class Table(torch.nn.Module):
    """The smallest model with weights and a length in its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, 16)
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(ids) + torch.arange(ids.shape[1])[:, None])


def table_export(folder: Any, dynamic: bool) -> tuple[bytes, torch.Tensor]:
    """torchair's own export of a :class:`Table` from a prompt of 37 tokens, and what the model gives for it."""
    from tests.support.ascend.standin import capture

    table = Table().eval()
    with torch.no_grad():
        return capture.exported(table, prompt(37), folder=folder, dynamic=dynamic), table(prompt(37))


def dense_export(model: Model, length: int, folder: Any) -> bytes:
    """torchair's own export for one length, without ``tmx_compile``."""
    from tests.support.ascend.standin import capture

    return capture.exported(Logits(model.build()), prompt(length), folder=folder)


def dense_compiled(model: Model, lengths: tuple[int, ...]) -> tuple[list[torch.Tensor], int]:
    """Logits through torchair's GE mode, run by the interpreter with the weights as inputs; number of graphs."""
    import torchair

    from tests.support.ascend.ge.run import execute
    from tests.support.ascend.standin import capture

    with torch.no_grad(), capture.engine(execute) as models:
        compiled = torch.compile(Logits(model.build()), backend=torchair.get_npu_backend(), dynamic=True)
        return [compiled(prompt(length)) for length in lengths], len(models)


def exported(
    model: Model, config: TriangleMixConfig, length: int, folder: Any, dynamic: bool = True, padded: bool = False
) -> bytes:
    """``tmx_compile.export``; every sparse layer must have become one. A padded model takes an attention mask too."""
    from tests.support.ascend.standin import capture
    from tmx_compile import export

    inputs = (prompt(length, 2), padding(length)) if padded else (prompt(length),)
    program = Logits(model.build())
    report = export(program, *inputs, config=config, export_path=folder, dynamic=dynamic, strict=True)
    decided = [site.layer for site in report if site.decision == "triangle"]
    assert decided == sorted(config.layers()), [str(site) for site in report]
    return capture.air(folder)


def compiled(model: Model, config: TriangleMixConfig, lengths: tuple[int, ...]) -> tuple[list[torch.Tensor], int]:
    """Logits through ``tmx_backend(target="ascend")`` in GE mode, run by the interpreter; number of graphs."""
    from tests.support.ascend.ge.run import execute
    from tests.support.ascend.standin import capture
    from tmx_compile import tmx_backend

    backend = tmx_backend(config, target="ascend", strict=True)
    with torch.no_grad(), capture.engine(execute) as models:
        program = torch.compile(Logits(model.build()), backend=backend)
        return [program(prompt(length)) for length in lengths], len(models)
