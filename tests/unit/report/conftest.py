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

from tests.unit.evaluate.test_task_scores import rows_of, score_of
from workflow_scripts import files
from workflow_scripts.data.documents import Document
from workflow_scripts.evaluate.task_scores import write_samples
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


CLEANING = {
    "n_read": 60,
    "rejected_by_reason": {"duplicate": 8, "too short": 3},
    "n_corrected": 5,
    "n_train": 40,
    "n_train_weighted": 40,
    "n_validation": 4,
    "n_test": 5,
}
PACKING = {
    "strategy": "best_fit",
    "row_tokens": 256,
    "fill_fraction": 0.96875,
    "n_rows": 12,
    "n_documents": 34,
    "n_documents_placed": 34,
    "n_documents_cut": 1,
    "n_documents_split": 1,
    "n_documents_truncated": 0,
    "n_documents_dropped": 0,
    "n_documents_beyond_window": 2,
    "n_pieces": 35,
    "n_pieces_without_supervision": 0,
    "n_cuts_at_turn": 1,
    "n_cuts_at_sentence": 0,
    "n_cuts_at_token": 0,
    "n_tokens": 2976,
    "n_tokens_left_out": 0,
    "n_supervised_tokens": 1234,
    "n_context_tokens": 0,
    "sliding_window": 64,
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
        "size_bytes": 7 * 2**20,
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
        shape = {"hidden_size": 256, "n_kv_heads": 2, "head_dim": 32, "layer_windows": [64, 64]}
        facts = {"context_tokens": 2048, "sliding_window": 64, **shape}
        files.write_json(folder / "models" / "tiny" / "facts.json", facts)
        clean = folder / "data" / "chats" / "clean"
        files.write_json(clean / "cleaning_report.json", CLEANING)
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
            files.write_json(packed / "packing_report.json", PACKING)
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


def context_report(scores: Sequence[int], **more: object) -> dict:
    """A report of evaluate_context, with these scores at 512, 1024 … tokens."""
    lengths = [512 << number for number in range(len(scores))]
    is_measurable = scores[0] > 0
    cells = [
        {
            "task": "single",
            "length_tokens": length,
            "depth_fraction": depth,
            "n_prompts": 10,
            "n_exact": score // 10,
        }
        for length, score in zip(lengths, scores, strict=True)
        for depth in (0.0, 1.0)
    ]
    return {
        "advertised_tokens": 32_768,
        "context_tokens": 4096,
        "cells": cells,
        "scores": [
            {"length_tokens": length, "score_percent": score}
            for length, score in zip(lengths, scores, strict=True)
        ],
        "n_prompts": 10 * len(cells),
        "is_measurable": is_measurable,
        "effective_tokens_ruler": 1024 if is_measurable else None,
        "effective_tokens_ruler_low": 512 if is_measurable else None,
        "effective_tokens_ruler_high": 2048 if is_measurable else None,
        "effective_tokens_nolima": 2048 if is_measurable else None,
        "effective_tokens_nolima_low": 1024 if is_measurable else None,
        "effective_tokens_nolima_high": 2048 if is_measurable else None,
        "short_tokens": 256,
        "n_long_tokens": 900,
        "long_gain_nats_per_token": None,
        "long_gain_standard_error_nats_per_token": None,
        **more,
    }


GAIN = {
    "long_gain_nats_per_token": 0.0123,
    "long_gain_standard_error_nats_per_token": 0.0045,
}


REFERENCES = {
    "asked": "reference answers",
    "task": "reference answers",
    "metric": "exact_match",
    "subtasks": ["reference answers"],
    "low": 0.1,
    "high": 0.9,
}
HELLASWAG = {
    "asked": "hellaswag@10",
    "task": "hellaswag",
    "metric": "acc_norm",
    "subtasks": ["hellaswag"],
    "n_examples": 10,
}


def write_tasks(stem: Path, values: Sequence[float], score: dict, **report: object) -> None:
    """Scores of one task, and what every document scored, as evaluate_tasks writes them."""
    scored = score_of(values, standard_error=0.25 - 0.01 * sum(values), **score)
    folder = stem.parent
    files.write_json(folder / f"{stem.name}.json", {"scores": [scored], **report})
    rows = rows_of(values, scored["task"], asked=scored["asked"])
    metric = {"metric": scored["metric"]}
    write_samples(folder / f"{stem.name}.parquet", [row | metric for row in rows])


@pytest.fixture
def all_measured(results) -> Results:
    """The same results with what is measured where the config asks for it: a text, AWQ; and of
    base, merged model and smallest file usable context (the second run's not measurable), tasks."""
    folder = results.folder
    texts = folder / "evaluation" / "tiny" / "texts" / "wiki"
    files.write_json(texts / "base.json", scores(20.0))
    base = folder / "evaluation" / "tiny" / "chats"
    files.write_json(base / "base.context.json", context_report([100, 90, 80]))
    write_tasks(base.parent / "base.tasks", [0.0, 0.0, 1.0, 0.0], HELLASWAG, are_chats=False)
    write_tasks(base / "base.references", [0.0, 0.0, 1.0, 0.0, 0.0], REFERENCES)
    for number, run in enumerate(RUNS):
        evaluation = folder / "runs" / run / "evaluation"
        write_link(evaluation / "awq.json", 5.25 + number, place=4, size_bytes=3 * 2**20)
        for place, link in enumerate(("merged", *GGUF_TYPES)):
            scored = scores(21.0 + number + 0.1 * place)
            files.write_json(evaluation / "texts" / "wiki" / f"{link}.json", scored)
        for link, found in (("merged", [100, 90, 80]), ("Q4_K_M", [0, 0] if number else [90, 70])):
            report = context_report(found, **(GAIN if link == "merged" else {}))
            files.write_json(evaluation / f"{link}.context.json", report)
        for link, right in (("merged", [1.0, 0.0, 1.0, number]), ("Q4_K_M", [1.0, 0.0, 0, number])):
            write_tasks(evaluation / f"{link}.tasks", right, HELLASWAG, are_chats=False)
            write_tasks(evaluation / f"{link}.references", [*right, 0.0], REFERENCES)
    asked = ["base", "merged", "Q4_K_M"]
    more = {"awq": True, "texts": ["wiki"], "context": asked}
    more |= {"tasks": {"tasks": asked, "references": asked}}
    return Results(folder, json.dumps(json.loads(results.runs) | more))


@pytest.fixture
def read_tsv() -> Callable[[Path], list[list[str]]]:
    return lambda path: [line.split("\t") for line in path.read_text().splitlines()]
