"""One tiny build of the whole workflow, shared by the tests that look at what it made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "config" / "demo.yaml"
TINY = REPOSITORY / "tests" / "workflow" / "tiny.yaml"
WORKFLOW = ("Snakefile", "config", "profiles", "rules", "envs", "workflow_scripts", "data")

Snakemake = Callable[..., subprocess.CompletedProcess[str]]


def copy_workflow(folder: Path) -> None:
    """What git holds of the workflow, in another folder: tests never touch the results here."""
    for name in WORKFLOW:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / name)


def snakemake_in(folder: Path, **environment: str) -> Snakemake:
    """Snakemake run in a folder, its output as text; the exit code is the caller's to judge."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "snakemake", "--nocolor", *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def workflow(tmp_path: Path) -> Snakemake:
    """Snakemake in a fresh copy of the workflow, in which nothing has been built."""
    copy_workflow(tmp_path)
    return snakemake_in(tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny build of both runs."""
    folder = tmp_path_factory.mktemp("tiny")
    copy_workflow(folder)
    result = snakemake_in(folder)("--cores", os.cpu_count() or 1, "--configfile", DEMO, TINY)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return folder


def jobs_of(result: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """Rule → jobs of a dry run; targets that only gather are left out."""
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    text = result.stdout + result.stderr
    if "Nothing to be done" in text:
        return {}
    # The table stands at the beginning and at the end.
    table = text.split("Job stats:", 1)[1].split("\ntotal", 1)[0]
    counts = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.M)}
    return {name: count for name, count in counts.items() if name not in {"all", "report"}}
