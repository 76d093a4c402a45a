"""A tiny Mixtral with random weights: two layers, four experts, two experts per token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

N_EXPERTS = 4


def tiny_mixtral(*, seed: int = 0, **config: Any) -> Any:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": N_EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # so that the router prefers some experts
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**{**shape, **config}))


def save_mixtral(folder: Path, **config: Any) -> Path:
    tiny_mixtral(**config).save_pretrained(folder)
    return folder
