"""Tests of speed, timed: reading a prompt and writing tokens, by either engine."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from workflow_scripts.handover.speed import Phase, SpeedTest, Times

# Each engine is imported only for its own links: the memory that is measured of one must not
# include the other's, and PyTorch takes 185 MB.
if TYPE_CHECKING:
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
    from workflow_scripts.scoring.transformers_model import TransformersModel


class Test(NamedTuple):
    """A call that is timed, and what comes before it."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]
    """Receives what `prepare` returns."""


def test_of(
    model: LlamaCppModel | TransformersModel, before: np.ndarray, timed: np.ndarray, phase: Phase
) -> Test:
    """Return the test that runs tokens in one phase, after others that are not timed.

    Args:
        before: (depth,) integer.
        timed: (n,) integer.
    """
    at_once = len(timed) if phase == "prompt" else 1
    if model.engine == "llama.cpp":
        return Test(
            lambda: model.read(before),
            lambda _: run_llama_cpp(model, timed, tokens_at_once=at_once, first=len(before)),
        )
    return Test(
        lambda: run_transformers(model.model, before, tokens_at_once=len(before) or 1),
        lambda cache: run_transformers(model.model, timed, tokens_at_once=at_once, cache=cache),
    )


def measure(
    tests: Mapping[tuple[Phase, int], Test], repetitions: int
) -> dict[tuple[Phase, int], list[float]]:
    """Time every test in turn, `repetitions` times, after one pass of each; returns seconds."""
    seconds: dict[tuple[Phase, int], list[float]] = {key: [] for key in tests}
    for repetition in range(repetitions + 1):
        for key, test in tests.items():
            prepared = test.prepare()
            started = time.perf_counter()
            test.run(prepared)
            if repetition:
                seconds[key].append(time.perf_counter() - started)
    return seconds


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation; a single value has no deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def summary(
    seconds: Mapping[tuple[Phase, int], Sequence[float]], depth: int, lengths: Mapping[Phase, int]
) -> Times:
    """Return the time per token of both phases at one depth, and the time to the first token.

    Args:
        lengths: tokens of each phase.
    """
    (prompt, prompt_deviation), (decode, decode_deviation) = (
        mean_and_deviation([1000 * one / lengths[phase] for one in seconds[phase, depth]])
        for phase in ("prompt", "decode")
    )
    # Reading a prompt ends with the logits that the first token is drawn from.
    first, first_deviation = mean_and_deviation([1000 * one for one in seconds["prompt", depth]])
    return Times(
        prompt_milliseconds_per_token=prompt,
        prompt_standard_deviation_milliseconds_per_token=prompt_deviation,
        decode_milliseconds_per_token=decode,
        decode_standard_deviation_milliseconds_per_token=decode_deviation,
        first_token_milliseconds=first,
        first_token_standard_deviation_milliseconds=first_deviation,
    )


def llama_bench_row(phase: Phase, depth: int, n_tokens: int, seconds: Sequence[float]) -> SpeedTest:
    """Return tokens per second under llama-bench's name of the test, such as `pp512 @ d4096`."""
    mean, deviation = mean_and_deviation([n_tokens / duration for duration in seconds])
    name = f"{'pp' if phase == 'prompt' else 'tg'}{n_tokens}"
    return SpeedTest(
        test=f"{name} @ d{depth}" if depth else name,
        depth_tokens=depth,
        tokens_per_second=mean,
        standard_deviation_tokens_per_second=deviation,
    )


def run_llama_cpp(
    model: LlamaCppModel, tokens: np.ndarray, *, tokens_at_once: int, first: int = 0
) -> None:
    """Run tokens through llama.cpp, and compute the logits of the last token of each pass.

    Args:
        first: position of the first token, after those in the cache; 0 empties the cache.
    """
    for start in range(0, len(tokens), tokens_at_once):
        model.read(tokens[start : start + tokens_at_once], first=first + start)


def run_transformers(
    model: Any, tokens: np.ndarray, *, tokens_at_once: int, cache: Any = None
) -> Any:
    """Run tokens through transformers, with the logits of the last token of each forward pass.

    Args:
        cache: key-value cache of the tokens before.
    Returns:
        The cache of all tokens; None if there are none.
    """
    import torch

    with torch.inference_mode():
        flat = torch.from_numpy(tokens.astype("int64"))[None].to(model.device)
        for stretch in flat.split(tokens_at_once, dim=1) if len(tokens) else ():
            output = model(stretch, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    return cache


def peak_memory_bytes(device: str) -> int:
    """Peak memory of the GPU for a model on it, else of this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
