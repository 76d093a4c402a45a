"""AWQ weights: packed in four bits, with a scale and a zero point per group of inputs.

The layout is AutoAWQ's `gemm`, which other projects' kernels read. transformers 5 reads it only
with gptqmodel, whose requirements conflict with ours. So a packed model is measured with
dequantized weights; a kernel differs from that by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from workflow_scripts.log import StageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BITS = 4
# Place of each of eight neighbouring outputs in a 32-bit word, in units of four bits.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
PACKED = ("qweight", "qzeros", "scales")


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Unpack 4-bit numbers from 32-bit words.

    Args:
        words: (rows, outputs / 8) int32.
    Returns:
        (rows, outputs) int32, 0 to 15.
    Source: AutoAWQ, awq/utils/packing_utils.py.
    """
    shifts = torch.tensor(PLACES, dtype=torch.int32, device=words.device) * BITS
    # A right shift fills with the sign bit; the mask removes it.
    return ((words[:, :, None] >> shifts) & (2**BITS - 1)).flatten(1)


def dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantize packed weights: scale · (number − zero), exact in float32.

    Args:
        qweight: (inputs, outputs / 8) int32.
        qzeros: (groups, outputs / 8) int32; a group is a run of neighbouring inputs.
        scales: (groups, outputs) float16.
    Returns:
        (outputs, inputs) float32, as in a linear layer.
    """
    numbers = unpack(qweight)
    group_size = numbers.shape[0] // scales.shape[0]
    zeros = unpack(qzeros).repeat_interleave(group_size, dim=0)
    return ((numbers - zeros) * scales.float().repeat_interleave(group_size, dim=0)).T.contiguous()


def precision(device: torch.device) -> Literal["float32", "float16"]:
    """Return the precision of AWQ's kernels on a GPU; on a CPU that of every link's scores."""
    return "float16" if device.type == "cuda" else "float32"


def tensors(shards: Sequence[Path], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a packed model, dequantized, under its original name.

    Args:
        dtype: dtype of the tensors; dequantized weights are rounded to it once.
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
    """Load a packed model with dequantized weights.

    Args:
        config: the model's config, with the window and positions to run it with.
    Raises:
        StageError: the layout is not AutoAWQ's `gemm`, or a weight is missing.
    """
    check_layout(config.quantization_config, shards[0].parent)
    del config.quantization_config
    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # skipped by no_init_weights
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name, tensor in tensors(shards, dtype):
        with torch.no_grad():
            parameters[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise StageError(
            "an AWQ model is incomplete",
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
        StageError: the layout is not AutoAWQ's `gemm` with zero points.
    """
    expected = {"bits": BITS, "version": "gemm", "zero_point": True}
    found = {key: quantization.get(key) for key in expected}
    if found != expected:
        raise StageError(
            "this AWQ layout is not supported",
            where=f"{folder / 'config.json'}, quantization_config",
            found=found,
            expected=expected,
        )
