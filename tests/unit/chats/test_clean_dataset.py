from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from workflow_scripts import files
from workflow_scripts.chats import clean_dataset
from workflow_scripts.chats.messages import SPLITS
from workflow_scripts.demo.stdlib_chats import make_chats
from workflow_scripts.log import StageError

STAGE = "workflow_scripts.chats.clean_dataset"
ROOT = Path(__file__).parents[3]
OUTPUTS = [*(f"{split}.parquet" for split in SPLITS), "rejected.parquet", "cleaning_report.json"]
EVENLY = {"validation_fraction": 0.3, "test_fraction": 0.3}


def chat(question, answer="An answer.", **others):
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **others}


def arguments(folder, sources, settings, evaluation_files=(), processes=1):
    """Return the stage's command line; `sources` maps names to lists of records."""
    folder.mkdir(exist_ok=True)
    flags = []
    for name, chats in sources.items():
        files.write_jsonl(folder / f"{name}.jsonl", chats)
        flags += ["--source", name, str(folder / f"{name}.jsonl")]
    if evaluation_files:
        flags += ["--evaluation-files", *map(str, evaluation_files)]
    flags += ["--settings", json.dumps(settings), "--processes", str(processes)]
    return [*flags, "--clean", str(folder / "clean")]


def read(folder):
    tables = {
        name: files.read_parquet(folder / "clean" / f"{name}.parquet").to_pylist()
        for name in (*SPLITS, "rejected")
    }
    return tables, files.read_json(folder / "clean" / "cleaning_report.json")


def clean(chats, folder, *, sources=None, evaluation_files=(), processes=1, **cleaning):
    """Clean chats; return the tables as lists of rows, and the report."""
    records = chats if isinstance(chats, dict) else {"chats": chats}
    settings = {"cleaning": cleaning, "sources": sources or {}}
    clean_dataset.main(arguments(folder, records, settings, evaluation_files, processes))
    return read(folder)


def spoken(row):
    """Return the messages of a kept row without null fields."""
    return [
        {key: value for key, value in message.items() if value is not None}
        for message in row["messages"]
    ]


def kept(tables):
    return [row for split in SPLITS for row in tables[split]]


def split_of(tables):
    return {row["id"]: split for split in SPLITS for row in tables[split]}


def rejections(tables):
    return {row["source_line"]: (row["reason"], row["detail"]) for row in tables["rejected"]}


def distinct_words(seed, n=60):
    return " ".join(f"w{seed}x{number}" for number in range(n))


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--clean" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers", "pyarrow", "ftfy", "rensa"})


def test_every_chat_is_kept_once_with_its_line_or_rejected_with_its_reason(tmp_path):
    chats = make_chats(n_conversations=60, seed=0)
    chats[10:10] = [chat(" ")]
    chats[20:20] = [chats[3], {"messages": []}]
    tables, report = clean(
        chats, tmp_path, validation_fraction=0.2, test_fraction=0.2, near_duplicates=None
    )
    lines = Counter(row["source_line"] for row in [*kept(tables), *tables["rejected"]])
    assert lines == Counter(range(1, len(chats) + 1))
    for row in kept(tables):
        assert row["source"] == "chats"
        assert row["source_file"] == str(tmp_path / "chats.jsonl")
        assert spoken(row) == chats[row["source_line"] - 1]["messages"]
    reasons = rejections(tables)
    assert set(reasons) == {11, 21, 22}
    assert reasons[21] == ("duplicate", f"of {tmp_path / 'chats.jsonl'}:4")
    assert json.loads(tables["rejected"][0]["raw"]) == chats[10]
    assert report["n_read"] == 63
    assert report["n_rejected"] == 3
    assert report["rejected_by_reason"] == Counter(reason for reason, _ in reasons.values())
    assert all(report[f"n_{split}"] == len(tables[split]) > 0 for split in SPLITS)
    assert report["roles"] == Counter(
        message["role"] for row in kept(tables) for message in row["messages"]
    )
    assert sum(report["characters_histogram"]["counts"]) == 60
    assert report["languages"]["en"] > 30


