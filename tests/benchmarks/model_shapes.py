"""Shapes of models that the benchmarks measure on, with random weights or with none."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from workflow_scripts import files
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.models.checkpoint_files import read_shape

COMMON = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a config.json says of each.
CONFIGS: dict[str, dict[str, Any]] = {
    "toy": {
        **COMMON,
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": 32,
    },
    "demo": {
        **COMMON,
        "vocab_size": 32_768,
        "hidden_size": 256,
        "intermediate_size": 1_024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4_096,
        "sliding_window": 512,
    },
    # v0.1, the one with a window.
    "mistral-7b": {
        **COMMON,
        "vocab_size": 32_000,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "sliding_window": 4_096,
    },
}


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The shape of a checkpoint with this config."""
    with tempfile.TemporaryDirectory() as folder:
        files.write_json(Path(folder) / "config.json", config)
        return read_shape(Path(folder))


def bare_facts(config: dict[str, Any], *, tokenizer_version: str = "v3") -> Facts:
    """Facts of a checkpoint with this config, without the hashes of its files."""
    shape = shape_of(config).model_dump()
    return Facts(**shape, tokenizer_version=tokenizer_version, files={})
