"""Configs and commands for the doctor to examine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml

from workflow_scripts.doctor.finding import Finding
from workflow_scripts.doctor.requirements import Wanted, local_facts, read_config
from workflow_scripts.settings import config_files


@pytest.fixture
def command(tmp_path, monkeypatch) -> Callable[[str, str], Path]:
    """`command("nvidia-smi", script)`: a program of that name, first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def wanted(tmp_path) -> Callable[..., Wanted]:
    """`wanted(overlay)`: the demo's config with an overlay, nothing built yet."""

    def make(overlay: dict | None = None) -> Wanted:
        path = tmp_path / "overlay.yaml"
        path.write_text(yaml.safe_dump(overlay or {}))
        found = Wanted(read_config([config_files.DEMO, path]), tmp_path / "results")
        local_facts(found)
        return found

    return make


def model_overlay(source: str, **keys: object) -> dict:
    """One QLoRA run on one base model, and no other run."""
    run = {"model": "m", "dataset": "stdlib-help", "packing": "swa-aware", "recipe": "mistral-lora"}
    return {"models": {"m": {"source": source, **keys}}, "runs": {"r": run}, "build": ["r"]}


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}