def test_a_chat_keeps_its_split_when_the_dataset_grows(tmp_path):
    chats = make_chats(n_conversations=400, seed=2)
    # Decontamination may drop a chat that resembles a newly held-out one: not a change of split.
    kept = {"near_duplicates": None, "decontamination": None}
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2, **kept}
    before = split_of(clean(chats[100:200], tmp_path / "before", **shares)[0])
    after = split_of(clean(chats, tmp_path / "after", **shares)[0])
    assert set(before.values()) == set(SPLITS)
    assert before.items() <= after.items()


def test_chats_with_equal_first_questions_share_a_split_regardless_of_case(tmp_path):
    questions = [f"Where is town {number}?" for number in range(40)]
    chats = [chat(question, distinct_words(2 * at)) for at, question in enumerate(questions)]
    chats += [
        chat(f"  {question.upper()}  ", distinct_words(2 * at + 1))
        for at, question in enumerate(questions)
    ]
    tables, _ = clean(chats, tmp_path, decontamination=None, **EVENLY)
    split_of_line = {row["source_line"]: split for split in SPLITS for row in tables[split]}
    assert set(split_of_line.values()) == set(SPLITS)
    assert all(split_of_line[line] == split_of_line[line + 40] for line in range(1, 41))


def test_a_named_field_keeps_its_chats_in_one_split(tmp_path):
    chats = [
        chat(distinct_words(number), distinct_words(-number), customer=number % 15)
        for number in range(90)
    ]
    chats.append(chat("Who asks?"))
    tables, _ = clean(chats, tmp_path, split_by="customer", **EVENLY)
    splits_of_customer: dict[int, set[str]] = {}
    for split in SPLITS:
        for row in tables[split]:
            customer = chats[row["source_line"] - 1]["customer"]
            splits_of_customer.setdefault(customer, set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of_customer.values())
    assert set.union(*splits_of_customer.values()) == set(SPLITS)
    assert rejections(tables) == {91: ("no field to split by", "customer")}


