"""GPUs, PyTorch and llama.cpp: which GPUs there are, and what the libraries can do with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from workflow_scripts.doctor.finding import Finding, Status
from workflow_scripts.doctor.probes import LlamaCpp, NoAnswer, Torch, Tried

# For outputs of about 1: float32 is exact to 1e-6, bfloat16 has eight bits.
ATTENTION_TOLERANCE = 0.03
# NF4 changes products of normal weights by 9.1 %, measured; a broken kernel by 100 % or more.
FOUR_BIT_TOLERANCE = 0.15
FROM_SOURCE = (
    " pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python"
    " llama-cpp-python=={version}"
)


def gpu_finding(
    torch: Torch | NoAnswer, *, n_wanted: int | None, cluster_gpus: Sequence[str]
) -> Finding:
    """Compare the GPUs that PyTorch can use with those that the config needs.

    Args:
        n_wanted: GPUs for one job of the config; None if the config is not known.
        cluster_gpus: the GPUs that Slurm offers.
    """
    devices = [] if isinstance(torch, NoAnswer) else torch.devices
    described = (
        f"{gpu.name}, capability {gpu.capability},"
        f" {gpu.free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free"
        for gpu in devices
    )
    found = "; ".join(described) or "none that PyTorch can use"
    if len(devices) >= max(1, n_wanted or 0):
        return Finding("GPU", "ok", found)
    if not n_wanted:
        need = "" if n_wanted is None else "; the config needs none"
        return Finding("GPU", "ok", found + need)
    status: Status = "missing"
    to_fix = "a machine with that many, or a cluster (profiles/slurm); a CPU takes days for a 7B"
    if cluster_gpus:
        status, found = "warning", f"here: {found}; Slurm: {', '.join(cluster_gpus)}"
        to_fix = "snakemake --workflow-profile profiles/slurm"
    return Finding("GPU", status, found, f"{n_wanted} NVIDIA GPU(s) (training.gpus)", to_fix)


def torch_findings(torch: Torch | NoAnswer, *, needs_gpu: bool, locked: str) -> Iterator[Finding]:
    """Findings about PyTorch, its kernels, and 4-bit weights.

    Args:
        locked: torch's version in the lock file.
    """
    if isinstance(torch, NoAnswer):
        install = "python -m pip install -r requirements.lock"
        yield Finding("PyTorch", "missing", torch.reason, f"torch {locked}", install)
        return
    yield _cuda_finding(torch, needs_gpu=needs_gpu, locked=locked)
    if torch.devices:
        slow = "" if torch.is_fast else ": float16, attention without a kernel"
        yield Finding(
            "bfloat16",
            "ok" if torch.is_fast else "warning",
            f"capability {torch.devices[0].capability}{slow}",
            "8.0 (Ampere) or newer, for bfloat16 and the packed attention's kernel",
            "a newer GPU; this one works, but slower",
        )
    four_bit = f"bitsandbytes {torch.four_bit.how} on the {'GPU' if torch.devices else 'CPU'}"
    yield _tried("attention", torch.attention, ATTENTION_TOLERANCE, torch.attention.how)
    yield _tried("4-bit weights", torch.four_bit, FOUR_BIT_TOLERANCE, four_bit)


def _cuda_finding(torch: Torch, *, needs_gpu: bool, locked: str) -> Finding:
    found = f"torch {torch.version}, "
    found += f"CUDA {torch.cuda}" if torch.cuda else "built without CUDA"
    if torch.driver:
        found += f", driver {torch.driver}"
    if torch.devices or not torch.gpu_models:
        return Finding("PyTorch", "ok", found)
    install = f"pip install torch=={locked} --index-url https://download.pytorch.org/whl/cu130"
    return Finding(
        "PyTorch",
        "missing" if needs_gpu else "warning",
        f"{found}; it cannot use {'; '.join(torch.gpu_models)}: {torch.cuda_error}",
        "torch.cuda.is_available()",
        f"{install} (needs a driver for CUDA 13)"
        if torch.cuda is None
        else "a driver that is new enough for this CUDA; CUDA_VISIBLE_DEVICES and permissions of"
        " /dev/nvidia*; `python -m torch.utils.collect_env` lists all versions",
    )


def _tried(name: str, answer: Tried, tolerance: float, what: str) -> Finding:
    """A product that was computed and compared with its reference."""
    to_fix = "install the versions of requirements.lock"
    if answer.error is None:
        return Finding(
            name,
            "missing",
            answer.failure or "no message",
            "a small product on this device",
            f"{to_fix}; on a GPU torch's build must fit the driver",
        )
    return Finding(
        name,
        "ok" if answer.error <= tolerance else "missing",
        f"{what}, tried: error {answer.error:.1e}",
        f"at most {tolerance}",
        to_fix,
    )


def llama_cpp_findings(
    llama: LlamaCpp | NoAnswer, *, has_gpu: bool, locked: str
) -> Iterator[Finding]:
    """Findings about llama.cpp's build and its converter.

    Args:
        has_gpu: NVIDIA's driver lists a GPU.
        locked: llama-cpp-python's version in the lock file.
    """
    build = FROM_SOURCE.format(version=locked)
    if isinstance(llama, NoAnswer):
        yield Finding("llama.cpp", "missing", llama.reason, None, f"build it here:{build}")
        return
    backend = "for the GPU" if llama.offloads else "for the CPU"
    # CPU : SSE3 = 1 | AVX2 = 1 | …
    features = re.findall(r"((?:AVX|AMX|NEON|SVE|FMA)\w*) = 1", llama.system.partition("CPU :")[2])
    yield Finding(
        "llama.cpp",
        "warning" if has_gpu and not llama.offloads else "ok",
        f"{llama.version}, built {backend}, with {' '.join(features) or 'no CPU features'}",
        "built for the GPU; otherwise GGUFs are scored and timed on the CPU",
        f'CMAKE_ARGS="-DGGML_CUDA=on"{build}',
    )
    if llama.converter_error:
        yield Finding(
            "llama.cpp's converter",
            "missing",
            llama.converter_error,
            "its source next to the environment",
            "python -m workflow_scripts.quantize.fetch_llama_cpp",
        )
