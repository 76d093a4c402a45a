"""Releases of the workflow itself, used as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.workflow.conftest import DEMO, REPOSITORY, TINY, snakemake_in
from workflow_scripts import files


def test_a_release_is_chatted_with_as_it_is(tiny: Path) -> None:
    release = tiny / "results" / "runs" / "mistral" / "release"
    command = [sys.executable, "-m", "workflow_scripts.serve.chat", str(release)]
    done = subprocess.run(
        [*command, "--max-tokens", "8", "--threads", "1", "--seed", "0"],
        cwd=REPOSITORY,
        input="What does len do?\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("mistral, ")
    assert done.stdout.strip()


def test_its_provenance_has_settings_hashes_and_durations(tiny: Path) -> None:
    release = tiny / "results" / "runs" / "mistral" / "release"
    provenance = files.read_json(release / "provenance.json")
    assert provenance["config"]["recipe"]["max_steps"] == 3
    assert provenance["config"]["dataset"]["generate"]["n_conversations"] == 120
    clean = tiny / "results" / "data" / "stdlib-help" / "clean"
    for split in ("train", "validation", "test"):
        name = f"{split}.parquet"
        assert provenance["dataset_files"][name]["sha256"] == files.sha256(clean / name)
    steps = {"train_adapter", "merge_adapter", "convert_gguf", "quantize_gguf/Q8_0"}
    assert steps <= provenance["duration_seconds"].keys()
    assert str(tiny) not in (release / "provenance.json").read_text()


def test_push_release_is_a_dry_run_of_every_built_run(tiny: Path) -> None:
    result = snakemake_in(tiny)(
        "push_release",
        "--cores",
        1,
        "--configfile",
        DEMO,
        TINY,
        "--config",
        "push={owner: me}",
        "--allowed-rules",
        "push_release",
    )
    assert result.returncode == 0, result.stderr
    printed = (tiny / "logs" / "push_release.log").read_text()
    for run in ("generic", "mistral"):
        assert f"me/{run}-GGUF/{run}-Q4_K_M.gguf" in printed
    assert "nothing was uploaded" in printed
