"""A checkpoint loaded as a transformers model, and the device and precision it runs with.

If config.json lacks `sliding_window`, `MistralConfig` assumes 4096. Here a missing key means no
window, so loading always sets the window explicitly.

torch and transformers are imported inside the functions: programs import this module for the names
of devices and precisions, and their --help must not wait for seconds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workflow_scripts import files
from workflow_scripts.handover.facts import RopeParameters
from workflow_scripts.log import DOCTOR, StageError
from workflow_scripts.models import exhaustion
from workflow_scripts.models.checkpoint_files import weight_files

if TYPE_CHECKING:
    from torch import device, dtype
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

Precision = Literal["float32", "bfloat16", "float16", "int8", "nf4"]
# Values of `CUDA_VISIBLE_DEVICES` in a job without a GPU; the last is Slurm's.
NO_GPUS = ("", "-1", "NoDevFiles")
# Device files of NVIDIA's driver on Linux and in the Windows Subsystem for Linux.
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


def default_device() -> device:
    """Return this process's CUDA device (torchrun sets `LOCAL_RANK`), else the CPU.

    Raises:
        StageError: the job was given a GPU that PyTorch, built for CUDA, cannot use. On a CPU the
            job would run for days without a message.
    """
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    has_driver = any(path.exists() for path in DRIVERS)
    if torch.version.cuda and has_driver and given not in NO_GPUS:
        raise StageError(
            "the job was given a GPU, but PyTorch cannot use it",
            where="CUDA_VISIBLE_DEVICES",
            found=f"{given}; torch {torch.__version__}",
            expected="a driver for that CUDA version, and a GPU number that nvidia-smi lists",
            to_fix=DOCTOR,
        )
    return torch.device("cpu")


def check_bitsandbytes(device: device) -> None:
    """
    Raises:
        StageError: bitsandbytes has no library for this kind of device.
    """
    from bitsandbytes.cextension import lib

    if device.type == "cuda" and not getattr(lib, "compiled_with_cuda", False):
        raise StageError(
            "bitsandbytes cannot quantize on this GPU",
            where="bitsandbytes",
            found="its CUDA library is not loaded",
            expected="a library for the CUDA version that PyTorch was built with",
            to_fix=DOCTOR,
        )


def bitsandbytes_config(precision: Precision, device: device) -> BitsAndBytesConfig | None:
    """Return transformers' settings for NF4 or int8; None for another precision."""
    from transformers import BitsAndBytesConfig

    if precision not in ("nf4", "int8"):
        return None
    check_bitsandbytes(device)
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(device),
    )


def load_model(
    checkpoint: Path,
    *,
    window: int | None,
    precision: Precision,
    rope: RopeParameters | None = None,
    attention: str = "sdpa",
    device: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model, on this process's GPU if there is one.

    A model packed by quantize_awq is loaded with dequantized weights (`awq_weights`).
    For NF4, a mixture's experts are quantized too. The cost: the whole model is first loaded into
    the CPU's memory in 16 bits (Mixtral 8x7B: 93 GB).

    Args:
        checkpoint: folder with config.json and safetensors.
        window: the model's sliding window (facts.json); None is full causal attention.
        precision: precision of weights and arithmetic; `nf4` and `int8` quantize the linear layers
            (bitsandbytes; NF4 with double quantization) and compute in `native_precision`.
        rope: `rope_parameters` of facts.json, if they differ from the checkpoint's.
        attention: transformers' name of the attention implementation.
        device: name of a torch device; None is `default_device()`.
    Raises:
        MemoryError, RuntimeError: the memory ran out (`exhaustion.exhausts_memory`).
    """
    import torch
    from transformers import AutoModelForCausalLM

    place = torch.device(device) if device else default_device()
    config = model_config(checkpoint, window=window, rope=rope)
    if is_packed(checkpoint):
        from workflow_scripts.models import awq_weights  # torch at its top

        if precision in ("int8", "nf4"):
            raise StageError(
                "an AWQ model cannot be quantized again",
                where=f"{checkpoint / 'config.json'}, quantization_config",
                found=f"precision {precision}",
                expected="native",
            )
        return awq_weights.load(
            config,
            weight_files(checkpoint),
            dtype=getattr(torch, precision),
            attention=attention,
            device=place,
        )
    quantization = bitsandbytes_config(precision, place)
    # In 16 bits a mixture's experts do not fit on a GPU: they are quantized and moved one by one.
    has_experts = precision == "nf4" and getattr(config, "num_local_experts", None) is not None
    loads_to = torch.device("cpu") if has_experts else place
    with exhaustion.of_loading():
        # Any: type checkers do not see the arguments of `to`, nor the types of a model's modules.
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            config=config,
            dtype=compute_dtype(place) if quantization else getattr(torch, precision),
            attn_implementation=attention,
            device_map={"": loads_to},
            quantization_config=quantization,
        )
    if has_experts:
        from workflow_scripts.models.experts import quantize_experts  # bitsandbytes at its top

        quantize_experts(model, place)
        model.to(place)
        model.hf_device_map = {"": place}  # for accelerate
    for layer in model.modules():
        # On CPUs with AVX512-BF16, one forward pass in eval mode makes bitsandbytes 0.50 repack a
        # layer for inference permanently: bfloat16 arithmetic, and no gradient through the layer.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def model_config(
    checkpoint: Path, *, window: int | None, rope: RopeParameters | None = None
) -> PreTrainedConfig:
    """Load transformers' config of a checkpoint, and set the window and positions of the facts.

    Args:
        window: keys a query sees; None is full causal attention.
        rope: `rope_parameters` of facts.json, if they differ from the checkpoint's.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    config.sliding_window = window
    if rope:
        config.rope_parameters = dict(rope)
        # transformers' YaRN and dynamic NTK fail on null, which Mistral's files have.
        if getattr(config, "head_dim", None) is None:
            config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def is_packed(checkpoint: Path) -> bool:
    """True if the weights are packed in 4 bits, as quantize_awq writes them."""
    quantization = files.read_json(checkpoint / "config.json").get("quantization_config") or {}
    return quantization.get("quant_method") == "awq"


def compute_dtype(device: device) -> dtype:
    """Return `native_precision` as a torch dtype."""
    import torch

    return getattr(torch, native_precision(device))


def native_precision(device: device) -> Literal["bfloat16", "float16", "float32"]:
    """Return bfloat16 on a GPU that supports it, float16 on another GPU, float32 on a CPU."""
    import torch

    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
