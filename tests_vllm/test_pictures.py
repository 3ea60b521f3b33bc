"""A prompt with pictures: a random model with a tower for them, and its own processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from tests_vllm.support import BLOCK, SETTINGS, SHOWS, SIZES, TOLERANCE, VOCABULARY, Engine, Oracle, gap

SPECIAL = {"<image>": 2, "<fake_token_around_image>": 3, "<global-img>": 4, "<end_of_utterance>": 5}
SIDE, PATCH, SCALE = 56, 7, 2
TOKENS = (SIDE // PATCH // SCALE) ** 2  # of a picture, without the marks around it


def make_model_with_eyes(folder: Path) -> Idefics3Processor:
    """Save a random model that sees pictures, and the processor that prepares them."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    config = Idefics3Config(
        vision_config=vision, text_config={"model_type": "llama", **SIZES}, image_token_id=SPECIAL["<image>"],
        scale_factor=SCALE, pad_token_id=0,
    )  # fmt: skip
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    names = {number: name for name, number in SPECIAL.items()}
    words = Tokenizer(models.WordLevel({names.get(i, f"t{i}"): i for i in range(VOCABULARY)}, unk_token="t6"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t6", eos_token="t1", additional_special_tokens=list(SPECIAL)
    )
    size = {"longest_edge": SIDE}
    pixels = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=TOKENS)
    processor.save_pretrained(folder)
    return processor


def test_prompts_with_pictures(tmp_path: Path) -> None:
    """Rows of pictures stream like those of words, whole and in chunks that cut pictures in two."""
    processor = make_model_with_eyes(tmp_path / "model")
    numbers = np.random.default_rng(0)
    pictures = [Image.fromarray(numbers.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(3)]
    words = numbers.integers(10, VOCABULARY, 200).tolist()
    parts = [words[:30], words[30:100], words[100:110], words[110:]]
    text = "<image>".join(" ".join(f"t{i}" for i in part) for part in parts)
    prepared = processor(text=text, images=[pictures], return_tensors="pt")
    tokens = prepared["input_ids"][0].tolist()
    assert tokens.count(SPECIAL["<image>"]) == 3 * TOKENS
    pixels = {name: prepared[name] for name in ("pixel_values", "pixel_attention_mask")}
    pixels["pixel_values"] = pixels["pixel_values"].double()
    oracle = Oracle(str(tmp_path / "model"), pictures=pixels)
    want, dense = oracle.answer(tokens), oracle.answer(tokens, ())
    engine = Engine(str(tmp_path / "model"), skip_tokenizer_init=False, limit_mm_per_prompt={"image": 3})
    assert [site.decision for site in engine.active.counts.report] == ["dense", "triangle", "dense", "triangle"]
    asked: Any = {"prompt": text, "multi_modal_data": {"image": pictures}}
    for chunk in (512, 33):
        engine.llm.reset_prefix_cache()
        with engine.chunks_of(chunk):
            (answer,), _ = engine.ask([asked])
        assert answer.tokens == want.tokens
        assert gap(answer, want) < TOLERANCE
        assert gap(answer, dense) > SHOWS
    # A hit of the prefix cache covers pictures too, and no last rows.
    (answer,), (cached,) = engine.ask([asked])
    assert answer.tokens == want.tokens
    assert cached == (len(tokens) - SETTINGS["num_last_tokens"]) // BLOCK * BLOCK
    engine.close()
