"""Recall of a fact by length of the prompt and depth of the fact: how much does a model remember of
text that is several windows back?

Each prompt costs one forward pass over the prompt and the right answer. The greedy answer is exact
if the likeliest token is the right one at every position of the answer. The negative log-likelihood
also tells models apart that answer nothing exactly.

python -m workflow_scripts.evaluate.evaluate_recall --checkpoint checkpoint/ --adapter adapter/
    --precision nf4 --facts facts.json --tokenizer tokenizer/ --chats clean/validation.parquet
    --settings '{"n_prompts": 20}' --scores recall.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.demo.recall import CHANCE_NATS
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.handover.context import RecallScores
from workflow_scripts.settings import RecallSettings

OUTPUT_VERSION = 2
logger = log.stage_logger("evaluate_recall")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--chats", type=Path, required=True, help="held-out conversations: Parquet")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    arguments, settings, link = link_arguments.parse(
        parser, argv, RecallSettings, "evaluation.recall", takes_gguf=False
    )

    from workflow_scripts.evaluate import links, long_prompts
    from workflow_scripts.evaluate.needles import NeedlePrompts, default_lengths, haystack
    from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
    from workflow_scripts.tokens.rendering import Renderer

    facts = link.facts
    lengths = settings.lengths_tokens or default_lengths(facts.sliding_window, facts.context_tokens)
    if max(lengths) > facts.context_tokens:
        raise log.StageError(
            "a recall prompt is longer than the model's context",
            where="evaluation.recall.lengths_tokens",
            found=max(lengths),
            expected=f"at most {facts.context_tokens} ({arguments.facts})",
        )
    chats = files.read_parquet(arguments.chats, columns=["messages"])["messages"]
    prompts = NeedlePrompts(
        haystack(message for chat in chats.to_pylist() for message in chat),
        Renderer(load_mistral_tokenizer(arguments.tokenizer, for_training=True)),
        seed=settings.seed,
    )

    started = time.perf_counter()
    # The longest first: a prompt that cannot be made stops the program at once.
    cells = [
        (length, depth) for length in sorted(lengths, reverse=True) for depth in settings.depths
    ]
    with links.loaded(link, facts.context_tokens) as model:
        measured = [
            long_prompts.ask(
                model,
                prompts,
                n_prompts=settings.n_prompts,
                length_tokens=length,
                depth_fraction=depth,
            )
            for length, depth in log.progress(cells, logger, total=len(cells), unit="cells")
        ]
    scores = RecallScores(
        precision=links.precision(link),
        sliding_window=facts.sliding_window,
        chance_nats_per_answer=CHANCE_NATS,
        cells=tuple(
            sorted(measured, key=lambda cell: (cell.length_tokens, cell.depth_fraction or 0))
        ),
        duration_seconds=time.perf_counter() - started,
    )
    scores.write(arguments.scores)
    n_prompts = len(cells) * settings.n_prompts
    logger.info("scored n_prompts=%d %s", n_prompts, log.fields(scores.content()))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
