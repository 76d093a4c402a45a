"""Git LFS pointers and web pages in place of a user's files stop a build before its first job."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import DEMO, TINY

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 587591\n"


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("datasets.mine", {"datasets": {"mine": {"files": ["FILE"]}}}),
        ("evaluation.texts.mine", {"evaluation": {"texts": {"mine": "FILE"}}}),
        ("gguf.imatrix.files", {"gguf": {"imatrix": {"files": ["FILE"]}}}),
    ],
)
def test_a_pointer_in_place_of_a_users_file_is_named(workflow, tmp_path: Path, key, config) -> None:
    (tmp_path / "mine.jsonl").write_text(POINTER)
    overlay = yaml.safe_dump(config).replace("FILE", "mine.jsonl")
    if key.startswith("datasets"):
        overlay += "runs: {mistral: {dataset: mine}}\n"
    (tmp_path / "overlay.yaml").write_text(overlay)
    result = workflow("-n", "--cores", 2, "--configfile", DEMO, TINY, "overlay.yaml")
    assert result.returncode == 1
    said = result.stdout + result.stderr
    for part in (f"{key}: a file is a Git LFS pointer", "mine.jsonl", "git lfs pull"):
        assert part in said
    assert "Traceback" not in said


def test_a_pointer_in_place_of_an_adapter_is_named(workflow, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "adapter_config.json").write_text("{}")
    (tmp_path / "given" / "adapter_model.safetensors").write_text(POINTER)
    run = {"model": "demo", "dataset": "stdlib-help", "adapter": "./given"}
    (tmp_path / "overlay.yaml").write_text(
        yaml.safe_dump({"runs": {"mine": run}, "build": ["mine"]})
    )
    result = workflow("-n", "--cores", 2, "--configfile", DEMO, TINY, "overlay.yaml")
    assert result.returncode == 1
    assert "runs.mine: a file is a Git LFS pointer" in result.stdout + result.stderr
