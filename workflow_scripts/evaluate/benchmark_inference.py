"""Speed, memory and size of one link, alone on the machine, in llama-bench's terms.

`pp`: reading a prompt; `tg`: writing tokens one by one; `-d`: after so many tokens of context.
Random tokens, as speed does not depend on which; one pass to warm up, then repetitions whose mean
and standard deviation are kept.

python -m workflow_scripts.evaluate.benchmark_inference --gguf run-Q4_K_M.gguf --facts facts.json
    --settings '{"repetitions": 3}' --threads 2 --speed Q4_K_M.inference.json
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_scripts import log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.speed import Phase, Speed, SpeedTest, Times
from workflow_scripts.scoring.pieces import comparable_tokens
from workflow_scripts.settings import InferenceSettings, settings_from_json

if TYPE_CHECKING:
    import numpy as np

    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

OUTPUT_VERSION = 3
logger = log.stage_logger("benchmark_inference")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    link_arguments.add_arguments(parser)
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.inference`")
    parser.add_argument("--speed", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(InferenceSettings, arguments.settings)

    import numpy as np

    facts = Facts.read(arguments.facts)
    context = comparable_tokens(facts, None)
    n_prompt = min(settings.prompt_tokens, context)
    n_generated = min(settings.generated_tokens, context)
    longest = max(n_prompt, n_generated)
    depths = [depth for depth in settings.depths_tokens if depth + longest <= context] or [0]
    tokens = np.random.default_rng(0).integers(
        low=0, high=facts.vocabulary_size, size=context, dtype=np.int32
    )

    lengths: dict[Phase, int] = {"prompt": n_prompt, "decode": n_generated}

    def tests_of(engine: Gguf | Transformers) -> dict[tuple[Phase, int], Test]:
        return {
            (phase, depth): engine.test(tokens, depth, n_tokens, is_prompt=phase == "prompt")
            for depth in depths
            for phase, n_tokens in lengths.items()
        }

    if arguments.gguf:
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        device = "cpu"
        with LlamaCppModel(
            arguments.gguf, context_tokens=context, n_threads=arguments.threads
        ) as model:
            seconds = measure(tests_of(Gguf(model)), settings.repetitions)
    else:
        scorer = link_arguments.load_transformers(arguments, facts)
        device = str(scorer.model.device)
        seconds = measure(tests_of(Transformers(scorer.model)), settings.repetitions)
    speed = Speed(
        engine="llama.cpp" if arguments.gguf else "transformers",
        device=device,
        machine=f"{platform.machine()}, {os.cpu_count()} CPUs",
        n_threads=arguments.threads,
        prompt_tokens=n_prompt,
        generated_tokens=n_generated,
        n_repetitions=settings.repetitions,
        **dict(summary(seconds, depths[0], lengths)),
        tests=tuple(
            llama_bench_row(phase, depth, lengths[phase], times)
            for (phase, depth), times in seconds.items()
        ),
        size_bytes=link_arguments.size_bytes(arguments),
        peak_memory_bytes=peak_memory_bytes(device),
    )
    speed.write(arguments.speed)
    logger.info("measured %s", log.fields({**speed.content(), "tests": len(speed.tests)}))


class Test(NamedTuple):
    """What is timed, and what comes before it."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]
    """Is handed what `prepare` returns."""


def measure(
    tests: Mapping[tuple[Phase, int], Test], repetitions: int
) -> dict[tuple[Phase, int], list[float]]:
    """Seconds of each repetition of each test, interleaved, after one pass of each."""
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
    """No deviation of a single repetition."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def summary(
    seconds: Mapping[tuple[Phase, int], Sequence[float]], depth: int, lengths: Mapping[Phase, int]
) -> Times:
    """Time a token of both phases at one depth, and time to the first token of an answer.

    Args:
        lengths: tokens of each phase.
    """

    def of_token(phase: Phase) -> tuple[float, float | None]:
        return mean_and_deviation(
            [1000 * duration / lengths[phase] for duration in seconds[phase, depth]]
        )

    prompt, prompt_deviation = of_token("prompt")
    decode, decode_deviation = of_token("decode")
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
    """As llama-bench names and counts it: `pp512 @ d4096`, tokens a second."""
    mean, deviation = mean_and_deviation([n_tokens / duration for duration in seconds])
    name = f"{'pp' if phase == 'prompt' else 'tg'}{n_tokens}"
    return SpeedTest(
        test=f"{name} @ d{depth}" if depth else name,
        depth_tokens=depth,
        tokens_per_second=mean,
        standard_deviation_tokens_per_second=deviation,
    )


class Gguf:
    """Tests of a GGUF, through llama.cpp."""

    def __init__(self, model: LlamaCppModel) -> None:
        self._model = model

    def test(self, tokens: np.ndarray, depth: int, n_tokens: int, *, is_prompt: bool) -> Test:
        """So many tokens after `depth` others: in batches, or one by one."""
        timed = tokens[depth : depth + n_tokens]
        run = read_gguf if is_prompt else write_gguf
        return Test(
            lambda: read_gguf(self._model, tokens[:depth]),
            lambda _: run(self._model, timed, first=depth),
        )


class Transformers:
    """Tests of a model that transformers holds."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def test(self, tokens: np.ndarray, depth: int, n_tokens: int, *, is_prompt: bool) -> Test:
        timed = tokens[depth : depth + n_tokens]
        at_once = n_tokens if is_prompt else 1
        return Test(
            lambda: run_transformers(self._model, tokens[:depth], tokens_at_once=depth or 1),
            lambda cache: run_transformers(self._model, timed, tokens_at_once=at_once, cache=cache),
        )


def read_gguf(model: LlamaCppModel, tokens: np.ndarray, *, first: int = 0) -> None:
    """Prompt processing: only the last token's logits are wanted.

    Args:
        first: position of the first token, after what is in the cache; 0 empties it.
    """
    import numpy as np

    from workflow_scripts.scoring.llama_cpp_model import BATCH_TOKENS

    if not first:
        model.forget()
    wants_logits = np.zeros(len(tokens), dtype=bool)
    wants_logits[-1:] = True
    for start in range(0, len(tokens), BATCH_TOKENS):
        stretch = slice(start, start + BATCH_TOKENS)
        model.decode(tokens[stretch], first=first + start, wants_logits=wants_logits[stretch])


def write_gguf(model: LlamaCppModel, tokens: np.ndarray, *, first: int = 0) -> None:
    """Decoding: a token at a time, each one's logits read."""
    import numpy as np

    if not first:
        model.forget()
    for at in range(len(tokens)):
        model.decode(tokens[at : at + 1], first=first + at, wants_logits=np.ones(1, dtype=bool))


def run_transformers(
    model: Any, tokens: np.ndarray, *, tokens_at_once: int, cache: Any = None
) -> Any:
    """Both phases: so many tokens a forward pass, with a key-value cache, the last one's logits.

    Args:
        cache: of the tokens before.
    Returns:
        The cache of all tokens; None of none.
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
    """Most memory taken: of the GPU for a model on it, else of this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
