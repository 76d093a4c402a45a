"""Facts of models that tests make or name."""

from __future__ import annotations

from pathlib import Path

from workflow_scripts import files
from workflow_scripts.handover.facts import Facts, FileFacts
from workflow_scripts.models.checkpoint_files import read_shape
from workflow_scripts.settings import RopeScalingSettings


def facts_of(checkpoint: Path, scaling: RopeScalingSettings | None = None) -> Facts:
    """Shape and weight files of a checkpoint that needs no tokenizer; said to be v3's."""
    found = {
        path.name: FileFacts(sha256=files.sha256(path), size_bytes=path.stat().st_size)
        for path in sorted(checkpoint.glob("*.safetensors"))
    }
    shape = read_shape(checkpoint, scaling).model_dump()
    return Facts(**shape, tokenizer_version="v3", files=found)


MISTRAL_7B = Facts(
    architecture="MistralForCausalLM",
    model_type="mistral",
    n_layers=32,
    hidden_size=4096,
    intermediate_size=14_336,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    vocabulary_size=32_768,
    context_tokens=32_768,
    sliding_window=4096,
    layer_windows=(4096,) * 32,
    rope_theta=10_000.0,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    n_experts=None,
    n_experts_per_token=None,
    ties_embeddings=False,
    dtype="bfloat16",
    tokenizer_version="v3",
    files={
        "config.json": FileFacts(size_bytes=600),
        "model.safetensors": FileFacts(size_bytes=14_496_078_512),
    },
)
"""Mistral 7B with the vocabulary of v0.3 and the window of v0.1."""
