"""Fixtures that several rooms share: real files and real processes, made once a session."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

from workflow_scripts.models.exported_tokenizer import export

REPOSITORY = Path(__file__).resolve().parents[1]
IMPORTED = re.compile(r"^import time:\s*\d+ \|\s*\d+ \|\s*(\S+)$", re.MULTILINE)
# The tokenizers as Mistral published them, which mistral-common carries.
OFFICIAL_TOKENIZERS = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "tekken": "tekken_240911.json",
}

# Shared machines are slow at times, and that is no failure; a failure prints how to repeat it.
settings.register_profile(
    "tramontane",
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no fault of a test
)
settings.load_profile("tramontane")


LONGEST = ("tests/workflow/", "tests/slurm/", "tests/unit/train/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process waits for them at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


class ByFile(LoadFileScheduling):
    """The processes of `make test` share the files; those of the workflow share one built tree,
    those of Slurm one cluster."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        shared = ("tests/workflow", "tests/slurm")
        return next((folder for folder in shared if path.startswith(f"{folder}/")), path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def run_stage() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_stage(module, *arguments, **environment)`: a stage as a rule starts it."""

    def run(module: str, *arguments: object, **environment: str):
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_python(code, **environment)`: a snippet in an interpreter of its own."""

    def run(code: str, **environment: str):
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(scope="session")
def ask_for_help() -> Callable[[str], tuple[subprocess.CompletedProcess[str], set[str]]]:
    """`ask_for_help(module)`: the process of `--help`, and every module it imported."""

    def ask(module: str):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", module, "--help"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done, set(IMPORTED.findall(done.stderr))

    return ask


@pytest.fixture(scope="session")
def official_tokenizer() -> Callable[[str], Path]:
    """`official_tokenizer("v3")`: the file as Mistral published it."""
    folder = Path(mistral_common.__file__).parent / "data"
    return lambda version: folder / OFFICIAL_TOKENIZERS[version]


@pytest.fixture(scope="session")
def exported_tokenizer(official_tokenizer, tmp_path_factory) -> Callable[[str], Path]:
    """`exported_tokenizer("v3")`: the folder that `export` makes of the official file."""

    @cache
    def exported(version: str) -> Path:
        checkpoint = tmp_path_factory.mktemp(f"checkpoint_{version}")
        name = "tekken.json" if version == "tekken" else f"tokenizer.model.{version}"
        shutil.copyfile(official_tokenizer(version), checkpoint / name)
        folder = tmp_path_factory.mktemp(f"tokenizer_{version}")
        export(checkpoint, folder)
        return folder

    return exported


@pytest.fixture(scope="session")
def tokenizer_v3(exported_tokenizer) -> Path:
    return exported_tokenizer("v3")


@pytest.fixture(scope="session")
def demo_checkpoint(run_stage, tmp_path_factory) -> Path:
    """A base model at its smallest: one layer, random weights."""
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    done = run_stage(
        "workflow_scripts.demo.build_random_model",
        "--settings",
        '{"n_layers": 1}',
        "--checkpoint",
        folder,
    )
    assert done.returncode == 0, done.stderr
    return folder
