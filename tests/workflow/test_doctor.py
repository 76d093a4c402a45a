"""Where a step fails, the doctor is named: once, and not in dry runs."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.workflow.conftest import DEMO

OF_THE_MODEL = ("results/models/m/checkpoint", "--configfile", DEMO)
HINT = "What this machine may lack: python -m workflow_scripts.doctor"


@pytest.fixture
def overlay(tmp_path):
    path = tmp_path / "mine.yaml"
    models = {"models": {"m": {"source": str(tmp_path / "no-such-folder")}}}
    path.write_text(yaml.safe_dump(models))
    return path


def test_a_failed_step_points_to_the_doctor_once(workflow, overlay) -> None:
    result = workflow("--cores", 1, *OF_THE_MODEL, overlay)
    assert result.returncode != 0
    assert "the local base model is missing" in result.stdout + result.stderr
    assert (result.stdout + result.stderr).count(HINT) == 1


def test_a_dry_run_and_a_wrong_config_do_not(workflow, overlay, tmp_path) -> None:
    result = workflow("-n", "--cores", 1, *OF_THE_MODEL, overlay)
    assert result.returncode == 0
    assert HINT not in result.stdout + result.stderr
    (tmp_path / "wrong.json").write_text(json.dumps({"build": ["none"]}))
    result = workflow("-n", "--cores", 1, "--configfile", "wrong.json")
    assert result.returncode != 0
    assert HINT not in result.stdout + result.stderr
