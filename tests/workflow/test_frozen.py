"""Runs that `frozen` names: in reports, and in no job."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import DEMO, TINY, jobs_of, snakemake_in


@pytest.fixture
def dry_run(tiny: Path, tmp_path: Path):
    def run(overlay: dict, *arguments: object):
        path = tmp_path / "overlay.yaml"
        path.write_text(yaml.safe_dump(overlay))
        return snakemake_in(tiny)("-n", "--cores", 8, *arguments, "--configfile", DEMO, TINY, path)

    return run


def test_what_is_forced_is_made_for_the_other_runs_alone(dry_run) -> None:
    result = dry_run({"frozen": ["gen*"]}, "--forceall")
    jobs = jobs_of(result)
    assert jobs["train_adapter"] == jobs["package_release"] == jobs["collect_metrics"] == 1
    assert "run=mistral" in result.stdout and "run=generic" not in result.stdout
    # It is on every page that compares, by the files it has.
    overview = result.stdout.partition("rule report_overview:")[2].partition("output:")[0]
    assert "results/runs/generic/metrics.json" in overview


def test_where_every_run_is_frozen_nothing_is_to_do(dry_run) -> None:
    assert jobs_of(dry_run({"frozen": ["*"]})) == {}
    assert jobs_of(dry_run({"frozen": ["*"]}, "export")) == {"export": 1}  # which has no file


def test_releases_of_frozen_runs_are_published_with_the_others(dry_run) -> None:
    assert jobs_of(dry_run({"frozen": ["*"]}, "push_release")) == {"push_release": 1}


def test_settings_that_a_frozen_run_was_not_made_with_stop_before_any_job(dry_run) -> None:
    overlay = {"recipes": {"mistral-lora-demo": {"learning_rate": 0.001}}}
    result = dry_run({"frozen": ["mistral"], **overlay})
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert "the frozen run mistral" in said and "mistral-lora-demo: learning_rate" in said
    # What another run is made with is its own affair.
    assert jobs_of(dry_run({"frozen": ["generic"], **overlay}))["train_adapter"] == 1


def test_a_pattern_that_matches_no_run_is_told(dry_run) -> None:
    result = dry_run({"frozen": ["mistrl"]})
    assert result.returncode != 0
    assert "did you mean 'mistral'?" in result.stdout + result.stderr
