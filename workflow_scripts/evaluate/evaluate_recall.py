"""Recall of a fact by length of the prompt and depth of the fact: what is left of a text once it
lies windows back?

Each prompt costs one forward pass over itself and the right answer. The greedy answer is right
where at every token of it the likeliest is the right one; its negative log-likelihood tells also
of a model that answers nothing exactly.

python -m workflow_scripts.evaluate.evaluate_recall --checkpoint checkpoint/ --adapter adapter/
    --precision nf4 --facts facts.json --tokenizer tokenizer/ --chats clean/validation.parquet
    --settings '{"n_prompts": 20}' --scores recall.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_scripts import files, log
from workflow_scripts.data.recall import CHANCE_NATS
from workflow_scripts.data.rendering import Renderer
from workflow_scripts.evaluate import links
from workflow_scripts.evaluate.needles import Needle, NeedlePrompts, default_lengths, haystack
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.scoring.pieces import Piece
from workflow_scripts.settings import RecallSettings, settings_from_json

if TYPE_CHECKING:
    from workflow_scripts.scoring.likelihood import LogitModel

OUTPUT_VERSION = 1
NORMAL_95 = 1.959964
logger = log.stage_logger("evaluate_recall")


class Answer(NamedTuple):
    """What a model made of one prompt."""

    is_exact: bool
    """Greedy decoding would give the right answer, and end there."""
    nats: float
    """Negative log-likelihood of the right answer, without its EOS."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    links.add_transformers_arguments(parser)
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--chats", type=Path, required=True, help="held-out conversations: Parquet")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.recall`")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(RecallSettings, arguments.settings)
    facts = files.read_json(arguments.facts)
    lengths = settings.lengths_tokens or default_lengths(
        facts["sliding_window"], facts["context_tokens"]
    )
    if max(lengths) > facts["context_tokens"]:
        raise log.StageError(
            "a recall prompt is longer than the model's context",
            where="evaluation.recall.lengths_tokens",
            found=max(lengths),
            expected=f"at most {facts['context_tokens']} ({arguments.facts})",
        )
    chats = files.read_parquet(arguments.chats, columns=["messages"])["messages"]
    prompts = NeedlePrompts(
        haystack(message for chat in chats.to_pylist() for message in chat),
        Renderer(load_mistral_tokenizer(arguments.tokenizer, for_training=True)),
        seed=settings.seed,
    )

    started = time.perf_counter()
    model = links.load_transformers(arguments, facts)
    # The longest first, so that what cannot be made stops at once.
    cells = [
        (length, depth) for length in sorted(lengths, reverse=True) for depth in settings.depths
    ]
    measured = []
    for length, depth in log.progress(cells, logger, total=len(cells), unit="cells"):
        needles = [
            prompts.make(number, length_tokens=length, depth_fraction=depth)
            for number in range(settings.n_prompts)
        ]
        answers = [answer(model, needle) for needle in needles]
        measured.append({"length_tokens": length, "depth_fraction": depth, **summarize(answers)})
    report = {
        "precision": links.measured_precision(arguments.precision),
        "sliding_window": facts["sliding_window"],
        "chance_nats_per_answer": CHANCE_NATS,
        "cells": sorted(measured, key=lambda cell: (cell["length_tokens"], cell["depth_fraction"])),
        "duration_seconds": time.perf_counter() - started,
    }
    files.write_json(arguments.scores, report)
    logger.info("scored n_prompts=%d %s", len(cells) * settings.n_prompts, log.fields(report))


def answer(model: LogitModel, needle: Needle) -> Answer:
    """One forward pass, the right answer given: as long as every likeliest token is the right one,
    greedy decoding sees the same tokens."""
    import numpy as np
    import torch

    from workflow_scripts.scoring.likelihood import all_logits

    start, end = needle.answer
    logits = all_logits(model, Piece(0, needle.input_ids, np.arange(start, end)))
    right = torch.from_numpy(needle.input_ids[start:end].astype(np.int64))
    nats = torch.nn.functional.cross_entropy(logits, right, reduction="none").double()
    return Answer(bool((logits.argmax(dim=-1) == right).all()), float(nats[:-1].sum()))


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """Exact answers with their Wilson interval, and the mean cost of an answer."""
    n = len(answers)
    n_exact = sum(one.is_exact for one in answers)
    low, high = wilson_interval(n_exact, n)
    nats = [one.nats for one in answers]
    return {
        "n_prompts": n,
        "n_exact": n_exact,
        "exact_fraction": n_exact / n,
        "exact_low_fraction": low,
        "exact_high_fraction": high,
        "nats_per_answer": statistics.mean(nats),
        "standard_error_nats_per_answer": statistics.stdev(nats) / math.sqrt(n) if n > 1 else None,
    }


def wilson_interval(n_right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): honest for few trials, and at none and all."""
    share, z2 = n_right / n, NORMAL_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # The ends of 0 and 1 are these numbers exactly, but for rounding.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
