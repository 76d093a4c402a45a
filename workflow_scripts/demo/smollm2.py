"""SmolLM2-135M-Instruct, read from its GGUF: weights with transformers' names, shape and tokenizer.

`tokenizers` builds the tokenizer from the tokens and merges in the GGUF. It splits digits one by
one, then merges bytes, as the published `tokenizer.json` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from workflow_scripts.models.gguf_file import GgufFile

# llama.cpp's name for a tensor of a layer → transformers' name.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
END_OF_TEXT, BEGIN_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Smollm2:
    """The published model, dequantized."""

    weights: dict[str, torch.Tensor]
    """Name in transformers → float32; input embeddings and output layer are one tensor."""
    config: dict[str, Any]  # transformers'
    """Keyword arguments that `LlamaConfig` and `MistralConfig` share."""
    tokenizer: Tokenizer


def read(gguf: Path) -> Smollm2:
    """
    Raises:
        StageError: not a GGUF file, or one with other quantization types.
    """
    file = GgufFile(gguf)
    shape = {
        key.removeprefix("llama."): value
        for key, value in file.metadata.items()
        if key.startswith("llama.")
    }
    n_heads, n_kv_heads = shape["attention.head_count"], shape["attention.head_count_kv"]
    weights = {}
    for name in file.tensors:
        values = file.read(name)
        kind = name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):
            values = halves_apart(values, n_heads if kind == "attn_q" else n_kv_heads)
        weights[transformers_name(name)] = torch.from_numpy(values)
    config = {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["embedding_length"],
        "intermediate_size": shape["feed_forward_length"],
        "num_hidden_layers": shape["block_count"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": shape["embedding_length"] // n_heads,
        "max_position_embeddings": shape["context_length"],
        "rms_norm_eps": 1e-5,  # stored as float32: 9.999999747378752e-06
        "rope_parameters": {"rope_type": "default", "rope_theta": shape["rope.freq_base"]},
    }
    return Smollm2(weights, config, _tokenizer(file.metadata))


def transformers_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if name.startswith("blk."):
        _, layer, kind, _ = name.split(".")
        return f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"
    return {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }[name]


def halves_apart(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Return the rows of a query or key projection in transformers' order.

    llama.cpp rotates neighbouring dimensions of a head, transformers those half a head apart.
    """
    pairs = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(metadata: Any) -> Tokenizer:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer
