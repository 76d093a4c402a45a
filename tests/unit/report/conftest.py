"""A small results tree, as the stages before the report write it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from workflow_scripts import files
from workflow_scripts.data.documents import Document
from workflow_scripts.report.plots import MEMORY_PARTS
from workflow_scripts.scoring.token_scores import TokenScores

GGUF_TYPES = ["F16", "Q4_K_M"]
PERPLEXITIES = {"adapter": 5.0, "merged": 5.05, "F16": 5.051, "Q4_K_M": 5.5}
RUNS = {
    name: {
        "model": "tiny",
        "dataset": "chats",
        "packing": packing,
        "recipe": name,
        "merged": None,
        "merge_base": "original",
    }
    for name, packing in (("generic", "joined"), ("mistral", "apart"))
}


class Results(NamedTuple):
    folder: Path
    runs: str
    """JSON, as the rule hands it."""


def scores(perplexity: float, **more: object) -> dict:
    counts = {"n_conversations": 12, "n_scored_tokens": 34_567}
    loss = {
        "loss_nats_per_token": math.log(perplexity),
        "loss_standard_error_nats_per_token": 0.01,
        "perplexity": perplexity,
    }
    return {
        "piece_tokens": 64,
        **counts,
        **loss,
        "by_position": [
            {"first_position": first, "last_position": last, **counts, **loss}
            for first, last in ((0, 255), (256, 511))
        ],
        "by_turn": [{"turn": turn, **counts, **loss} for turn in (1, 2)],
        "by_source": [{"source": "forum", **counts, **loss}],
        **more,
    }


HARDNESS = (0.5, -0.25, 0.0, -0.25)
"""Of four equally long conversations, whatever the link."""
CHANGES = (0.01, -0.02, 0.03, -0.02)
"""Of the same, where a link scores them a little differently from the one before."""


def token_scores(losses: Sequence[float], n_tokens: int = 10) -> TokenScores:
    """Scores of conversations of equally many tokens.

    Args:
        losses: of each, nats per token.
    """
    document = Document("", np.zeros(n_tokens + 1, np.int32), np.ones(n_tokens + 1, bool))
    return TokenScores.of(
        [dataclasses.replace(document, id=f"chat/{number}") for number in range(len(losses))],
        {number: np.full(n_tokens, loss) for number, loss in enumerate(losses)},
    )


def write_link(path: Path, perplexity: float, *, place: int, **more: object) -> None:
    """Scores of a link and of its tokens.

    Args:
        place: in the chain: even ones differ from odd ones by `CHANGES`.
    """
    files.write_json(path, scores(perplexity, **more))
    losses = [
        math.log(perplexity) + hard + change * (place % 2)
        for hard, change in zip(HARDNESS, CHANGES, strict=True)
    ]
    token_scores(losses).write(path.with_suffix(".tokens.parquet"))


def write_gates(folder: Path) -> None:
    """What the gates of a run measured, and what its memory was planned to be."""
    merged = {"kl_divergence_nats": 1.25e-7, "perplexity_increase_fraction": -0.0025}
    gguf = {"kl_divergence_nats": 5.5e-9, "top1_agreement_fraction": 1.0}
    for gate, measured in (("merged", merged), ("gguf", gguf)):
        files.write_json(folder / f"{gate}_check.json", {"n_scored_tokens": 789, **measured})
    parts = dict.fromkeys(MEMORY_PARTS, 0) | {"program": 5 * 10**8, "base_weights": 10**9}
    plan = {"predicted_bytes": parts, "usable_bytes": 20 * 10**9}
    files.write_json(folder / "memory_plan.json", plan)


@pytest.fixture
def write_results(tmp_path) -> Callable[[], Results]:
    def write() -> Results:
        folder = tmp_path / "results"
        shape = {"n_kv_heads": 2, "head_dim": 32, "layer_windows": [64, 64]}
        facts = {"context_tokens": 2048, "sliding_window": 64, **shape}
        files.write_json(folder / "models" / "tiny" / "facts.json", facts)
        base = folder / "evaluation" / "tiny" / "chats"
        whole = {"full_length_perplexity": 9.876}
        write_link(base / "base.json", 10.0, place=0, **whole)
        write_link(base / "base-nf4.json", 10.25, place=1, **whole)
        for number, run in enumerate(RUNS):
            adapter = folder / "runs" / run / "adapter"
            manifest = {
                "peak_memory_bytes": (number + 1) * 3 * 2**29,
                "predicted_peak_memory_bytes": (number + 1) * 5 * 2**28,
                "tokens_per_second": 1234.4,
                "n_steps": 7 + number,
                "n_trainable_parameters": 1_234_567,
                "duration_seconds": 12.5,
                "final_loss_nats_per_token": 1.75,
                "device": "cpu",
            }
            files.write_json(adapter / "training_manifest.json", manifest)
            steps = [
                {
                    "step": step,
                    "loss_nats_per_token": 3 / step,
                    "gradient_norm": 1.0 / step,
                    "learning_rate": 0.1,
                }
                for step in range(1, 6)
            ]
            validation = [{"step": 5, "loss_nats_per_token": 1.5}] if number else []
            history = {"train": steps, "validation": validation}
            files.write_json(adapter / "history.json", history)
            write_gates(folder / "runs" / run)
            packed = folder / "data" / "chats" / "tiny" / RUNS[run]["packing"]
            packing = {"fill_fraction": 0.96875, "n_rows": 12, "n_documents": 34}
            files.write_json(packed / "packing_report.json", packing)
            for place, (link, perplexity) in enumerate(PERPLEXITIES.items(), start=2):
                evaluation = folder / "runs" / run / "evaluation"
                more = whole if link in ("adapter", "merged") else {}
                write_link(evaluation / f"{link}.json", perplexity + number, place=place, **more)
                speed = {
                    "prompt_milliseconds_per_token": 0.1234,
                    "prompt_standard_deviation_milliseconds_per_token": 0.0056,
                    "decode_milliseconds_per_token": 2.5,
                    "decode_standard_deviation_milliseconds_per_token": None,
                    "prompt_tokens": 512,
                    "first_token_milliseconds": 63.2,
                    "first_token_standard_deviation_milliseconds": 2.9,
                    "tests": [
                        {
                            "test": "pp512",
                            "depth_tokens": 0,
                            "tokens_per_second": 8103.7,
                            "standard_deviation_tokens_per_second": 12.5,
                        }
                    ],
                    "size_bytes": 5 * 2**20,
                    "peak_memory_bytes": 3 * 2**30,
                }
                files.write_json(evaluation / f"{link}.inference.json", speed)
                if link == "Q4_K_M":
                    divergence = {
                        "kl_divergence_nats": 0.01234,
                        "kl_divergence_standard_error_nats": 0.00056,
                        "top1_agreement_fraction": 0.925,
                        "top1_agreement_standard_error_fraction": 0.0031,
                    }
                    files.write_json(evaluation / f"{link}.divergence.json", divergence)
        return Results(folder, json.dumps({"runs": RUNS, "gguf_types": GGUF_TYPES, "awq": False}))

    return write


@pytest.fixture
def results(write_results) -> Results:
    return write_results()


@pytest.fixture
def read_tsv() -> Callable[[Path], list[list[str]]]:
    return lambda path: [line.split("\t") for line in path.read_text().splitlines()]