@pytest.fixture(scope="module")
def many_chats():
    """Three thousand chats, some of them damaged, duplicates or near duplicates."""
    chats = []
    for number in range(3000):
        answer = distinct_words(number)
        if number % 50 == 7:
            answer = distinct_words(number - 5) + " and one more"
        if number % 90 == 11:
            chats.append({"messages": [{"role": "user", "content": "No answer."}]})
        elif number % 100 == 3:
            chats.append(chats[number // 2])
        else:
            chats.append(chat(f"Question {number}", answer))
    return chats


def contents(folder):
    return {name: files.sha256(folder / "clean" / name) for name in OUTPUTS}


@pytest.fixture(scope="module")
def cleaned_alone(many_chats, tmp_path_factory):
    """Folder of these chats, cleaned by one process."""
    folder = tmp_path_factory.mktemp("alone")
    tables, report = clean(many_chats, folder, **EVENLY)
    assert report["rejected_by_reason"].keys() >= {"duplicate", "near duplicate"}
    assert len(kept(tables)) + report["n_rejected"] == 3000
    return folder


def test_more_processes_write_the_same_bytes(many_chats, cleaned_alone):
    tokens = contents(cleaned_alone)
    settings = {"cleaning": EVENLY}
    clean_dataset.main(arguments(cleaned_alone, {"chats": many_chats}, settings, processes=3))
    assert contents(cleaned_alone) == tokens


def test_a_killed_stage_leaves_no_output_and_a_second_run_writes_the_same_bytes(
    many_chats, cleaned_alone
):
    expected = contents(cleaned_alone)
    flags = arguments(cleaned_alone, {"chats": many_chats}, {"cleaning": EVENLY}, processes=2)
    for name in OUTPUTS:
        (cleaned_alone / "clean" / name).unlink()
    scratch = cleaned_alone / "clean" / ".scratch"
    for wait in (0.0, 0.3):
        stage = subprocess.Popen(
            [sys.executable, "-m", STAGE, *flags], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not list(scratch.glob("*.arrow")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        stage.send_signal(signal.SIGKILL)
        stage.wait()
        assert scratch.exists(), "it was done before it was killed"
    clean_dataset.main(flags)
    assert contents(cleaned_alone) == expected
    assert sorted(path.name for path in (cleaned_alone / "clean").iterdir()) == sorted(OUTPUTS)


def test_near_duplicates_across_splits_leave_training_first(tmp_path):
    """The question decides the split, so forty chats with one long answer are in all three."""
    chats = [chat(f"{number}?", distinct_words(1, n=400)) for number in range(40)]
    chats += [chat(f"Other {number}?", distinct_words(number + 5)) for number in range(40)]
    before, _ = clean(chats, tmp_path / "a", near_duplicates=None, decontamination=None, **EVENLY)
    tables, report = clean(chats, tmp_path / "b", decontamination=None, **EVENLY)
    splits = {row["source_line"]: split for split in SPLITS for row in before[split]}
    assert {splits[line] for line in range(1, 41)} == set(SPLITS)
    first = min(line for line in range(1, 41) if splits[line] == "test")
    left = [row["source_line"] for row in kept(tables) if row["source_line"] <= 40]
    assert left == [first]
    assert report["rejected_by_reason"] == {"near duplicate": 39}
    reason, detail = rejections(tables)[1 if first != 1 else 2]
    similarity, _, twin = detail.partition("% of ")
    assert int(similarity) >= 80
    assert twin == f"{tmp_path / 'b' / 'chats.jsonl'}:{first}"


def test_training_rows_that_contain_held_out_text_are_dropped(tmp_path):
    """A test conversation of sixty words is quoted in a training conversation of three hundred."""
    chats = [chat(f"Question {number}", distinct_words(number)) for number in range(60)]
    tables, _ = clean(chats, tmp_path / "a", **EVENLY)
    held_out = tables["test"][0]["messages"][1]["content"]
    quoting = [
        chat(f"Quote {number}", f"{distinct_words(100 + number, n=240)} {held_out}")
        for number in range(9)
    ]
    tables, report = clean([*chats, *quoting], tmp_path / "b", **EVENLY)
    lines = {row["source_line"] for row in tables["train"]}
    assert lines and max(lines) <= 60
    dropped = [reason for line, (reason, _) in rejections(tables).items() if line > 60]
    assert dropped == ["overlaps with held-out text"] * len(dropped) and dropped
    # In a held-out split the quotation does no harm, and it stays.
    held_out_lines = {row["source_line"] for row in tables["test"] + tables["validation"]}
    assert len(dropped) + len([line for line in held_out_lines if line > 60]) == 9


def test_training_rows_that_contain_text_of_an_evaluation_file_are_dropped(tmp_path):
    asked = distinct_words(1, n=25)
    benchmark = tmp_path / "benchmark.csv"
    benchmark.write_text(f"question,answer\n{asked},42\n", encoding="utf-8")
    chats = [chat(f"Question {number}", distinct_words(number + 5)) for number in range(50)]
    chats.append(chat(f"Please solve: {asked}", distinct_words(3, n=200)))
    settings = {"validation_fraction": 0, "test_fraction": 0}
    tables, _ = clean(chats, tmp_path / "a", **settings)
    assert len(tables["train"]) == 51
    tables, _ = clean(chats, tmp_path / "b", evaluation_files=[benchmark], **settings)
    assert rejections(tables).keys() == {51}
    assert rejections(tables)[51][0] == "overlaps with held-out text"


def test_a_source_is_seen_as_often_as_its_weight_says(tmp_path):
    records = {
        name: [chat(f"{name} {number}", distinct_words((at, number))) for number in range(300)]
        for at, name in enumerate(("rare", "plain", "often"))
    }
    sources = {"rare": {"weight": 0.3}, "often": {"weight": 2.5}}
    tables, report = clean(
        records, tmp_path, sources=sources, validation_fraction=0.1, test_fraction=0.1
    )
    copies = {name: Counter() for name in records}
    for row in tables["train"]:
        copies[row["source"]][row["n_copies"]] += 1
    assert set(copies["rare"]) == set(copies["plain"]) == {1}
    assert set(copies["often"]) == {2, 3}
    n_often = sum(copies["often"].values())
    assert 0.4 < copies["often"][3] / n_often < 0.6
    n_rare_left_out = report["rejected_by_reason"]["left out by its source's weight"]
    assert 0.6 < n_rare_left_out / (n_rare_left_out + copies["rare"][1]) < 0.8
    assert all(row["n_copies"] == 1 for row in tables["validation"] + tables["test"])
    held_out = Counter(row["source"] for row in tables["validation"] + tables["test"])
    assert held_out["rare"] > 30, "held-out splits are not weighted"
    assert report["n_train_weighted"] == sum(row["n_copies"] for row in tables["train"])
    assert report["by_source"]["rare"]["n_rejected"] == n_rare_left_out
    again, _ = clean(
        {**records, "rare": records["rare"][::-1]}, tmp_path, sources=sources,
        validation_fraction=0.1, test_fraction=0.1,
    )  # fmt: skip
    assert {row["id"] for row in again["train"]} == {row["id"] for row in tables["train"]}


def test_texts_are_repaired_and_the_repair_is_counted(tmp_path):
    chats = [chat("Caf\u00c3\u00a9?", "Yes."), chat("Plain?", "  Yes. ")]
    tables, report = clean(chats, tmp_path, min_characters=0)
    rows = {row["source_line"]: row for row in kept(tables)}
    assert rows[1]["messages"][0]["content"] == "Caf\u00e9?"
    assert rows[1]["corrections"] == ["Unicode repaired"]
    assert rows[2]["messages"][1]["content"] == "Yes."
    assert report["n_corrected"] == 1
    untouched, _ = clean(chats, tmp_path / "b", unicode="keep", whitespace="keep")
    rows = {row["source_line"]: row for row in kept(untouched)}
    assert rows[1]["messages"][0]["content"] == "Caf\u00c3\u00a9?"
    assert rows[2]["messages"][1]["content"] == "  Yes. "


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"min_characters": 12}, ("too short", "10 characters")),
        ({"max_characters": 9}, ("too long", "10 characters")),
    ],
)
def test_a_length_outside_the_limits_is_rejected(settings, expected, tmp_path):
    chats = [chat("abcd", "efghi"), *(chat(f"{at}", "x" * 12) for at in range(30))]
    if "max_characters" in settings:
        chats = [chats[0], *(chat(f"{at}", "y") for at in range(30))]
    tables, _ = clean(chats, tmp_path, near_duplicates=None, **settings)
    assert rejections(tables) == {1: expected}


