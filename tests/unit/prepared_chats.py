"""Chats taken through the data stages once, for the tests of the stages after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from workflow_scripts import files
from workflow_scripts.chats.messages import SPLITS
from workflow_scripts.chats.tables import clean_schema
from workflow_scripts.demo.stdlib_chats import make_chats


class Prepared(NamedTuple):
    conversations: Path
    clean: Path
    tokens: Path


class Rendered(NamedTuple):
    clean: Path
    tokens: Path


def write_clean(folder: Path, chats: dict[str, list[dict[str, Any]]]) -> Path:
    """Conversations of each split as clean_dataset writes them; what is not given is made up."""
    for split in SPLITS:
        rows = [
            {
                "id": f"{split}-{number}",
                "n_copies": 1,
                "source": "all",
                "source_file": "chats.jsonl",
                "source_line": number + 1,
                **chat,
            }
            for number, chat in enumerate(chats.get(split, []))
        ]
        table = pa.Table.from_pylist(rows, schema=clean_schema())
        files.write_parquet(folder / f"{split}.parquet", table)
    return folder


def tool_chat(answer: str, *, result: str = "12.5") -> dict[str, Any]:
    """A question that a tool helps to answer."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "weather", "description": "Today's", "parameters": parameters}
    call = {"name": "weather", "arguments": '{"city":"Zürich"}'}
    return {
        "tools": json.dumps([{"type": "function", "function": function}]),
        "messages": [
            {"role": "user", "content": "How warm is it?"},
            {
                "role": "assistant",
                "tool_calls": [{"id": "abcdefghi", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": result},
            {"role": "assistant", "content": answer},
        ],
    }


@pytest.fixture(scope="session")
def rendered(tokenizer_v3, tmp_path_factory) -> Rendered:
    """Demo chats, chats with tools, texts and weights, rendered with the v3 tokenizer."""
    from workflow_scripts.tokens import render_chats

    folder = tmp_path_factory.mktemp("rendered")
    demo = [{"messages": chat["messages"]} for chat in make_chats(n_conversations=90, seed=0)]
    masked = [
        *({"role": "user", "content": "What?"}, {"role": "assistant", "content": "A", "weight": 0}),
        *({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "B", "weight": 1}),
    ]
    others = [
        tool_chat("It is 12.5 degrees."),
        {"messages": [{"role": "text", "content": "A plain text.\nOf two lines."}]},
        {"messages": masked, "n_copies": 3},
    ]
    chats = {
        "train": [*demo[:50], *others],
        "validation": [*demo[50:70], tool_chat("Warm.", result='{"degrees": 30}')],
        "test": demo[70:],
    }
    clean = write_clean(folder / "clean", chats)
    render_chats.main(
        ["--clean", str(clean), "--tokenizer", str(tokenizer_v3), "--settings", "{}"]
        + ["--tokens", str(folder / "tokens")]
    )
    return Rendered(clean, folder / "tokens")


@pytest.fixture(scope="session")
def prepared(tokenizer_v3, tmp_path_factory) -> Prepared:
    """A hundred demo chats: as JSON Lines, cleaned, and rendered with the v3 tokenizer."""
    from workflow_scripts.chats import clean_dataset
    from workflow_scripts.tokens import render_chats

    folder = tmp_path_factory.mktemp("prepared")
    paths = Prepared(folder / "chats.jsonl", folder / "clean", folder / "tokens")
    files.write_jsonl(paths.conversations, make_chats(n_conversations=100, seed=0))
    settings = json.dumps({"cleaning": {"validation_fraction": 0.2, "test_fraction": 0.2}})
    clean_dataset.main(
        ["--source", "all", str(paths.conversations), "--settings", settings]
        + ["--clean", str(paths.clean)]
    )
    render_chats.main(
        ["--clean", str(paths.clean), "--tokenizer", str(tokenizer_v3), "--settings", "{}"]
        + ["--tokens", str(paths.tokens)]
    )
    return paths
