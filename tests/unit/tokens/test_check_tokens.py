from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from workflow_scripts import files
from workflow_scripts.chats.messages import SPLITS
from workflow_scripts.log import StageError
from workflow_scripts.tokens import check_tokens
from workflow_scripts.tokens.check_tokens import share_out
from workflow_scripts.tokens.documents import documents_schema

STAGE = "workflow_scripts.tokens.check_tokens"


@pytest.fixture
def tokens(rendered, tmp_path):
    """A copy of the tokens that a test may damage."""
    folder = tmp_path / "tokens"
    shutil.copytree(rendered.tokens, folder)
    return folder


@pytest.fixture
def check(rendered, tokenizer_v3, tokens, tmp_path):
    def run(tokenizer=tokenizer_v3, **settings):
        check_tokens.main(
            ["--clean", str(rendered.clean), "--tokens", str(tokens)]
            + ["--tokenizer", str(tokenizer), "--settings", json.dumps(settings)]
            + ["--check", str(tmp_path / "check.json")]
        )
        return files.read_json(tmp_path / "check.json")

    return run


def damage(path, change):
    rows = files.read_arrow(path).to_pylist()
    change(rows[0])
    files.write_arrow(path, pa.Table.from_pylist(rows, schema=documents_schema()))
    return rows[0]["id"]


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--check" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


def test_tokens_of_render_chats_pass(check, rendered):
    report = check()
    n_rows = sum(
        files.read_parquet(rendered.clean / f"{split}.parquet").num_rows for split in SPLITS
    )
    assert report["n_conversations"] == report["n_documents"] == n_rows > 0
    assert report["n_with_tools"] == 2
    # One of two: its tool result is JSON, which templates and mistral-common write differently.
    assert report["n_compared_with_template"] == n_rows - 1
    assert report["n_compared_with_mistral_common_alone"] == {"a tool result that is JSON": 1}


def test_a_sample_covers_every_split_and_tool_use(check):
    report = check(n_conversations=9)
    assert report["n_conversations"] in (9, 10, 11)
    assert report["n_with_tools"] > 0
    assert report["n_documents"] > 80


@pytest.mark.parametrize("split", SPLITS)
def test_one_changed_token_is_found_and_named(check, tokens, tmp_path, split):
    def change(row):
        row["input_ids"][5] += 1

    changed = damage(tokens / f"{split}.arrow", change)
    with pytest.raises(StageError) as caught:
        check()
    parts = (
        "differ from those of mistral-common",
        f"{split}.arrow",
        changed,
        "token 5, after '<s>",
    )
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "check.json").exists()


def test_a_lost_last_token_is_found(check, tokens):
    def change(row):
        row["input_ids"].pop()

    damage(tokens / "train.arrow", change)
    with pytest.raises(StageError, match="differ from those of mistral-common"):
        check()


@pytest.mark.parametrize("answer", [0, -1])
def test_an_eos_that_is_not_supervised_is_found(check, tokens, answer):
    path = tokens / "train.arrow"
    rows = files.read_arrow(path).to_pylist()
    # Three answers, so that the remaining ones are not just the last.
    damaged = next(row for row in rows if len(row["supervised_spans"]) > 4)
    damaged["supervised_spans"][2 * answer + 1] -= 1  # the end of the answer's span
    files.write_arrow(path, pa.Table.from_pylist(rows, schema=documents_schema()))
    with pytest.raises(StageError) as caught:
        check()
    headline = "the supervision of an answer's closing EOS does not follow the answer's weight"
    for part in (headline, damaged["id"]):
        assert part in str(caught.value)


def shifted(row, *, starts=0, ends=0):
    """Move the start or end of the first answer's span."""
    row["supervised_spans"][0] += starts
    row["supervised_spans"][1] += ends


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(supervised_spans=[1, row["n_tokens"]]),
        lambda row: shifted(row, starts=-1),
        lambda row: shifted(row, starts=1),
    ],
    ids=["the questions too", "from one token before", "from its second token"],
)
def test_supervised_tokens_that_are_not_exactly_the_answers_are_found(check, tokens, change):
    """Every closing EOS is supervised, but so are the questions, or only part of an answer."""
    name = damage(tokens / "train.arrow", change)
    with pytest.raises(StageError, match="supervised tokens are not exactly one answer") as caught:
        check()
    for part in (name, " before ", "expected: from the end of its question to its closing EOS"):
        assert part in str(caught.value)


def test_a_template_of_another_version_is_found(check, tokenizer_v3, exported_tokenizer, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(tokenizer_v3, mixed)
    shutil.copyfile(exported_tokenizer("v7") / "chat_template.jinja", mixed / "chat_template.jinja")
    with pytest.raises(StageError) as caught:
        check(mixed)
    assert "differ from those of tokenizer.json and chat_template.jinja" in str(caught.value)


def test_the_stage_stops_a_rule_with_a_message(run_stage, rendered, tokenizer_v3, tokens, tmp_path):
    def change(row):
        row["input_ids"][0] = 2

    damage(tokens / "train.arrow", change)
    done = run_stage(
        STAGE,
        *("--clean", rendered.clean, "--tokens", tokens, "--tokenizer", tokenizer_v3),
        *("--settings", "{}", "--check", tmp_path / "check.json"),
    )
    assert done.returncode == 1
    for part in (
        "check_tokens: tokens differ",
        "token 0",
        "found:    2='</s>' ",
        "expected: 1='<s>' ",
    ):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_documents_without_their_conversations_are_found(check, rendered, tokens):
    rows = files.read_arrow(tokens / "test.arrow").to_pylist()
    rows[3]["id"] = "0123456789abcdef"
    files.write_arrow(tokens / "test.arrow", pa.Table.from_pylist(rows, schema=documents_schema()))
    with pytest.raises(StageError, match="documents have no conversation") as caught:
        check()
    assert "0123456789abcdef" in str(caught.value)


def test_a_masked_answer_that_is_supervised_is_found(check, tokens):
    """The training split contains a conversation whose first answer has weight 0."""
    path = tokens / "train.arrow"
    rows = files.read_arrow(path).to_pylist()
    masked = next(row for row in rows if row["n_copies"] == 3)
    masked["supervised_spans"] = [1, masked["n_tokens"]]
    files.write_arrow(path, pa.Table.from_pylist(rows, schema=documents_schema()))
    with pytest.raises(StageError, match="closing EOS") as caught:
        check()
    assert "found:    [True, True]" in str(caught.value)
    assert "expected: [False, True]" in str(caught.value)


@given(
    n_documents=st.lists(st.integers(0, 10**6), min_size=3, max_size=3), limit=st.integers(1, 5000)
)
def test_every_split_has_a_proportional_share_of_the_sample(n_documents, limit):
    shares = share_out(n_documents, limit)
    assert all(0 <= share <= n for share, n in zip(shares, n_documents, strict=True))
    assert all(share > 0 for share, n in zip(shares, n_documents, strict=True) if n)
    assert sum(n_documents) <= limit or limit <= sum(shares) <= limit + 2
    assert share_out(n_documents, None) == n_documents
