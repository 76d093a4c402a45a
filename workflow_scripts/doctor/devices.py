"""GPUs: what the driver says, what PyTorch can do with them, and llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workflow_scripts.doctor.finding import Finding, Status, ask
from workflow_scripts.doctor.probes import LlamaCpp, NoAnswer, Torch, Tried

SECONDS = 20  # the driver of eight sleeping GPUs takes several
# Of outputs of about 1: float32 is exact to 1e-6, bfloat16 has eight bits.
ATTENTION_TOLERANCE = 0.03
# NF4 moves products of normal weights by 9.1 %, measured; a broken kernel by 100 % or more.
FOUR_BIT_TOLERANCE = 0.15
FASTEST_CAPABILITY = (8, 0)
FROM_SOURCE = (
    " pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python"
    " llama-cpp-python=={version}"
)


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi lists it."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Driver:
    version: str
    cuda: tuple[int, ...]
    """Newest CUDA that it serves."""


def nvidia_smi() -> tuple[list[Gpu], Driver | None, str | None]:
    """GPUs and driver; why there are none, where nvidia-smi is there and fails."""
    fields = "name,compute_cap,memory.total,memory.free,driver_version"
    answer = ask(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], seconds=SECONDS
    )
    if answer.code != 0:
        said = (answer.output.strip() or answer.error).splitlines()
        failed = None if answer.error == "not installed" else (said or ["no message"])[0]
        return [], None, failed
    rows = [line.split(", ") for line in answer.output.splitlines() if line.count(", ") == 4]
    gpus = [
        Gpu(name, capability, _mebibytes(total), _mebibytes(free))
        for name, capability, total, free, _ in rows
    ]
    banner = ask(["nvidia-smi"], seconds=SECONDS).output
    cuda = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+(?:\.\d+)*)", banner)
    if not rows:
        return [], None, None
    return gpus, Driver(rows[0][4], _version(cuda[1] if cuda else "")), None


def seen_by(torch: Torch | NoAnswer) -> list[Gpu]:
    """As PyTorch lists them: containers may come without nvidia-smi."""
    if isinstance(torch, NoAnswer):
        return []
    return [
        Gpu(
            device.name,
            ".".join(map(str, device.capability)),
            device.total_bytes,
            device.free_bytes,
        )
        for device in torch.devices
    ]


def _mebibytes(text: str) -> int:
    """0 for what nvidia-smi does not know (`[N/A]`)."""
    return int(text) << 20 if text.isdigit() else 0


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text or "")))


def gpu_findings(
    gpus: Sequence[Gpu], failed: str | None, *, n_wanted: int | None, cluster_gpus: Sequence[str]
) -> Iterator[Finding]:
    """
    Args:
        failed: of `nvidia_smi`.
        n_wanted: GPUs that a job of the config's takes; None where the config is not known.
        cluster_gpus: those that Slurm offers.
    """
    expected = f"{n_wanted} NVIDIA GPU(s) (training.gpus)" if n_wanted else None
    if len(gpus) >= max(1, n_wanted or 0):
        yield Finding("GPU", "ok", "; ".join(map(_described, gpus)))
        return
    found = "; ".join(map(_described, gpus)) or failed or "none"
    if not n_wanted:
        status: Status = "warning" if failed else "ok"
        need = "" if n_wanted is None else "; the config needs none"
        yield Finding("GPU", status, found + need, None, "see nvidia-smi")
    elif cluster_gpus:
        yield Finding(
            "GPU",
            "warning",
            f"here: {found}; Slurm: {', '.join(cluster_gpus)}",
            expected,
            "snakemake --workflow-profile profiles/slurm",
        )
    else:
        yield Finding(
            "GPU",
            "missing",
            found,
            expected,
            "a machine with so many, or a cluster's (profiles/slurm); a CPU takes days for a 7B",
        )


def _described(gpu: Gpu) -> str:
    return (
        f"{gpu.name}, capability {gpu.capability},"
        f" {gpu.free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free"
    )


def torch_findings(
    torch: Torch | NoAnswer, driver: Driver | None, *, needs_gpu: bool, locked: str
) -> Iterator[Finding]:
    """
    Args:
        driver: None where nvidia-smi shows no GPU.
        locked: torch's version in the lock.
    """
    if isinstance(torch, NoAnswer):
        yield Finding(
            "PyTorch",
            "missing",
            torch.reason,
            f"torch {locked}",
            "python -m pip install -r requirements.lock",
        )
        return
    yield _cuda_finding(torch, driver, needs_gpu=needs_gpu, locked=locked)
    for device in torch.devices[:1]:
        dotted = ".".join(map(str, device.capability))
        is_fast = torch.has_bf16 and device.capability >= FASTEST_CAPABILITY
        yield Finding(
            "bfloat16",
            "ok" if is_fast else "warning",
            f"capability {dotted}" + ("" if is_fast else ": float16, attention without a kernel"),
            "8.0 (Ampere) or newer, for bfloat16 and the packed attention's kernel",
            "a newer GPU; this one works, slower",
        )
    yield _tried("attention", torch.attention, ATTENTION_TOLERANCE, torch.attention.how)
    four_bit = torch.bitsandbytes
    place = "on the GPU" if torch.devices else "on the CPU"
    what = f"bitsandbytes {four_bit.how} {place}"
    yield _tried("4-bit weights", four_bit, FOUR_BIT_TOLERANCE, what)


def _cuda_finding(torch: Torch, driver: Driver | None, *, needs_gpu: bool, locked: str) -> Finding:
    found = f"torch {torch.version}, "
    found += f"CUDA {torch.cuda}" if torch.cuda else "built without CUDA"
    if driver is None:
        # Nothing to hold it against; that the GPU is missing is said above.
        return Finding("PyTorch", "ok", found)
    newest = ".".join(map(str, driver.cuda)) or "unknown"
    found += f"; driver {driver.version}, for CUDA up to {newest}"
    status: Status = "missing" if needs_gpu else "warning"
    if torch.cuda is None:
        return Finding(
            "PyTorch",
            status,
            found,
            "a build with CUDA",
            f"pip install torch=={locked} --index-url https://download.pytorch.org/whl/cu130"
            + ("" if driver.cuda >= (13,) else ", with a driver for CUDA 13"),
        )
    # A driver serves every minor version of its CUDA, and all before.
    if driver.cuda and driver.cuda[:1] < _version(torch.cuda)[:1]:
        return Finding(
            "PyTorch",
            status,
            found,
            f"a driver for CUDA {torch.cuda}",
            "update NVIDIA's driver, or install a build of torch for an older CUDA",
        )
    if not torch.devices:
        return Finding(
            "PyTorch",
            status,
            f"{found}; it sees no GPU: {torch.cuda_error}",
            "torch.cuda.is_available()",
            "look at CUDA_VISIBLE_DEVICES, and at permissions of /dev/nvidia*",
        )
    return Finding("PyTorch", "ok", found)


def _tried(name: str, answer: Tried, tolerance: float, what: str) -> Finding:
    """A product that was computed, against its reference."""
    if answer.error is None:
        return Finding(
            name,
            "missing",
            answer.failure or "no message",
            "a small product on this device",
            "install the versions of requirements.lock; on a GPU torch's build must fit the driver",
        )
    return Finding(
        name,
        "ok" if answer.error <= tolerance else "missing",
        f"{what}, tried: error {answer.error:.1e}",
        f"at most {tolerance}",
        "install the versions of requirements.lock",
    )


def llama_cpp_findings(
    llama: LlamaCpp | NoAnswer, *, has_gpu: bool, locked: str
) -> Iterator[Finding]:
    """
    Args:
        has_gpu: nvidia-smi shows one.
    """
    build = FROM_SOURCE.format(version=locked)
    if isinstance(llama, NoAnswer):
        yield Finding("llama.cpp", "missing", llama.reason, None, f"build it here:{build}")
        return
    backend = "for the GPU" if llama.offloads else "for the CPU"
    # CPU : SSE3 = 1 | AVX2 = 1 | …
    features = re.findall(r"(\w+) = 1", llama.system.partition("CPU :")[2])
    known = [name for name in features if re.match("AVX|AMX|NEON|SVE|FMA", name)]
    needs_build = has_gpu and not llama.offloads
    yield Finding(
        "llama.cpp",
        "warning" if needs_build else "ok",
        f"{llama.version}, built {backend}, with {' '.join(known) or 'no CPU features'}",
        "built for the GPU: GGUFs are scored and timed on the CPU else",
        f'CMAKE_ARGS="-DGGML_CUDA=on"{build}',
    )
    if llama.converter_error:
        yield Finding(
            "llama.cpp's converter",
            "missing",
            llama.converter_error,
            "its source beside the environment",
            "python -m workflow_scripts.quantize.fetch_llama_cpp",
        )
