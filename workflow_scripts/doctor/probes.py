"""What the libraries can do here, each asked in a process of its own, with JSON as its answer.

A broken library ends the process that imports it: an instruction this CPU has not, a driver that
hangs. So none is imported by the doctor itself.

python -m workflow_scripts.doctor.probes torch
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from workflow_scripts.doctor.finding import ask

# A first import from a network drive is slow; so is CUDA's start on eight GPUs.
SECONDS = 120
N_TOKENS, WIDTH = 64, 256


def answers_of(probe: str, question: object = None) -> dict[str, Any]:
    """Ask in a process of its own; `error` says why there is no answer.

    Args:
        question: JSON, for the probes that take one.
    """
    command = [sys.executable, "-m", __name__, probe]
    answer = ask(command, seconds=SECONDS, stdin=json.dumps(question))
    if answer.code == 0:
        # Libraries print what they like before.
        return json.loads(answer.output.splitlines()[-1])
    if answer.code is not None and answer.code < 0:
        return {"error": f"the process was ended by signal {-answer.code}"}
    return {"error": (answer.error.splitlines() or ["no message"])[-1]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("probe", choices=PROBES)
    probe = PROBES[parser.parse_args(argv).probe]
    print(json.dumps(probe(json.loads(sys.stdin.read() or "null"))))


def probe_torch(_: object = None) -> dict[str, Any]:
    """PyTorch's CUDA and devices; 16-bit products, packed attention and 4-bit weights tried."""
    import torch

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_error": None if has_gpu else _error_of(torch.cuda.init),
        "n_threads": torch.get_num_threads(),
        "devices": [_device(number) for number in range(torch.cuda.device_count() * has_gpu)],
        "has_bf16": has_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        "attention": _tried(lambda: attention_error(device)),
        "bitsandbytes": _tried(lambda: four_bit_error(device)),
    }


def _device(number: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    return {
        "name": torch.cuda.get_device_name(number),
        "capability": list(torch.cuda.get_device_capability(number)),
        "free_bytes": free,
        "total_bytes": total,
    }


def attention_error(device: Any) -> dict[str, Any]:
    """The packed attention of training, with a window, against a masked product of it all.

    Returns:
        `kernel`: what ran; `error`: largest difference, of outputs of about 1.
    """
    import torch
    from torch import nn

    from workflow_scripts.train import attention

    generator = torch.Generator().manual_seed(0)
    is_fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    dtype = torch.bfloat16 if is_fast else torch.float32
    shapes = ((1, 4, N_TOKENS, 64), (1, 2, N_TOKENS, 64), (1, 2, N_TOKENS, 64))
    query, key, value = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
    )
    ends = torch.tensor([0, 24, N_TOKENS], dtype=torch.int32, device=device)
    window = 8
    found, _ = attention.packed_attention(
        nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=0.125,
        cu_seq_lens_q=ends,
        max_length_q=40,
        sliding_window=window,
    )
    position = torch.arange(N_TOKENS, device=device)
    document = position >= 24
    back = position[:, None] - position
    visible = (back >= 0) & (back < window) & (document[:, None] == document)
    keys, values = (part.float().repeat_interleave(2, dim=1) for part in (key, value))
    scores = (query.float() @ keys.transpose(-1, -2) * 0.125).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    return {
        "kernel": "varlen_attn" if is_fast else "SDPA, a document at a time",
        "error": float((found.float() - expected).abs().max()),
    }


def four_bit_error(device: Any) -> dict[str, Any]:
    """bitsandbytes' product with NF4 weights on the device, against the weights in full.

    Returns:
        `version`; `error`: of all outputs, root mean square ÷ that of the outputs.
    """
    import bitsandbytes
    import torch
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
    return {"version": bitsandbytes.__version__, "error": float(error)}


def probe_llama_cpp(_: object = None) -> dict[str, Any]:
    """How llama.cpp was built, and what of the CPU it uses."""
    import llama_cpp

    from workflow_scripts.export import llama_cpp_source

    system = llama_cpp.llama_print_system_info().decode()
    return {
        "version": llama_cpp.__version__,
        "offloads": bool(llama_cpp.llama_supports_gpu_offload()),
        "system": system,
        "converter_error": _error_of(llama_cpp_source.converter),
    }


def probe_memory(question: Any) -> dict[str, Any]:
    """What training a run takes: the least of all layouts, and the fastest that fits.

    Args:
        question: facts, recipe, training, row_tokens, n_gpus, device_type, available_bytes
            (None: unknown).
    Returns:
        least_bytes that must be free, of one GPU; `refusal` where nothing fits.
    """
    from workflow_scripts.log import StageError
    from workflow_scripts.settings import RecipeSettings, TrainingSettings
    from workflow_scripts.train.memory import fit, layouts
    from workflow_scripts.train.memory.shape import PlannedRun

    run = PlannedRun(
        question["facts"],
        RecipeSettings.model_validate(question["recipe"]),
        TrainingSettings.model_validate(question["training"]),
        row_tokens=question["row_tokens"],
        device_type=question["device_type"],
        n_gpus=question["n_gpus"],
    )
    least = min(candidate.peak for candidate in layouts.candidates(run)) / (1 - fit.MARGIN)
    available = question["available_bytes"]
    answer = {"least_bytes": round(least), "refusal": None, "peak_bytes": None}
    if available is not None:
        try:
            _, parts = fit.choose(run, available_bytes=available)
            answer["peak_bytes"] = parts["peak"]
        except StageError as error:
            answer["refusal"] = str(error.parts["to fix"]).splitlines()[0]
    return answer


def _error_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:  # whatever a library says is the answer
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _tried(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a measurement found, or what it ended with."""
    try:
        return measure()
    except Exception as error:  # as above
        return {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}


PROBES = {"torch": probe_torch, "llama_cpp": probe_llama_cpp, "memory": probe_memory}


if __name__ == "__main__":
    main()
