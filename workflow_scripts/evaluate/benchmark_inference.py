"""Speed, memory and size of one link, alone on the machine, in llama-bench's terms.

`pp`: reading a prompt; `tg`: writing tokens one by one after an empty context. Random tokens, as
speed does not depend on which; one pass to warm up, then repetitions whose mean and standard
deviation are kept.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts import files, log
from workflow_scripts.evaluate import links
from workflow_scripts.scoring.pieces import comparable_tokens
from workflow_scripts.settings import InferenceSettings, settings_from_json

if TYPE_CHECKING:
    import numpy as np

OUTPUT_VERSION = 1
logger = log.stage_logger("benchmark_inference")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    links.add_arguments(parser)
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.inference`")
    parser.add_argument("--speed", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(InferenceSettings, arguments.settings)

    import numpy as np

    facts = files.read_json(arguments.facts)
    context = comparable_tokens(facts, None)
    n_prompt = min(settings.prompt_tokens, context)
    n_generated = min(settings.generated_tokens, context)
    tokens = np.random.default_rng(0).integers(
        low=0, high=facts["vocabulary_size"], size=max(n_prompt, n_generated), dtype=np.int32
    )
    if arguments.gguf:
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        size_bytes = arguments.gguf.stat().st_size
        engine, device = "llama.cpp", "cpu"
        with LlamaCppModel(
            arguments.gguf, context_tokens=context, n_threads=arguments.threads
        ) as model:
            seconds = measure(
                lambda: read_gguf(model, tokens[:n_prompt]),
                lambda: write_gguf(model, tokens[:n_generated]),
                settings.repetitions,
            )
    else:
        from workflow_scripts.models.checkpoint import weight_files

        size_bytes = sum(path.stat().st_size for path in weight_files(arguments.checkpoint))
        scorer = links.load_transformers(arguments, facts)
        engine, device = "transformers", str(scorer.model.device)
        seconds = measure(
            lambda: run_transformers(scorer.model, tokens[:n_prompt], tokens_at_once=n_prompt),
            lambda: run_transformers(scorer.model, tokens[:n_generated], tokens_at_once=1),
            settings.repetitions,
        )
    report: dict[str, Any] = {
        "engine": engine,
        "device": device,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "n_threads": arguments.threads,
        "prompt_tokens": n_prompt,
        "generated_tokens": n_generated,
        "n_repetitions": settings.repetitions,
    }
    for phase, n_tokens in (("prompt", n_prompt), ("decode", n_generated)):
        rates = [1000 * duration / n_tokens for duration in seconds[phase]]
        report[f"{phase}_milliseconds_per_token"] = statistics.mean(rates)
        report[f"{phase}_standard_deviation_milliseconds_per_token"] = (
            statistics.stdev(rates) if len(rates) > 1 else None
        )
    report["size_bytes"] = size_bytes
    report["peak_memory_bytes"] = peak_memory_bytes(device)
    files.write_json(arguments.speed, report)
    logger.info("measured %s", log.fields(report))


def measure(
    read_prompt: Callable[[], None], write_tokens: Callable[[], None], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each repetition of both phases, interleaved, after one pass of each."""
    seconds: dict[str, list[float]] = {"prompt": [], "decode": []}
    phases = {"prompt": read_prompt, "decode": write_tokens}
    for repetition in range(repetitions + 1):
        for phase, run in phases.items():
            started = time.perf_counter()
            run()
            if repetition:
                seconds[phase].append(time.perf_counter() - started)
    return seconds


def read_gguf(model: Any, tokens: np.ndarray) -> None:
    """Prompt processing: only the last token's logits are wanted."""
    import numpy as np

    from workflow_scripts.scoring.llama_cpp_model import BATCH_TOKENS

    model.forget()
    wants_logits = np.zeros(len(tokens), dtype=bool)
    wants_logits[-1] = True
    for first in range(0, len(tokens), BATCH_TOKENS):
        stretch = slice(first, first + BATCH_TOKENS)
        model.decode(tokens[stretch], first=first, wants_logits=wants_logits[stretch])


def write_gguf(model: Any, tokens: np.ndarray) -> None:
    """Decoding: a token at a time, each one's logits read."""
    import numpy as np

    model.forget()
    for at in range(len(tokens)):
        model.decode(tokens[at : at + 1], first=at, wants_logits=np.ones(1, dtype=bool))


def run_transformers(model: Any, tokens: np.ndarray, *, tokens_at_once: int) -> None:
    """Both phases: so many tokens a forward pass, with a key-value cache, the last one's logits."""
    import torch

    with torch.inference_mode():
        flat = torch.from_numpy(tokens.astype("int64"))[None].to(model.device)
        cache = None
        for stretch in flat.split(tokens_at_once, dim=1):
            output = model(stretch, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
        if model.device.type == "cuda":
            torch.cuda.synchronize()


def peak_memory_bytes(device: str) -> int:
    """Most memory taken: of the GPU for a model on it, else of this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
