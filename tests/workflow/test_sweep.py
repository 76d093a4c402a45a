"""A sweep trains and scores each combination, and exports nothing that it is not told to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import DEMO, REPOSITORY, jobs_of

RATES = "config/sweeps/learning_rate.yaml"
EXPORTS = {"merge_adapter", "check_merged", "convert_gguf", "quantize_gguf", "package_release"}


@pytest.fixture
def overlay(tmp_path: Path):
    def write(content: dict) -> Path:
        path = tmp_path / "overlay.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_every_combination_is_trained_scored_and_ranked_and_none_is_exported(workflow) -> None:
    jobs = jobs_of(workflow("sweep", "-n", "--cores", 8, "--configfile", DEMO, RATES))
    assert jobs["train_adapter"] == jobs["evaluate_validation"] == 5
    assert jobs["pack_sequences"] == jobs["report_sweep"] == 1
    assert not EXPORTS & jobs.keys()
    assert not {name for name in jobs if name.startswith(("evaluate_perplexity", "benchmark_"))}


def test_the_test_split_is_not_looked_at(workflow) -> None:
    result = workflow("sweep", "-n", "-p", "--cores", 8, "--configfile", DEMO, RATES)
    commands = [line for line in result.stdout.splitlines() if "evaluate_perplexity" in line]
    assert len(commands) == 5
    for line in commands:
        assert "tokens/validation.arrow" in line
        assert "test.arrow" not in line


def test_a_run_of_a_sweep_trains_with_the_settings_of_a_plain_recipe(workflow, overlay) -> None:
    swept = workflow("sweep", "-n", "-p", "--cores", 8, "--configfile", DEMO, RATES).stdout
    recipe = {
        **yaml.safe_load((REPOSITORY / RATES).read_text())["recipes"]["rates"],
        "learning_rate": 0.0007,
    }
    del recipe["sweep"]
    plain = {
        "recipes": {"alone": recipe},
        "runs": {
            "alone": {
                "model": "demo",
                "dataset": "stdlib-help",
                "packing": "swa-aware-demo",
                "recipe": "alone",
            }
        },
        "build": ["alone"],
    }
    path = overlay(plain)
    alone = workflow("train", "-n", "-p", "--cores", 8, "--configfile", DEMO, path).stdout

    def command(text: str, run: str) -> str:
        (line,) = (
            line
            for line in text.splitlines()
            if "train.train_adapter" in line and f"results/runs/{run}/" in line
        )
        return line.replace(f"runs/{run}", "runs/RUN").replace(f"checkpoints/{run}", "…")

    name = "rates.learning_rate-7e-4"
    assert command(swept, name).split(">")[0] == command(alone, "alone").split(">")[0]


def test_a_run_of_a_sweep_that_build_names_is_exported_alone(workflow, overlay) -> None:
    path = overlay({"build": ["rates.learning_rate-7e-4"]})
    jobs = jobs_of(workflow("-n", "--cores", 8, "--configfile", DEMO, RATES, path))
    assert jobs["train_adapter"] == jobs["merge_adapter"] == jobs["package_release"] == 1
    assert "report_sweep" not in jobs


def test_another_value_trains_that_run_only(workflow, overlay) -> None:
    path = overlay({"recipes": {"rates": {"learning_rate": [1e-3, 2e-3], "rank": [8, 32, 64]}}})
    jobs = jobs_of(workflow("sweep", "-n", "--cores", 8, "--configfile", DEMO, RATES, path))
    assert jobs["train_adapter"] == jobs["evaluate_validation"] == 6


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"build": ["rates"]}, ["build: found 'rates'", "a sweep", "rates.learning_rate-7e-4"]),
        (
            {"recipes": {"rates": {"sweep": False}}},
            ["recipes.rates.learning_rate: found [", "set recipes.rates.sweep: true"],
        ),
        (
            {"recipes": {"rates": {"learning_rate": ["fast", 1e-3]}}},
            ["recipes.rates.learning_rate[0]: found 'fast'"],
        ),
        (
            {"recipes": {"rates": {"learning_rate": 1e-3}}},
            ["recipes.rates: `sweep: true` expects a list of values"],
        ),
    ],
    ids=["a sweep in build", "a list without sweep", "a wrong value", "no list"],
)
def test_a_wrong_sweep_is_one_message_before_any_job(
    workflow, overlay, tmp_path: Path, content: dict, parts: list[str]
) -> None:
    result = workflow("sweep", "--cores", 1, "--configfile", DEMO, RATES, overlay(content))
    text = result.stdout + result.stderr
    assert result.returncode != 0
    for part in parts:
        assert part in text
    assert "Traceback" not in text
    assert "Job stats" not in text
    assert not (tmp_path / "results").exists()


def test_a_config_without_a_sweep_says_where_one_is_shown(workflow) -> None:
    result = workflow("sweep", "-n", "--cores", 8)
    assert result.returncode != 0
    text = result.stdout + result.stderr
    assert "no run of this config is a sweep" in text and RATES in text
