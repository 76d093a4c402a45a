"""Inputs and releases on S3-compatible storage, through Snakemake and a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.s3_server import S3Server, s3_server
from tests.workflow.conftest import DEMO, Snakemake, jobs_of
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
    command = (TRAIN, REPORT, "--cores", 1, "--configfile", DEMO, config)

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


def write_release(folder: Path, run: str, **contents: bytes) -> Path:
    """A release as package_release leaves it, by hand."""
    release = folder / "results" / "runs" / run / "release"
    release.mkdir(parents=True, exist_ok=True)
    for path in release.iterdir():
        path.unlink()
    for name, content in contents.items():
        (release / name).write_bytes(content)
    lines = [f"{files.sha256(release / name)}  {name}\n" for name in sorted(contents)]
    (release / "SHA256SUMS").write_text("".join(lines))
    (release / ".snakemake_timestamp").touch()
    return release


def store(config: Path) -> tuple[object, ...]:
    """Arguments that store the releases, and make none."""
    rules = ("--allowed-rules", "store", "store_release")
    setting = "storage={releases: 's3://chats/releases'}"
    return ("store", "--cores", 1, *rules, "--configfile", DEMO, config, "--config", setting)


def test_a_release_is_stored_whole_and_again_only_when_it_changed(
    workflow: Snakemake, tmp_path: Path, s3: S3Server
) -> None:
    command = store(overlay(tmp_path, "data/sample-chats.jsonl"))
    release = write_release(tmp_path, "mine", **{"a.gguf": b"GGUF" * 1000, "b.gguf": b"GGUF"})
    result = workflow(*command)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    here = {f"releases/mine/{path.name}": path.read_bytes() for path in release.glob("[!.]*")}
    assert s3.objects("releases/mine/") == here
    assert jobs_of(workflow("-n", *command)) == {}

    # Of the next release one file is the same, one is new and one is gone.
    write_release(tmp_path, "mine", **{"a.gguf": b"GGUF" * 1000, "c.gguf": b"GGUF"})
    assert workflow(*command).returncode == 0
    assert what_happened(tmp_path) == ["there a.gguf", "sent c.gguf", "removed b.gguf"]
    names = {key.rpartition("/")[2] for key in s3.objects("releases/mine/")}
    assert names == {"a.gguf", "c.gguf", "SHA256SUMS"}


def what_happened(folder: Path) -> list[str]:
    log = (folder / "logs" / "runs" / "mine" / "store_release.log").read_text()
    return [f"{line.split()[0]} {line.rpartition('/')[2]}" for line in log.splitlines()]


def test_a_broken_upload_leaves_nothing_that_looks_whole_and_the_next_goes_on(
    workflow: Snakemake, tmp_path: Path, s3: S3Server
) -> None:
    command = store(overlay(tmp_path, "data/sample-chats.jsonl"))
    s3.put("releases/mine/SHA256SUMS", b"of the release before")
    write_release(tmp_path, "mine", **{"a.gguf": b"GGUF" * 1000, "b.gguf": b"GGUF"})
    s3.refused.add("b.gguf")
    result = workflow(*command)
    assert result.returncode == 1
    assert "b.gguf" in result.stderr and "AccessDenied" in result.stderr
    assert s3.objects("releases/mine/").keys() == {"releases/mine/a.gguf"}

    s3.refused.clear()
    assert workflow(*command).returncode == 0
    assert what_happened(tmp_path) == ["there a.gguf", "sent b.gguf"]
    assert "releases/mine/SHA256SUMS" in s3.objects()


def test_without_a_place_or_a_plugin_the_message_says_what_is_missing(
    workflow: Snakemake, tmp_path: Path
) -> None:
    result = workflow(
        "store", "-n", "--configfile", DEMO, overlay(tmp_path, "data/sample-chats.jsonl")
    )
    assert result.returncode == 1
    assert "storage.releases" in result.stdout + result.stderr
    result = workflow(
        "data", "-n", "--configfile", DEMO, overlay(tmp_path, "gs://bucket/chats.jsonl")
    )
    assert result.returncode == 1
    assert "pip install snakemake-storage-plugin-gcs" in result.stdout + result.stderr
