"""What the libraries can do here, each asked in a process of its own, with JSON as its answer.

A broken library ends the process that imports it: an instruction this CPU has not, a driver that
hangs. So none is imported by the doctor itself.

python -m workflow_scripts.doctor.probes torch
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from workflow_scripts.doctor.finding import ask

if TYPE_CHECKING:
    import torch

# A first import from a network drive is slow; so is CUDA's start on eight GPUs.
SECONDS = 120
N_TOKENS, WIDTH = 64, 256


@dataclass(frozen=True)
class NoAnswer:
    """Why a process gave none."""

    reason: str


@dataclass(frozen=True)
class Tried:
    """A product that was computed, against its reference."""

    error: float | None = None
    """None where it failed."""
    how: str = ""
    """The kernel that ran, or the library's version."""
    failure: str | None = None


@dataclass(frozen=True)
class Device:
    """A GPU as PyTorch lists it."""

    name: str
    capability: tuple[int, ...]
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Torch:
    """PyTorch, and what it computed."""

    version: str
    cuda: str | None
    """CUDA that it was built for."""
    cuda_error: str | None
    devices: tuple[Device, ...]
    has_bf16: bool
    attention: Tried
    """Error: largest difference, of outputs of about 1."""
    bitsandbytes: Tried
    """Error: root mean square of the difference ÷ that of the outputs."""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's build."""

    version: str
    offloads: bool
    """Whether it can compute on a GPU."""
    system: str
    """Features of the CPU that it uses."""
    converter_error: str | None


@dataclass(frozen=True)
class Memory:
    """What training a run takes of each GPU."""

    least_bytes: int
    """Least of all layouts that must be free."""
    peak_bytes: int | None = None
    """Of the fastest layout that fits; None where none does, or the memory is not known."""
    refusal: str | None = None
    """Why nothing fits."""


class MemoryQuestion(TypedDict):
    """A run, and the memory there is. Tables and shape are dumps of their records."""

    shape: object
    recipe: object
    training: object
    row_tokens: int
    n_gpus: int
    device_type: Literal["cuda", "cpu"]
    available_bytes: int | None
    """None: not known."""


def ask_torch() -> Torch | NoAnswer:
    answer = _ask("torch")
    if isinstance(answer, NoAnswer):
        return answer
    devices = tuple(
        Device(**{**device, "capability": tuple(device["capability"])})
        for device in answer["devices"]
    )
    tried = {key: Tried(**answer[key]) for key in ("attention", "bitsandbytes")}
    return Torch(**{**answer, **tried, "devices": devices})


def ask_llama_cpp() -> LlamaCpp | NoAnswer:
    answer = _ask("llama_cpp")
    return answer if isinstance(answer, NoAnswer) else LlamaCpp(**answer)


def ask_memory(question: MemoryQuestion) -> Memory | NoAnswer:
    answer = _ask("memory", question)
    return answer if isinstance(answer, NoAnswer) else Memory(**answer)


def _ask(
    probe: str, question: MemoryQuestion | None = None
) -> dict[str, Any] | NoAnswer:  # untyped: JSON of one of the classes above
    """Ask in a process of its own."""
    command = [sys.executable, "-m", __name__, probe]
    answer = ask(command, seconds=SECONDS, stdin=json.dumps(question))
    if answer.code == 0:
        # Libraries print what they like before.
        content: dict[str, Any] = json.loads(answer.output.splitlines()[-1])
        return content
    if answer.code is not None and answer.code < 0:
        return NoAnswer(f"the process was ended by signal {-answer.code}")
    return NoAnswer((answer.error.splitlines() or ["no message"])[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("probe", choices=[*PROBES, "memory"])
    name = parser.parse_args(argv).probe
    question = json.loads(sys.stdin.read() or "null")
    answer = probe_memory(question) if name == "memory" else PROBES[name]()
    print(json.dumps(asdict(answer)))


def probe_torch() -> Torch:
    """PyTorch's CUDA and devices; 16-bit products, packed attention and 4-bit weights tried."""
    import torch

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    return Torch(
        version=torch.__version__,
        cuda=torch.version.cuda,
        cuda_error=None if has_gpu else _error_of(torch.cuda.init),
        devices=tuple(_device(number) for number in range(torch.cuda.device_count() * has_gpu)),
        has_bf16=has_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        attention=_tried(lambda: attention_error(device)),
        bitsandbytes=_tried(lambda: four_bit_error(device)),
    )


def _device(number: int) -> Device:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    return Device(
        name=torch.cuda.get_device_name(number),
        capability=torch.cuda.get_device_capability(number),
        free_bytes=free,
        total_bytes=total,
    )


def attention_error(device: torch.device) -> Tried:
    """The packed attention of training, with a window, against a masked product of it all."""
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
    kernel = "varlen_attn" if is_fast else "SDPA, a document at a time"
    return Tried(float((found.float() - expected).abs().max()), kernel)


def four_bit_error(device: torch.device) -> Tried:
    """bitsandbytes' product with NF4 weights on the device, against the weights in full."""
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
    return Tried(float(error), bitsandbytes.__version__)


def probe_llama_cpp() -> LlamaCpp:
    """How llama.cpp was built, and what of the CPU it uses."""
    import llama_cpp

    from workflow_scripts.quantize import llama_cpp_source

    system = llama_cpp.llama_print_system_info().decode()
    return LlamaCpp(
        version=llama_cpp.__version__,
        offloads=bool(llama_cpp.llama_supports_gpu_offload()),
        system=system,
        converter_error=_error_of(llama_cpp_source.converter),
    )


def probe_memory(question: MemoryQuestion) -> Memory:
    """What training a run takes: the least of all layouts, and the fastest that fits."""
    from workflow_scripts.handover.facts import ModelShape
    from workflow_scripts.log import StageError
    from workflow_scripts.settings import RecipeSettings, TrainingSettings
    from workflow_scripts.train.memory import fit
    from workflow_scripts.train.memory.layouts import Layouts
    from workflow_scripts.train.memory.shape import PlannedRun

    layouts = Layouts.of(
        PlannedRun(
            ModelShape.model_validate(question["shape"]),
            RecipeSettings.model_validate(question["recipe"]),
            TrainingSettings.model_validate(question["training"]),
            row_tokens=question["row_tokens"],
            device_type=question["device_type"],
            n_gpus=question["n_gpus"],
        )
    )
    least = layouts.smallest.peak / (1 - fit.MARGIN)
    available = question["available_bytes"]
    if available is None:
        return Memory(round(least))
    try:
        chosen = fit.choose(layouts, available_bytes=available)
    except StageError as error:
        refusal = str(error.parts["to fix"]).splitlines()[0]
        return Memory(round(least), refusal=refusal)
    return Memory(round(least), peak_bytes=chosen.peak)


def _error_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:  # whatever a library says is the answer
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _tried(measure: Callable[[], Tried]) -> Tried:
    """What a measurement found, or what it ended with."""
    try:
        return measure()
    except Exception as error:  # as above
        return Tried(failure=f"{type(error).__name__}: {error}".splitlines()[0])


PROBES: Mapping[str, Callable[[], Torch | LlamaCpp]] = {
    "torch": probe_torch,
    "llama_cpp": probe_llama_cpp,
}


if __name__ == "__main__":
    main()
