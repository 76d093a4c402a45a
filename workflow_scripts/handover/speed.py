"""Speed of a link, in the terms of llama-bench (`benchmark_inference`)."""

from __future__ import annotations

from typing import Literal

from workflow_scripts.handover.record import Record

Phase = Literal["prompt", "decode"]


class SpeedTest(Record):
    """One of llama-bench's tests: `pp128` reads a prompt of 128 tokens, `tg16` writes 16."""

    test: str
    depth_tokens: int
    """Tokens in the context before the test begins."""
    tokens_per_second: float
    standard_deviation_tokens_per_second: float | None
    """Over repetitions; None for a single one."""


class Conditions(Record):
    """Conditions of the measurement: engine, device, lengths."""

    engine: Literal["llama.cpp", "transformers"]
    device: str
    """`cpu`, or the name of a torch device."""
    machine: str
    """Architecture and number of CPUs."""
    n_threads: int
    prompt_tokens: int
    generated_tokens: int
    n_repetitions: int


class Times(Record):
    """Time of both phases; deviations are over repetitions, None for a single one."""

    prompt_milliseconds_per_token: float
    prompt_standard_deviation_milliseconds_per_token: float | None
    decode_milliseconds_per_token: float
    decode_standard_deviation_milliseconds_per_token: float | None
    first_token_milliseconds: float
    """From the prompt to the first token of the answer."""
    first_token_standard_deviation_milliseconds: float | None

    def of_token(self, phase: Phase) -> tuple[float, float | None]:
        """Milliseconds per token of a phase, and their standard deviation."""
        if phase == "prompt":
            return (
                self.prompt_milliseconds_per_token,
                self.prompt_standard_deviation_milliseconds_per_token,
            )
        return (
            self.decode_milliseconds_per_token,
            self.decode_standard_deviation_milliseconds_per_token,
        )


class Speed(Times, Conditions):
    """`{link}.inference.json`: speed and memory of one link on this machine."""

    tests: tuple[SpeedTest, ...]
    size_bytes: int | None
    """The link's weights on the disk; None for a base that is quantized as it is loaded."""
    peak_memory_bytes: int
    """Memory of the GPU for a model on it, else resident memory of the process."""
