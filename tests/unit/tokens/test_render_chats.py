from __future__ import annotations

import json
from collections import Counter

import pyarrow as pa
import pytest

from tests.unit.chats.generated_chats import ChatGenerator
from tests.unit.prepared_chats import tool_chat, write_clean
from workflow_scripts import files
from workflow_scripts.chats.messages import SPLITS
from workflow_scripts.demo.stdlib_chats import make_chats
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.tokens import render_chats, rendered_batches, token_parity
from workflow_scripts.tokens.documents import Documents

STAGE = "workflow_scripts.tokens.render_chats"
OUTPUTS = [*(f"{split}.arrow" for split in SPLITS), "rejected.parquet", "rendering_report.json"]


def arguments(clean, tokenizer, folder, n_processes=1, **settings):
    return [
        *("--clean", str(clean), "--tokenizer", str(tokenizer)),
        *("--settings", json.dumps(settings), "--processes", str(n_processes)),
        *("--tokens", str(folder)),
    ]


@pytest.fixture
def render(tokenizer_v3, tmp_path):
    """Renders chats of the training split; returns the folder of the tokens."""

    def run(chats, **settings):
        clean = write_clean(tmp_path / "clean", {"train": chats})
        options = {"max_rejected_fraction": 1, **settings}
        render_chats.main(arguments(clean, tokenizer_v3, tmp_path / "tokens", **options))
        return tmp_path / "tokens"

    return run


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--tokens" in done.stdout and "--processes" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers", "mistral_common", "pyarrow"})


@pytest.mark.parametrize("split", SPLITS)
def test_every_clean_chat_is_a_document_in_the_same_order(rendered, tokenizer_v3, split):
    chats = files.read_parquet(rendered.clean / f"{split}.parquet").to_pylist()
    documents = Documents(rendered.tokens / f"{split}.arrow")
    assert documents.ids == [chat["id"] for chat in chats] != []
    assert documents.n_copies.tolist() == [chat["n_copies"] for chat in chats]
    official = load_mistral_tokenizer(tokenizer_v3, for_training=True)
    table = files.read_arrow(rendered.tokens / f"{split}.arrow").to_pylist()
    for chat, document, row in zip(chats, documents, table, strict=True):
        expected = token_parity.official_tokens(official, chat["messages"], chat["tools"])
        assert document.input_ids.tolist() == expected
        answers = [m for m in chat["messages"] if m["role"] in ("assistant", "text")]
        learned = [answer for answer in answers if answer["weight"] != 0]
        supervised = document.input_ids[document.is_supervised].tolist()
        assert supervised.count(2) == len(learned)
        assert len(row["supervised_spans"]) == 2 * len(learned)
        assert row["n_supervised_tokens"] == len(supervised)
        assert row["n_tokens"] == len(document.input_ids)
        start, end = row["supervised_spans"][-2:]
        assert (
            official.decode(document.input_ids[start : end - 1].tolist())
            == (learned[-1]["content"])
        )


def test_tool_calls_are_supervised_and_tool_results_are_not(render, tokenizer_v3):
    tokens = render([tool_chat("So.", result="the secret")])
    document = Documents(tokens / "train.arrow")[0]
    official = load_mistral_tokenizer(tokenizer_v3, for_training=True)
    learned = official.decode(document.input_ids[document.is_supervised].tolist())
    assert "weather" in learned and "Zürich" in learned and "So." in learned
    assert "secret" not in learned and "secret" in official.decode(document.input_ids.tolist())


def test_only_the_last_turn_is_supervised_if_the_config_says_so(render):
    turns = [
        *({"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."}),
        *({"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Second."}),
    ]
    tokens = render([{"messages": turns}], supervise="last_turn")
    document = Documents(tokens / "train.arrow")[0]
    closes = document.is_supervised[document.input_ids == 2]
    assert closes.tolist() == [False, True]
    assert files.read_arrow(tokens / "train.arrow")["supervised_spans"][0][0].as_py() > 10


def test_a_conversation_that_cannot_be_rendered_is_rejected_with_place_and_reason(render):
    question = {"role": "user", "content": "What?"}
    masked = {"role": "assistant", "content": "That.", "weight": 0}
    tokens = render(
        [
            {"messages": [question, {"role": "assistant", "content": "Right."}]},
            {"messages": [question, masked], "source": "web", "source_file": "w.jsonl"},
            {"messages": [question]},
            {"messages": [question, {"role": "assistant", "content": "word " * 50}]},
        ],
        max_document_tokens=20,
    )
    rejected = files.read_parquet(tokens / "rejected.parquet").to_pylist()
    assert [row["reason"] for row in rejected] == [
        "no supervised token",
        "mistral-common refuses it (InvalidMessageStructureException)",
        "too many tokens",
    ]
    assert rejected[0] | {"reason": None, "detail": None} == {
        **{"id": "train-1", "source": "web", "source_file": "w.jsonl", "source_line": 2},
        **{"reason": None, "detail": None},
    }
    assert "Assistant" in rejected[1]["detail"]
    assert rejected[2]["detail"].endswith(" tokens, at most 20 wanted")
    report = files.read_json(tokens / "rendering_report.json")
    assert report["n_rejected_by_reason"] == Counter(row["reason"] for row in rejected)
    assert (report["n_documents"], report["n_rejected"]) == (1, 3)
    assert Documents(tokens / "train.arrow").ids == ["train-0"]


