"""Ask PyTorch and llama.cpp, in separate processes, what they can do on this machine.

A broken library can end the process that imports it: an instruction that this CPU lacks, a driver
that hangs. So the doctor does not import these libraries itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from workflow_scripts.doctor.finding import ask

# A first import from a network drive is slow; so is CUDA's start on eight GPUs.
SECONDS = 120


@dataclass(frozen=True)
class NoAnswer:
    """Why a process gave no answer."""

    reason: str


@dataclass(frozen=True)
class Tried:
    """A product that was computed and compared with its reference."""

    error: float | None = None
    """None if it failed."""
    how: str = ""
    """The kernel that ran, or the library's version."""
    failure: str | None = None


@dataclass(frozen=True)
class Device:
    """A GPU that PyTorch can use."""

    name: str
    capability: str
    """CUDA compute capability: `8.6`."""
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Torch:
    """PyTorch, as `torch.utils.collect_env` reports it, and what it computed."""

    version: str
    cuda: str | None
    """The CUDA version that PyTorch was built for."""
    cuda_error: str | None
    """Why PyTorch cannot use a GPU, in its own words."""
    driver: str | None
    """Version of NVIDIA's driver."""
    gpu_models: list[str]
    """The GPUs that the driver lists, usable by PyTorch or not."""
    devices: list[Device]
    is_fast: bool
    """The GPU has bfloat16 and runs the kernel of the packed attention."""
    attention: Tried
    """Error: the largest difference between outputs of about 1."""
    four_bit: Tried
    """Error: root mean square of the difference ÷ that of the outputs."""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's build."""

    version: str
    offloads: bool
    """True if it can compute on a GPU."""
    system: str
    """The CPU features that it uses."""
    converter_error: str | None


def ask_torch() -> Torch | NoAnswer:
    answer = _ask("torch_probe")
    if isinstance(answer, NoAnswer):
        return answer
    devices = [Device(**device) for device in answer.pop("devices")]
    attention, four_bit = (Tried(**answer.pop(name)) for name in ("attention", "four_bit"))
    return Torch(**answer, devices=devices, attention=attention, four_bit=four_bit)


def ask_llama_cpp() -> LlamaCpp | NoAnswer:
    answer = _ask("llama_cpp_probe")
    return answer if isinstance(answer, NoAnswer) else LlamaCpp(**answer)


def _ask(module: str) -> dict[str, Any] | NoAnswer:  # untyped: JSON of one of the classes above
    """Run a module of this room that prints an answer, and read it."""
    command = [sys.executable, "-m", f"workflow_scripts.doctor.{module}"]
    done = ask(command, seconds=SECONDS)
    if done.returncode < 0:
        return NoAnswer(f"the process was ended by signal {-done.returncode}")
    if done.returncode:
        return NoAnswer((done.stderr.splitlines() or ["no message"])[-1])
    # Libraries may print before the answer.
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


def tell(answer: Torch | LlamaCpp) -> None:
    """Print the answer of a probe for `_ask` to read."""
    print(json.dumps(asdict(answer)))


def error_of(call: Callable[[], object]) -> str | None:
    """The message of the exception that a call raises; None if it succeeds."""
    try:
        call()
    except Exception as error:  # whatever a library raises is the answer
        return message(error)
    return None


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
