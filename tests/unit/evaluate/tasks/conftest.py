"""Models whose scores in a task are known. These tests need lm-evaluation-harness (`make
test-tasks`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from workflow_scripts.quantize import convert_gguf


class Model(NamedTuple):
    checkpoint: Path
    gguf: Path


@pytest.fixture(scope="session")
def known_model(chain, make_checkpoint, tmp_path_factory):
    """`known_model(is_copying)`: no layer adds to the embedding of the last token, so a model
    repeats it, or gives all tokens the same probability."""

    def make(*, is_copying: bool) -> Model:
        from safetensors.torch import load_file, save_file

        folder = tmp_path_factory.mktemp("known")
        checkpoint = make_checkpoint(
            folder / "checkpoint",
            vocab_size=32_768,
            sliding_window=300,
            tie_word_embeddings=is_copying,
        )
        weights = load_file(checkpoint / "model.safetensors")
        for name, tensor in weights.items():
            if "o_proj" in name or "down_proj" in name or "lm_head" in name:
                tensor.zero_()
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
        shutil.copyfile(chain.tokenizer / "tokenizer.model.v3", checkpoint / "tokenizer.model.v3")
        gguf = folder / "known-F16.gguf"
        convert_gguf.main(
            ["--merged", str(checkpoint), "--tokenizer", str(chain.tokenizer)]
            + ["--facts", str(chain.facts), "--name", "known", "--gguf", str(gguf)]
        )
        return Model(checkpoint, gguf)

    return make


@pytest.fixture(scope="session")
def copying(known_model) -> Model:
    return known_model(is_copying=True)


@pytest.fixture(scope="session")
def uniform(known_model) -> Model:
    return known_model(is_copying=False)