def test_only_the_requested_languages_are_kept(tmp_path):
    english = "The quick brown fox jumps over the lazy dog, and nobody in the village minds."
    german = (
        "Der schnelle braune Fuchs springt \u00fcber den faulen Hund, und niemand st\u00f6rt sich."
    )
    chats = [chat(english, f"{english} Yes."), chat(german, f"{german} Ja.")]
    settings = {"languages": ["en"], "max_rejected_fraction": 1}
    tables, report = clean([*chats, *chats], tmp_path, test_fraction=0, **settings)
    assert [row["source_line"] for row in kept(tables)] == [1]
    reason, detail = rejections(tables)[2]
    assert reason == "another language"
    assert detail.startswith("de (")


def test_an_unknown_language_code_stops_the_stage(tmp_path):
    with pytest.raises(StageError, match="a language is unknown") as error:
        clean([chat("One?")], tmp_path, languages=["en", "eng"])
    assert "found:    eng" in str(error.value)
    assert " de dz el en " in str(error.value)


PERSONAL = {
    "messages": [
        {"role": "user", "content": "Write to ada@example.org for me."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "abcdefghi",
                    "type": "function",
                    "function": {
                        "name": "send",
                        "arguments": json.dumps({"to": ["ada@example.org"], "n": 1}),
                    },
                }
            ],
        },
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "sent to ada@example.org"},
        {"role": "assistant", "content": "Done."},
    ]
}


