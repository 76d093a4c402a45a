"""Weights packed as AWQ: four bits each, a scale and a zero for every group of inputs.

The layout is AutoAWQ's `gemm`, which the kernels of others read. Transformers 5 reads it with
gptqmodel alone, whose requirements are not ours; so what is measured here are the weights that the
packed ones stand for, multiplied out. A kernel differs from that by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open

from workflow_scripts.log import StageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BITS = 4
# Where in a word of 32 bits, four bits a place, each of eight neighbouring outputs lies.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
PACKED = ("qweight", "qzeros", "scales")


def unpack(words: torch.Tensor) -> torch.Tensor:
    """The numbers of 4 bits that are in words of 32.

    Args:
        words: (rows, outputs / 8) int32.
    Returns:
        (rows, outputs) int32, 0 to 15.
    Source: AutoAWQ, awq/utils/packing_utils.py.
    """
    shifts = torch.tensor(PLACES, dtype=torch.int32, device=words.device) * BITS
    # A shift to the right fills in the sign: the mask takes it off.
    return ((words[:, :, None] >> shifts) & (2**BITS - 1)).flatten(1)


def dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The matrix that packed weights stand for: scale · (number − zero), exact in float32.

    Args:
        qweight: (inputs, outputs / 8) int32.
        qzeros: (groups, outputs / 8) int32; groups are of neighbouring inputs.
        scales: (groups, outputs) float16.
    Returns:
        (outputs, inputs) float32, as a linear layer has it.
    """
    numbers = unpack(qweight)
    group_size = numbers.shape[0] // scales.shape[0]
    zeros = unpack(qzeros).repeat_interleave(group_size, dim=0)
    return ((numbers - zeros) * scales.float().repeat_interleave(group_size, dim=0)).T.contiguous()


def precision(device: torch.device) -> Literal["float32", "float16"]:
    """What AWQ's kernels compute in on a GPU; on a CPU what every link is scored in."""
    return "float16" if device.type == "cuda" else "float32"


def tensors(shards: Sequence[Path], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a packed model, under the names that it had before.

    Args:
        dtype: of what is returned; packed weights are rounded to it once.
    """
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                module, _, kind = name.rpartition(".")
                if kind == "qweight":
                    packed = (file.get_tensor(f"{module}.{part}") for part in PACKED)
                    yield f"{module}.weight", dequantize(*packed).to(dtype)
                elif kind not in PACKED:
                    yield name, file.get_tensor(name).to(dtype)


def load(
    config: PretrainedConfig,
    shards: Sequence[Path],
    *,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
) -> PreTrainedModel:
    """A packed model with its weights multiplied out.

    Args:
        config: of its config.json, as the model is to be run.
    Raises:
        StageError: it is packed in a way that is not read here, or a weight is missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    check_layout(config.quantization_config, shards[0].parent)
    del config.quantization_config
    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # which initialization would have done
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name, tensor in tensors(shards, dtype):
        with torch.no_grad():
            parameters[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise StageError(
            "a packed model is not whole",
            where=shards[0].parent,
            found=f"no {', '.join(sorted(missing)[:10])}",
            to_fix="quantize it again",
        )
    return model.eval()


def check_layout(quantization: dict[str, Any], folder: Path) -> None:  # untyped: transformers' JSON
    """
    Args:
        quantization: `quantization_config` of a config.json.
    Raises:
        StageError: it is not the layout that is read here.
    """
    expected = {"bits": BITS, "version": "gemm", "zero_point": True}
    found = {key: quantization.get(key) for key in expected}
    if found != expected:
        raise StageError(
            "the model is packed in a way that is not read here",
            where=f"{folder / 'config.json'}, quantization_config",
            found=found,
            expected=expected,
        )
