"""A model on disk, for the commands."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.support.models import stored_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its tokenizer and a text of 420 words."""
    folder = tmp_path_factory.mktemp("model")
    words = {f"w{i}": i for i in range(128)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    stored_model().save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(f"w{i * i % 127}" for i in range(420)), encoding="utf-8")
    (folder / "empty.txt").write_text(" \n", encoding="utf-8")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\xff")
    return folder
