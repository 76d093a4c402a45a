"""Quantized GGUFs, and texts cut into chunks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.unit.conftest import TEXT_WORDS
from workflow_scripts.evaluate import chunk_text
from workflow_scripts.quantize import convert_gguf, quantize_gguf


class Texts(NamedTuple):
    """An F16 GGUF, and a text, raw and in chunks of 256 tokens."""

    gguf: Path
    text: Path
    chunks: Path


@pytest.fixture(scope="session")
def quantize(tmp_path_factory) -> Callable[[Path, str], Path]:
    """`quantize(gguf, "Q4_K_M")`: a GGUF quantized from an F16 one."""
    folder = tmp_path_factory.mktemp("quantized")

    @cache
    def make(gguf: Path, kind: str) -> Path:
        path = folder / f"{gguf.stem}-{kind}.gguf"
        quantize_gguf.main(
            ["--gguf", str(gguf), "--settings", f'{{"type": "{kind}"}}']
            + ["--threads", "1", "--quantized", str(path)]
        )
        return path

    return make


@pytest.fixture(scope="session")
def chunk(chain, tmp_path_factory) -> Callable[[Path], Path]:
    """`chunk(text)`: a text in chunks of 256 tokens, as documents."""

    @cache
    def make(text: Path) -> Path:
        path = tmp_path_factory.mktemp("chunks") / f"{text.stem}.arrow"
        chunk_text.main(
            ["--text", str(text), "--tokenizer", str(chain.tokenizer)]
            + ["--facts", str(chain.facts), "--settings", '{"text_context_tokens": 256}']
            + ["--tokens", str(path)]
        )
        return path

    return make


@pytest.fixture(scope="session")
def peaked(chain, make_checkpoint, chunk, tmp_path_factory) -> Texts:
    """A model that expects to read the same token again (its output layer is its embeddings), and a
    text that repeats most words: some tokens are likely, and some are not."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("peaked")
    checkpoint = make_checkpoint(
        folder / "checkpoint", vocab_size=32_768, sliding_window=300, tie_word_embeddings=True
    )
    weights = load_file(checkpoint / "model.safetensors")
    for name, tensor in weights.items():
        if "o_proj" in name or "down_proj" in name:
            tensor *= 0.1  # the last token read stays the largest part of the hidden state
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    shutil.copyfile(chain.tokenizer / "tokenizer.model.v3", checkpoint / "tokenizer.model.v3")
    gguf = folder / "peaked-F16.gguf"
    convert_gguf.main(
        ["--merged", str(checkpoint), "--tokenizer", str(chain.tokenizer)]
        + ["--facts", str(chain.facts), "--name", "peaked", "--gguf", str(gguf)]
    )
    generator = np.random.default_rng(4)
    words = generator.choice(TEXT_WORDS, size=1200)
    text = folder / "repeated.txt"
    text.write_text(" ".join(np.repeat(words, generator.integers(1, 6, size=1200))) + "\n")
    return Texts(gguf, text, chunk(text))