@pytest.mark.parametrize("policy", ["off", "report", "redact"])
def test_personal_data_is_ignored_counted_or_replaced_everywhere(policy, tmp_path):
    tables, report = clean([PERSONAL], tmp_path, personal_data=policy, test_fraction=0)
    (row,) = kept(tables)
    text = json.dumps(row["messages"])
    assert report["personal_data"] == ({} if policy == "off" else {"email": 3})
    assert ("ada@" in text) == (policy != "redact")
    assert text.count("[EMAIL]") == (3 if policy == "redact" else 0)
    called = json.loads(row["messages"][1]["tool_calls"][0]["function"]["arguments"])
    assert called["n"] == 1


def test_reference_answers_are_kept_and_change_nothing_else(tmp_path):
    marks = [None, "42", 42, ["a", " b "], "", [], {"no": "text"}, True, "caf\u00c3\u00a9"]
    chats = [
        chat(f"{at}?", distinct_words(at), **({} if mark is None else {"right": mark}))
        for at, mark in enumerate(marks)
    ]
    columns = {"columns": {"reference": "right"}}
    with_marks, report = clean(chats, tmp_path / "a", sources={"chats": columns}, **EVENLY)
    without, report_without = clean(chats, tmp_path / "b", **EVENLY)
    found = {row["source_line"]: row["references"] for row in kept(with_marks)}
    right = [None, ["42"], ["42"], ["a", "b"], None, None, None, None, ["café"]]
    assert [found[line] for line in sorted(found)] == right
    assert report["n_with_reference"] == 4 and report_without["n_with_reference"] == 0
    for split in SPLITS:
        assert [(row["id"], spoken(row)) for row in with_marks[split]] == [
            (row["id"], spoken(row)) for row in without[split]
        ]


def test_personal_data_in_a_reference_is_redacted_like_that_in_the_conversation(tmp_path):
    said = [chat("Whom do I ask?", "Ask ada@example.org.", reference="ada@example.org")]
    for policy, expected in (("report", "ada@example.org"), ("redact", "[EMAIL]")):
        tables, report = clean(said, tmp_path, personal_data=policy)
        assert [row["references"] for row in kept(tables)] == [[expected]]
        assert report["personal_data"] == {"email": 1}


def test_too_many_rejections_stop_the_stage(tmp_path):
    chats = [chat(f"{at}", distinct_words(at)) for at in range(8)]
    chats += [{"messages": [{"role": "user", "content": "Hm?"}]}, chats[0], chats[0], chats[0]]
    with pytest.raises(StageError) as error:
        clean(chats, tmp_path, max_rejected_fraction=0.05)
    message = str(error.value)
    assert message.startswith("1 of 12 conversations cannot be used\n")
    assert f"{tmp_path / 'chats.jsonl'}:9: " in message
    assert "8.3% rejected" in message
    assert "at most 5.0% (datasets.<name>.cleaning.max_rejected_fraction)" in message
    clean(chats, tmp_path, max_rejected_fraction=0.1)


def test_a_dataset_without_training_rows_stops_the_stage(tmp_path):
    with pytest.raises(StageError, match="no conversation is left for training"):
        clean([chat("One?")], tmp_path, validation_fraction=0.5, test_fraction=0.499999)


def test_files_without_records_stop_the_stage(tmp_path):
    with pytest.raises(StageError, match="the dataset has no records"):
        clean([], tmp_path)
