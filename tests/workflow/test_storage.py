"""Inputs and releases on S3-compatible storage, through Snakemake and a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.s3_server import S3Server, s3_server
from tests.workflow.conftest import Snakemake, jobs_of
from workflow_scripts import files

TRAIN = "results/data/mine/clean/train.parquet"
REPORT = "results/data/mine/clean/cleaning_report.json"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server(monkeypatch) as server:
        yield server


def chats(n: int) -> bytes:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows = [
        {
            "messages": [
                turn("user", f"What is {i} squared?"),
                turn("assistant", f"{i} × {i} = {i * i}"),
            ]
        }
        for i in range(n)
    ]
    # One that is rejected, so that a table says where it came from.
    return "\n".join(map(json.dumps, [*rows, {"messages": []}])).encode()


def overlay(folder: Path, *names: str, **cleaning: object) -> Path:
    """A config whose one run is on these files."""
    content = {
        "datasets": {
            "mine": {
                "files": list(names),
                "cleaning": {"near_duplicates": None, "max_rejected_fraction": 0.5, **cleaning},
            }
        },
        "runs": {
            "mine": {
                "model": "demo",
                "dataset": "mine",
                "packing": "standard-demo",
                "recipe": "generic-lora-demo",
            }
        },
        "build": ["mine"],
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_dataset_on_storage_is_cleaned_and_once_more_when_it_changes(
    workflow: Snakemake, tmp_path: Path, s3: S3Server
) -> None:
    url = s3.put("folder/chats.jsonl", chats(30))
    held_out = s3.put("folder/held-out.jsonl", b'{"text": "nothing of the chats"}\n')
    config = overlay(tmp_path, url, decontamination={"files": [held_out]})
    command = (TRAIN, REPORT, "--cores", 1, "--configfile", config)

    result = workflow(*command)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    folder = (tmp_path / TRAIN).parent
    assert files.read_json(tmp_path / REPORT)["n_read"] == 31
    rejected = files.read_parquet(folder / "rejected.parquet").to_pylist()
    assert {row["source_file"] for row in rejected} == {url}
    assert jobs_of(workflow("-n", *command)) == {}

    s3.put("folder/chats.jsonl", chats(40))
    assert jobs_of(workflow("-n", *command)) == {"clean_dataset": 1}
    assert workflow(*command).returncode == 0
    assert files.read_json(tmp_path / REPORT)["n_read"] == 41
