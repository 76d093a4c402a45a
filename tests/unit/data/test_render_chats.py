from __future__ import annotations

import json

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from workflow_scripts import files
from workflow_scripts.data import render_chats
from workflow_scripts.data.documents import SPLITS, Documents
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer

STAGE = "workflow_scripts.data.render_chats"


def arguments(clean, tokenizer, folder, **settings):
    return [
        *("--clean", str(clean), "--tokenizer", str(tokenizer)),
        *("--settings", json.dumps(settings), "--tokens", str(folder)),
    ]


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--tokens" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers", "mistral_common"})


@pytest.mark.parametrize("split", SPLITS)
def test_every_clean_chat_is_a_document_in_its_place(prepared, tokenizer_v3, split):
    chats = files.read_parquet(prepared.clean / f"{split}.parquet").to_pylist()
    documents = Documents(prepared.tokens / f"{split}.arrow")
    assert documents.ids == [chat["id"] for chat in chats] != []
    official = load_mistral_tokenizer(tokenizer_v3, for_training=True)
    table = files.read_arrow(prepared.tokens / f"{split}.arrow").to_pylist()
    for chat, document, row in zip(chats, documents, table, strict=True):
        request = ChatCompletionRequest.from_openai(messages=chat["messages"])
        assert document.input_ids.tolist() == official.encode_chat_completion(request).tokens
        answers = [m["content"] for m in chat["messages"] if m["role"] == "assistant"]
        supervised = document.input_ids[document.is_supervised].tolist()
        assert supervised.count(2) == len(answers)
        assert len(row["supervised_spans"]) == 2 * len(answers)
        assert row["n_supervised_tokens"] == len(supervised)
        assert row["n_tokens"] == len(document.input_ids)
        start, end = row["supervised_spans"][:2]
        assert official.decode(document.input_ids[start : end - 1].tolist()) == answers[0]


def test_chats_over_the_limit_are_rejected_with_their_place(prepared, tokenizer_v3, tmp_path):
    limit = 40
    render_chats.main(
        arguments(
            *(prepared.clean, tokenizer_v3, tmp_path),
            max_document_tokens=limit,
            max_rejected_fraction=1,
        )
    )
    rejected = files.read_parquet(tmp_path / "rejected.parquet").to_pylist()
    reasons = {row["id"]: row["reason"] for row in rejected}
    n_short = 0
    for split in SPLITS:
        kept = Documents(tmp_path / f"{split}.arrow").ids
        for document in Documents(prepared.tokens / f"{split}.arrow"):
            n_tokens = len(document.input_ids)
            assert (document.id in kept) == (n_tokens <= limit)
            if n_tokens > limit:
                assert reasons[document.id] == f"{n_tokens} tokens, at most {limit} wanted"
            n_short += n_tokens <= limit
    assert n_short and reasons
    assert all(row["where"].startswith(f"{prepared.conversations}:") for row in rejected)


def test_the_stage_runs_as_a_rule_starts_it(run_stage, prepared, tokenizer_v3, tmp_path):
    done = run_stage(STAGE, *arguments(prepared.clean, tokenizer_v3, tmp_path / "tokens"))
    assert done.returncode == 0, done.stderr
    assert "INFO render_chats: rendered split=train n_documents=" in done.stderr
    for split in SPLITS:
        name = f"{split}.arrow"
        assert files.read_arrow(tmp_path / "tokens" / name) == files.read_arrow(
            prepared.tokens / name
        )


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"max_document_tokens": 10, "max_rejected_fraction": 0.5},
            ["conversations cannot be used", "tokens, at most 10 wanted", "at most 50.0%"]
            + ["datasets.<name>.rendering.max_rejected_fraction", "chats.jsonl:"],
        ),
        ({"max_document_tokens": 0}, ["--settings cannot be used", "max_document_tokens: found 0"]),
    ],
)
def test_too_many_rejections_stop_the_stage(
    run_stage, prepared, tokenizer_v3, tmp_path, settings, parts
):
    done = run_stage(STAGE, *arguments(prepared.clean, tokenizer_v3, tmp_path, **settings))
    assert done.returncode == 1
    for part in ("render_chats: ", *parts):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "rejected.parquet").exists()


def test_a_folder_without_tokenizer_stops_the_stage(run_stage, prepared, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run_stage(STAGE, *arguments(prepared.clean, tmp_path / "empty", tmp_path / "tokens"))
    assert done.returncode == 1
    assert "render_chats: the checkpoint has no tokenizer" in done.stderr
    assert "Traceback" not in done.stderr
