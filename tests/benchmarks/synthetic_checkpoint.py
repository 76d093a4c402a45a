"""A checkpoint of any Mistral's shape on disk, its weights repeated noise, and an adapter for it.

Nothing here computes language: it is what a merge reads and writes, gigabytes in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workflow_scripts import files
from workflow_scripts.merge import safetensors_stream

STANDARD_DEVIATION = 0.02
NOISE_ELEMENTS = 2**20 + 7  # a block of weights never begins where it did before
GIGABYTE = 10**9
Shapes = dict[str, list[int]]


def tensor_shapes(config: dict[str, Any]) -> Shapes:
    """Name → shape of every weight of a Mistral, layer by layer.

    Args:
        config: content of a config.json.
    """
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden]}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in linear_shapes(hidden, ffn, kv).items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = [hidden]
    return shapes | {
        "model.norm.weight": [hidden],
        "lm_head.weight": [config["vocab_size"], hidden],
    }


def linear_shapes(hidden: int, ffn: int, kv: int) -> Shapes:
    """Of a layer, (out, in)."""
    return {
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [kv, hidden],
        "self_attn.v_proj": [kv, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [ffn, hidden],
        "mlp.up_proj": [ffn, hidden],
        "mlp.down_proj": [hidden, ffn],
    }


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    shard_bytes: int = 2 * GIGABYTE,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Path]:
    """Config, index, and shards as near to `shard_bytes` as whole tensors come.

    Returns:
        The shards.
    """
    folder.mkdir(parents=True)
    shapes = tensor_shapes(config)
    shards: list[list[str]] = [[]]
    n_bytes = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and n_bytes + size > shard_bytes:
            shards.append([])
            n_bytes = 0
        shards[-1].append(name)
        n_bytes += size
    noise = torch.empty(NOISE_ELEMENTS)
    noise.normal_(std=STANDARD_DEVIATION, generator=torch.Generator().manual_seed(0))
    noise = noise.to(dtype)
    weight_map, paths = {}, []
    for number, names in enumerate(shards):
        path = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        safetensors_stream.write(
            path,
            {name: (shapes[name], dtype) for name in names},
            lambda name: _rows(shapes[name], noise),
        )
        weight_map |= dict.fromkeys(names, path.name)
        paths.append(path)
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write_json(folder / "model.safetensors.index.json", index)
    name = str(dtype).removeprefix("torch.")
    files.write_json(folder / "config.json", {**config, "dtype": name})
    return paths


def _rows(shape: list[int], noise: torch.Tensor) -> Iterator[torch.Tensor]:
    if len(shape) == 1:
        yield torch.ones(shape, dtype=noise.dtype)
        return
    n_rows, n_columns = shape
    step = min(n_rows, max(1, len(noise) // n_columns))
    for first in range(0, n_rows, step):
        n = min(step, n_rows - first)
        yield noise[: n * n_columns].view(n, n_columns)


def write_adapter(folder: Path, config: dict[str, Any], *, rank: int) -> Path:
    """LoRA on every linear layer, as PEFT saves it; no matrix of it zero."""
    from peft import LoraConfig

    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    linear = linear_shapes(hidden, ffn, kv)
    targets = [name.rpartition(".")[2] for name in linear]
    LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=targets
    ).save_pretrained(str(folder))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (n_out, n_in) in linear.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            for matrix, shape in (("lora_A", (rank, n_in)), ("lora_B", (n_out, rank))):
                noise = torch.empty(shape).normal_(std=0.01, generator=generator)
                tensors[f"{stem}.{matrix}.weight"] = noise
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
