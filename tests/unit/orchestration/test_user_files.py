from __future__ import annotations

import pytest
from snakemake.exceptions import WorkflowError

from tests.unit.orchestration.test_build import wildcards
from workflow_scripts.orchestration.user_files import UserFiles, name_of


class Stored(str):
    """An input, as a storage plugin returns it for a URL."""

    def __new__(cls, url: str) -> Stored:
        stored = super().__new__(cls, f".snakemake/storage/{url.removeprefix('s3://')}")
        query = type("Object", (), {"query": url})()
        stored.flags = {"storage_object": query}
        return stored


def chats(*files: str) -> dict:
    """An overlay with one run, on the user's files."""
    return {
        "datasets": {"mine": {"files": list(files)}},
        "runs": {"mistral": {"dataset": "mine"}},
        "build": ["mistral"],
    }


@pytest.fixture
def user_files(build):
    return lambda overlay: UserFiles(build(overlay), Stored)


def test_files_of_every_source_are_inputs_and_arguments(user_files, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    found = user_files(chats(str(path), "s3://bucket/b.jsonl"))
    of_dataset = wildcards(dataset="mine")
    assert found.of_dataset(of_dataset) == [str(path), ".snakemake/storage/bucket/b.jsonl"]
    assert found.source_arguments(of_dataset) == [
        *("--source", "all", str(path), "s3://bucket/b.jsonl"),
        *("--fetched", "s3://bucket/b.jsonl", ".snakemake/storage/bucket/b.jsonl"),
    ]
    assert [name_of(file) for file in found.of_dataset(of_dataset)][1] == "s3://bucket/b.jsonl"


@pytest.mark.parametrize(
    ("overlay", "key"),
    [
        (chats("missing.jsonl"), "datasets.mine"),
        (
            {"runs": {"mistral": {"packing": None, "recipe": None, "adapter": "./missing"}}},
            "runs.mistral",
        ),
    ],
)
def test_a_missing_file_stops_before_any_job(user_files, overlay, key):
    with pytest.raises(WorkflowError) as caught:
        user_files(overlay).look_for_all()
    assert str(caught.value).startswith(f"{key}: ") and "missing" in str(caught.value)


def test_a_placeholder_for_a_text_stops_before_any_job(user_files, tmp_path):
    pointer = tmp_path / "wiki.txt"
    pointer.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n"
    )
    overlay = {"evaluation": {"texts": {"wiki": str(pointer)}}}
    with pytest.raises(WorkflowError, match="evaluation.texts.wiki: ") as caught:
        user_files(overlay).look_for_all()
    assert str(pointer) in str(caught.value)


def test_a_folder_of_tasks_needs_a_task_file(user_files, tmp_path):
    (tmp_path / "data.jsonl").write_text("{}\n")
    found = user_files({"evaluation": {"tasks": {"include": str(tmp_path)}}})
    with pytest.raises(WorkflowError, match="there is no task file"):
        found.tasks()
    (tmp_path / "task.yaml").write_text("task: mine\n")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "task.pyc").write_text("x")
    assert found.tasks() == [str(tmp_path / "data.jsonl"), str(tmp_path / "task.yaml")]
    assert user_files({}).tasks() == []
