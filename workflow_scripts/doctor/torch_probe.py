"""PyTorch and its devices, with packed attention and 4-bit weights tried; printed for `probes`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils import collect_env

from workflow_scripts.doctor.probes import Device, Torch, Tried, error_of, message, tell

FASTEST_CAPABILITY = (8, 0)
N_TOKENS, WIDTH = 64, 256


def probe() -> Torch:
    environment = collect_env.get_env_info()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    return Torch(
        version=torch.__version__,
        cuda=torch.version.cuda,
        cuda_error=None if has_gpu else error_of(torch.cuda.init),
        driver=environment.nvidia_driver_version,
        gpu_models=(environment.nvidia_gpu_models or "").splitlines(),
        devices=[_device(number) for number in range(torch.cuda.device_count() * has_gpu)],
        is_fast=has_gpu and _is_fast(device),
        attention=_tried(lambda: attention_error(device)),
        four_bit=_tried(lambda: four_bit_error(device)),
    )


def _device(number: int) -> Device:
    free, total = torch.cuda.mem_get_info(number)
    capability = ".".join(map(str, torch.cuda.get_device_capability(number)))
    return Device(torch.cuda.get_device_name(number), capability, free, total)


def _is_fast(device: torch.device) -> bool:
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return has_bf16 and torch.cuda.get_device_capability(device) >= FASTEST_CAPABILITY


def attention_error(device: torch.device) -> Tried:
    """The packed attention of training, with a window, compared with attention under a dense
    mask."""
    from workflow_scripts.train import attention  # an import error is an answer

    generator = torch.Generator().manual_seed(0)
    is_fast = device.type == "cuda" and _is_fast(device)
    dtype = torch.bfloat16 if is_fast else torch.float32
    shapes = ((1, 4, N_TOKENS, 64), (1, 2, N_TOKENS, 64), (1, 2, N_TOKENS, 64))
    query, key, value = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
    )
    window = 8
    found, _ = attention.packed_attention(
        nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=0.125,
        cu_seq_lens_q=torch.tensor([0, 24, N_TOKENS], dtype=torch.int32, device=device),
        max_length_q=40,
        sliding_window=window,
    )
    position = torch.arange(N_TOKENS, device=device)
    document = position >= 24
    back = position[:, None] - position
    visible = (back >= 0) & (back < window) & (document[:, None] == document)
    expected = nn.functional.scaled_dot_product_attention(
        query.float(),
        key.float(),
        value.float(),
        attn_mask=visible,
        scale=0.125,
        enable_gqa=True,
    ).transpose(1, 2)
    kernel = "varlen_attn" if is_fast else "SDPA, one document at a time"
    return Tried(float((found.float() - expected).abs().max()), kernel)


def four_bit_error(device: torch.device) -> Tried:
    """bitsandbytes' product with NF4 weights on the device, compared with the full weights."""
    import bitsandbytes  # an import error is an answer
    from bitsandbytes import functional

    from workflow_scripts.models.checkpoint import compute_dtype

    dtype = compute_dtype(device)
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (
        torch.randn((rows, WIDTH), generator=generator).to(device, dtype) for rows in (128, 16)
    )
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    product = bitsandbytes.matmul_4bit(inputs, packed.t(), state).float()
    expected = inputs.float() @ weight.float().T
    error = (product - expected).norm() / expected.norm()
    return Tried(float(error), bitsandbytes.__version__)


def _tried(measure: Callable[[], Tried]) -> Tried:
    """The result of a measurement, or the reason why it failed."""
    try:
        return measure()
    except Exception as error:  # whatever a library raises is the answer
        return Tried(failure=message(error))


if __name__ == "__main__":
    tell(probe())
