from __future__ import annotations

import shutil

import pyarrow as pa
import pytest

from workflow_scripts import files
from workflow_scripts.data import check_tokens
from workflow_scripts.data.check_tokens import compare
from workflow_scripts.data.documents import SPLITS, documents_schema
from workflow_scripts.log import StageError

STAGE = "workflow_scripts.data.check_tokens"


@pytest.fixture
def tokens(prepared, tmp_path):
    """A copy of the tokens that a test may damage."""
    folder = tmp_path / "tokens"
    shutil.copytree(prepared.tokens, folder)
    return folder


@pytest.fixture
def check(prepared, tokenizer_v3, tokens, tmp_path):
    def run(tokenizer=tokenizer_v3):
        check_tokens.main(
            ["--clean", str(prepared.clean), "--tokens", str(tokens)]
            + ["--tokenizer", str(tokenizer), "--check", str(tmp_path / "check.json")]
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


def test_tokens_of_render_chats_pass(check, prepared):
    report = check()
    n_rows = sum(
        files.read_parquet(prepared.clean / f"{split}.parquet").num_rows for split in SPLITS
    )
    assert report["n_conversations"] == n_rows > 0


@pytest.mark.parametrize("split", SPLITS)
def test_one_changed_token_is_found_and_named(check, tokens, tmp_path, split):
    def change(row):
        row["input_ids"][5] += 1

    changed = damage(tokens / f"{split}.arrow", change)
    with pytest.raises(StageError) as caught:
        check()
    for part in ("differ from those of mistral-common", f"{split}.arrow", changed, "token 5"):
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
    damaged = next(row for row in rows if len(row["supervised_spans"]) > 2)  # several answers
    damaged["supervised_spans"][2 * answer + 1] -= 1  # the end of that answer's span
    files.write_arrow(path, pa.Table.from_pylist(rows, schema=documents_schema()))
    with pytest.raises(StageError) as caught:
        check()
    assert "an answer's closing EOS is not supervised" in str(caught.value)
    assert damaged["id"] in str(caught.value)


def test_a_template_of_another_version_is_found(check, tokenizer_v3, exported_tokenizer, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(tokenizer_v3, mixed)
    shutil.copyfile(exported_tokenizer("v7") / "chat_template.jinja", mixed / "chat_template.jinja")
    with pytest.raises(StageError) as caught:
        check(mixed)
    assert "differ from those of tokenizer.json and chat_template.jinja" in str(caught.value)


def test_the_stage_stops_a_rule_with_a_message(run_stage, prepared, tokenizer_v3, tokens, tmp_path):
    def change(row):
        row["input_ids"][0] = 2

    damage(tokens / "train.arrow", change)
    done = run_stage(
        STAGE,
        *("--clean", prepared.clean, "--tokens", tokens, "--tokenizer", tokenizer_v3),
        *("--check", tmp_path / "check.json"),
    )
    assert done.returncode == 1
    for part in ("check_tokens: tokens differ", "token 0", "found:    [2, ", "expected: [1, "):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("found", "expected", "at"),
    [([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2), ([], [4], 0)],
)
def test_compare_names_the_first_token_that_differs(found, expected, at):
    with pytest.raises(StageError) as caught:
        compare(found, expected, "here", "the reference")
    assert f"here, token {at}\n" in str(caught.value)


def test_compare_accepts_equal_tokens():
    assert compare([1, 2, 3], [1, 2, 3], "here", "the reference") is None
