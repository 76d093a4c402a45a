"""Documents to measure training on: random tokens of chat-like lengths, or the demo's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.document_lengths import chat_lengths, summary
from tests.benchmarks.machine import REPOSITORY
from workflow_scripts import files
from workflow_scripts.tokens.documents import Documents, documents_schema

BOS = 1
FIRST_WORD = 3  # token ids below it are control tokens
SHORTEST = 4
TURN_TOKENS = 600
ANSWER_FRACTION = 0.55  # of a turn


def write_documents(
    path: Path,
    *,
    n_documents: int,
    length_fraction: float,
    longest: int,
    vocabulary_size: int,
    seed: int,
) -> dict[str, Any]:
    """Write random documents as `render_chats` would, and say what they are.

    Args:
        length_fraction: of the lengths of chats, for models smaller than any chat.
        longest: tokens; longer ones are cut, so that no contestant has to.
    """
    import pyarrow as pa

    lengths = np.rint(length_fraction * chat_lengths(n_documents, seed=seed)).astype(np.int64)
    lengths = lengths.clip(SHORTEST, longest)
    generator = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths.tolist()):
        tokens = generator.integers(FIRST_WORD, vocabulary_size, size=length)
        tokens[0] = BOS
        spans = supervised_spans(length)
        rows.append(
            {
                "id": f"chat/{number}",
                "input_ids": tokens,
                "supervised_spans": [bound for span in spans for bound in span],
                "n_tokens": length,
                "n_supervised_tokens": sum(end - start for start, end in spans),
                "n_copies": 1,
            }
        )
    files.write_arrow(path, pa.Table.from_pylist(rows, schema=documents_schema()))
    n_supervised = sum(row["n_supervised_tokens"] for row in rows)
    return {**summary(lengths), "supervised_fraction": n_supervised / int(lengths.sum())}


def supervised_spans(length: int) -> list[tuple[int, int]]:
    """[start, end) of the answers of a document: the end of each of its turns."""
    n_turns = -(-length // TURN_TOKENS)
    ends = [length * turn // n_turns for turn in range(n_turns + 1)]
    return [
        (end - max(1, round(ANSWER_FRACTION * (end - start))), end)
        for start, end in zip(ends, ends[1:], strict=False)
    ]


def write_demo_documents(path: Path, scratch: Path) -> dict[str, Any]:
    """The training split of the demo's dataset, as the workflow makes it; and what it is.

    Args:
        scratch: folder for what comes before.
    """
    import mistral_common

    from workflow_scripts.chats import clean_dataset
    from workflow_scripts.models import export_tokenizer
    from workflow_scripts.tokens import render_chats

    checkpoint = scratch / "checkpoint"
    checkpoint.mkdir()
    official = next((Path(mistral_common.__file__).parent / "data").glob("*.model.v3"))
    shutil.copyfile(official, checkpoint / "tokenizer.model.v3")
    chats, clean, tokens = scratch / "chats.jsonl", scratch / "clean", scratch / "tokens"
    cleaning = {"cleaning": {"split_by": "group"}, "sources": {"all": {}}}
    export_tokenizer.main(
        ["--checkpoint", str(checkpoint), "--tokenizer", str(scratch / "tokenizer")]
    )
    # By itself: which docstrings there are depends on what has been imported.
    command = [sys.executable, "-m", "workflow_scripts.demo.build_demo_dataset"]
    # All chats that the library is enough for, some 300.
    command += ["--settings", '{"n_conversations": 1000}', "--conversations", str(chats)]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    clean_dataset.main(
        ["--source", "all", str(chats), "--settings", json.dumps(cleaning), "--clean", str(clean)]
    )
    render_chats.main(
        ["--clean", str(clean), "--tokenizer", str(scratch / "tokenizer"), "--settings", "{}"]
        + ["--tokens", str(tokens)]
    )
    (tokens / "train.arrow").replace(path)
    documents = Documents(path)
    n_supervised = int(documents.n_supervised.sum())
    described = summary(documents.lengths)
    del described["mix"]
    return {**described, "supervised_fraction": n_supervised / described["n_tokens"]}