def test_the_report_adds_up(rendered):
    report = files.read_json(rendered.tokens / "rendering_report.json")
    for split in SPLITS:
        documents = Documents(rendered.tokens / f"{split}.arrow")
        part = report["splits"][split]
        assert part["n_documents"] == len(documents)
        assert part["n_tokens"] == documents.lengths.sum()
        assert part["n_supervised_tokens"] == documents.n_supervised.sum()
        for edge, n in part["n_documents_up_to_tokens"].items():
            assert (
                n == ((documents.lengths <= int(edge)) & (documents.lengths > int(edge) / 2)).sum()
            )
    for name in ("n_documents", "n_tokens", "n_supervised_tokens"):
        assert report[name] == sum(part[name] for part in report["splits"].values())


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two and a half batches of generated chats, some of which cannot be rendered."""
    generator = ChatGenerator(seed=3)
    chats = []
    for _ in range(2500):
        messages, tools = generator.conversation()
        chats.append({"messages": messages, "tools": tools})
    return write_clean(tmp_path_factory.mktemp("many"), {"train": chats, "test": chats[:10]})


def test_the_files_are_the_same_bytes_for_any_number_of_processes(
    run_stage, many, tokenizer_v3, tmp_path
):
    written = []
    for n_processes in (1, 2):
        folder = tmp_path / str(n_processes)
        done = run_stage(
            STAGE, *arguments(many, tokenizer_v3, folder, n_processes, max_rejected_fraction=1)
        )
        assert done.returncode == 0, done.stderr
        assert "INFO render_chats: rendered n_documents=" in done.stderr
        assert "tokens_per_second=" in done.stderr
        assert sorted(path.name for path in folder.iterdir()) == sorted(OUTPUTS)
        written.append([(folder / name).read_bytes() for name in OUTPUTS])
    assert written[0] == written[1]
    assert len(Documents(folder / "train.arrow")) > 2000


def test_columns_are_read_as_to_pylist_reads_them(many):
    table = files.read_parquet(many / "train.parquet").slice(100, 900).combine_chunks()
    column = table["messages"].chunk(0)
    expected = column.to_pylist()
    found = list(rendered_batches.read_messages(column))
    assert len(found) == 900
    for messages, of_arrow in zip(found, expected, strict=True):
        assert [{**dict.fromkeys(row), **m} for m, row in zip(messages, of_arrow, strict=True)] == (
            of_arrow
        )


def test_an_empty_split_is_an_empty_file(render):
    tokens = render([])
    for split in SPLITS:
        assert len(Documents(tokens / f"{split}.arrow")) == 0
    assert files.read_parquet(tokens / "rejected.parquet").num_rows == 0


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
def test_too_many_rejections_stop_the_stage_and_leave_nothing(
    run_stage, rendered, tokenizer_v3, tmp_path, settings, parts
):
    folder = tmp_path / "tokens"
    done = run_stage(STAGE, *arguments(rendered.clean, tokenizer_v3, folder, **settings))
    assert done.returncode == 1
    for part in ("render_chats: ", *parts):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not folder.exists() or not list(folder.iterdir())


def test_a_folder_without_tokenizer_stops_the_stage(run_stage, rendered, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run_stage(STAGE, *arguments(rendered.clean, tmp_path / "empty", tmp_path / "tokens"))
    assert done.returncode == 1
    assert "render_chats: the checkpoint has no tokenizer" in done.stderr
    assert "Traceback" not in done.stderr


def test_offsets_of_more_than_2_31_tokens_do_not_wrap():
    import numpy as np

    lengths = np.array([2**31 - 1, 5], dtype=np.int32)
    assert rendered_batches.offsets(lengths, np.int64).tolist() == [0, 2**31 - 1, 2**31 + 4]
    assert pa.array(rendered_batches.offsets(lengths, np.int64)).type == pa.int64()


def as_sharegpt(chat):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {
        "conversations": [
            {"from": names[message["role"]], "value": message["content"]}
            for message in chat["messages"]
        ]
    }


def as_prompt_and_completion(chat):
    question, answer = chat["messages"]
    return {"prompt": question["content"], "completion": answer["content"]}


def write_csv(path, records):
    import csv
    import gzip

    with gzip.open(path, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(records[0])
        writer.writerows(record.values() for record in records)


def write_parquet(path, records):
    files.write_parquet(path, pa.Table.from_pylist(records))


@pytest.mark.parametrize(
    ("name", "shape", "write"),
    [
        ("chats.parquet", as_sharegpt, write_parquet),
        ("chats.csv.gz", as_prompt_and_completion, write_csv),
        ("chats.json", as_sharegpt, lambda path, records: path.write_text(json.dumps(records))),
    ],
)
def test_the_same_chats_in_another_format_have_identical_tokens(
    tokenizer_v3, tmp_path, name, shape, write
):
    from workflow_scripts.chats import clean_dataset

    chats = make_chats(n_conversations=200, seed=1)
    if shape is as_prompt_and_completion:  # this format has one turn and no system prompt
        turns = [[one for one in chat["messages"] if one["role"] != "system"] for chat in chats]
        chats = [{"messages": messages[:2]} for messages in turns]
    files.write_jsonl(tmp_path / "chats.jsonl", [{"messages": c["messages"]} for c in chats])
    write(tmp_path / name, [shape(chat) for chat in chats])
    tokens = []
    for source in ("chats.jsonl", name):
        folder = tmp_path / f"of {source}"
        clean_dataset.main(
            ["--source", "all", str(tmp_path / source), "--settings", "{}"]
            + ["--clean", str(folder / "clean")]
        )
        render_chats.main(arguments(folder / "clean", tokenizer_v3, folder / "tokens"))
        tokens.append([(folder / "tokens" / output).read_bytes() for output in OUTPUTS[:3]])
    assert tokens[0] == tokens[1]
    assert len(Documents(folder / "tokens" / "train.arrow")) > 40
