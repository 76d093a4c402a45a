from __future__ import annotations

import json
from collections import Counter

import pytest

from workflow_scripts import files
from workflow_scripts.data import clean_dataset
from workflow_scripts.data.documents import SPLITS
from workflow_scripts.data.stdlib_chats import make_chats

STAGE = "workflow_scripts.data.clean_dataset"


def chat(question, answer="An answer.", **others):
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **others}


def clean(chats, folder, **settings):
    """The splits as lists of rows, the rejected, and the report."""
    folder.mkdir(exist_ok=True)
    files.write_jsonl(folder / "chats.jsonl", chats)
    clean_dataset.main(
        ["--files", str(folder / "chats.jsonl"), "--settings", json.dumps(settings)]
        + ["--clean", str(folder / "clean")]
    )
    tables = {
        name: files.read_parquet(folder / "clean" / f"{name}.parquet").to_pylist()
        for name in (*SPLITS, "rejected")
    }
    return tables, files.read_json(folder / "clean" / "cleaning_report.json")


def split_of(tables):
    return {row["id"]: split for split in SPLITS for row in tables[split]}


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--clean" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers", "pyarrow"})


def test_every_chat_is_kept_once_with_its_line_or_rejected_with_its_reason(tmp_path):
    chats = make_chats(n_conversations=60, seed=0)
    chats[10:10] = [chat(" ")]
    chats[20:20] = [chats[3], {"messages": []}]
    tables, report = clean(chats, tmp_path, validation_fraction=0.2, test_fraction=0.2)
    kept = [row for split in SPLITS for row in tables[split]]
    lines = Counter(row["source_line"] for row in [*kept, *tables["rejected"]])
    assert lines == Counter(range(1, len(chats) + 1))
    for row in kept:
        assert row["source_file"] == str(tmp_path / "chats.jsonl")
        assert row["messages"] == chats[row["source_line"] - 1]["messages"]
    reasons = {row["source_line"]: row["reason"] for row in tables["rejected"]}
    assert reasons == {11: "an empty message", 21: "duplicate", 22: "no turn"}
    assert json.loads(tables["rejected"][0]["raw"]) == chats[10]
    assert report == {
        "n_read": 63,
        **{f"n_{split}": len(tables[split]) for split in SPLITS},
        "n_rejected": 3,
        "rejected_by_reason": dict.fromkeys(reasons.values(), 1),
    }
    assert all(report[f"n_{split}"] for split in SPLITS)


def test_a_chat_keeps_its_split_when_the_dataset_grows(tmp_path):
    chats = make_chats(n_conversations=400, seed=2)
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2}
    before = split_of(clean(chats[100:200], tmp_path / "before", **shares)[0])
    after = split_of(clean(chats, tmp_path / "after", **shares)[0])
    assert set(before.values()) == set(SPLITS)
    assert before.items() <= after.items()


def test_chats_that_open_alike_stay_on_one_side(tmp_path):
    chats = [
        chat(f"Question {number}?", f"Answer {copy}.") for number in range(40) for copy in range(3)
    ]
    tables, _ = clean(chats, tmp_path, validation_fraction=0.3, test_fraction=0.3)
    sides = Counter(
        question
        for split in SPLITS
        for question in {row["messages"][0]["content"] for row in tables[split]}
    )
    assert sides == Counter(f"Question {number}?" for number in range(40))


def test_split_by_group_keeps_a_group_on_one_side(tmp_path):
    chats = [
        chat(f"{group} {number}?", group=f"module {group}")
        for group in range(30)
        for number in range(4)
    ]
    tables, _ = clean(chats, tmp_path, split_by="group", validation_fraction=0.3, test_fraction=0.3)
    sides = Counter(
        group
        for split in SPLITS
        for group in {row["messages"][0]["content"].split()[0] for row in tables[split]}
    )
    assert sides == Counter(map(str, range(30)))


def test_split_by_group_rejects_a_chat_without_one(tmp_path):
    chats = [chat(f"{number}?", group="a") for number in range(20)] + [chat("Alone?")]
    tables, _ = clean(chats, tmp_path, split_by="group", validation_fraction=0, test_fraction=0)
    assert [row["reason"] for row in tables["rejected"]] == ["no `group` to split by"]


def test_duplicates_are_dropped_and_are_no_damage(tmp_path):
    chats = [chat("What?")] * 50 + [chat("What?  "), chat("Why?")]
    tables, report = clean(chats, tmp_path, validation_fraction=0, test_fraction=0)
    assert [row["source_line"] for row in tables["train"]] == [1, 52]
    assert report["rejected_by_reason"] == {"duplicate": 50}


def test_several_files_are_read_in_their_order(run_stage, tmp_path):
    for name, question in (("b", "First?"), ("a", "Second?")):
        files.write_jsonl(tmp_path / f"{name}.jsonl", [chat(question)])
    done = run_stage(
        STAGE,
        *("--files", tmp_path / "b.jsonl", tmp_path / "a.jsonl"),
        *("--settings", '{"validation_fraction": 0, "test_fraction": 0}'),
        *("--clean", tmp_path / "clean"),
    )
    assert done.returncode == 0, done.stderr
    assert "cleaned n_read=2 n_train=2" in done.stderr
    rows = files.read_parquet(tmp_path / "clean" / "train.parquet").to_pylist()
    assert [row["messages"][0]["content"] for row in rows] == ["First?", "Second?"]


@pytest.mark.parametrize(
    ("lines", "settings", "parts"),
    [
        (
            [json.dumps(chat("A?")), '{"messages": []}', "{"],
            {},
            ["2 of 3 conversations cannot be used", "chats.jsonl:2: no turn"]
            + ["chats.jsonl:3: not JSON", "66.7% rejected", "max_rejected_fraction"],
        ),
        (
            [json.dumps(chat("A?"))],
            {"validation_fraction": 0, "test_fraction": 0.999999999},
            ["no conversation is left for training", "n_test=1", "rejected.parquet"],
        ),
        ([json.dumps(chat("A?"))], {"split": "group"}, ["split: unknown key", "split_by"]),
        ([], {}, ["no conversation is left for training", "n_read=0"]),
    ],
)
def test_a_dataset_that_cannot_be_used_stops_the_stage(run_stage, tmp_path, lines, settings, parts):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    done = run_stage(
        STAGE, "--files", path, "--settings", json.dumps(settings), "--clean", tmp_path / "clean"
    )
    assert done.returncode == 1
    for part in ("clean_dataset: ", *parts):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "clean" / "cleaning_report.json").exists()


def test_the_limit_of_rejections_is_inclusive(tmp_path):
    chats = [chat(f"{number}?") for number in range(9)] + [{"messages": []}]
    shares = {"validation_fraction": 0, "test_fraction": 0}
    _, report = clean(chats, tmp_path, max_rejected_fraction=0.1, **shares)
    assert (report["n_train"], report["n_rejected"]) == (9, 1)
