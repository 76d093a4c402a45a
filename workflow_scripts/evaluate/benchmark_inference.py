"""Speed, memory and size of one link, alone on the machine, in llama-bench's terms.

`pp` reads a prompt, `tg` writes tokens one by one, and `@ d` does so after that many tokens of
context. The tokens are random, because speed does not depend on them. After one pass to warm up,
every test is repeated; the mean and the standard deviation are kept.

python -m workflow_scripts.evaluate.benchmark_inference --gguf run-Q4_K_M.gguf --facts facts.json
    --settings '{"repetitions": 3}' --threads 2 --speed Q4_K_M.inference.json
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.handover.speed import Phase, Speed
from workflow_scripts.settings import InferenceSettings

OUTPUT_VERSION = 3
logger = log.stage_logger("benchmark_inference")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--speed", type=Path, required=True, help="to write: JSON")
    arguments, settings, link = link_arguments.parse(
        parser, argv, InferenceSettings, "evaluation.inference"
    )

    import numpy as np

    from workflow_scripts.evaluate import inference_tests, links

    context_tokens = link.facts.served_context_tokens
    lengths: dict[Phase, int] = {
        "prompt": min(settings.prompt_tokens, context_tokens),
        "decode": min(settings.generated_tokens, context_tokens),
    }
    longest = max(lengths.values())
    depths = [depth for depth in settings.depths_tokens if depth + longest <= context_tokens] or [0]
    tokens = np.random.default_rng(0).integers(
        low=0, high=link.facts.vocabulary_size, size=context_tokens, dtype=np.int32
    )
    with links.loaded(link, context_tokens) as model:
        device = str(model.model.device) if model.engine == "transformers" else "cpu"
        tests = {
            (phase, depth): inference_tests.test_of(
                model, tokens[:depth], tokens[depth : depth + n_tokens], phase
            )
            for depth in depths
            for phase, n_tokens in lengths.items()
        }
        seconds = inference_tests.measure(tests, settings.repetitions)
    speed = Speed(
        engine="llama.cpp" if link.gguf else "transformers",
        device=device,
        machine=f"{platform.machine()}, {os.cpu_count()} CPUs",
        n_threads=link.n_threads,
        prompt_tokens=lengths["prompt"],
        generated_tokens=lengths["decode"],
        n_repetitions=settings.repetitions,
        **dict(inference_tests.summary(seconds, depths[0], lengths)),
        tests=tuple(
            inference_tests.llama_bench_row(phase, depth, lengths[phase], times)
            for (phase, depth), times in seconds.items()
        ),
        size_bytes=links.size_bytes(link),
        peak_memory_bytes=inference_tests.peak_memory_bytes(device),
    )
    speed.write(arguments.speed)
    logger.info("measured %s", log.fields({**speed.content(), "tests": len(speed.tests)}))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
