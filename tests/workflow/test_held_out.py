"""Splits that a build scores on: empty ones stop it before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import DEMO, TINY

# All ten fall into `train` at the default shares of 5 %.
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"How deep is berth {number}?"},
            {
                "role": "assistant",
                "content": f"Berth {number} has {number + 7} metres at the {at}.",
            },
        ]
    }
    for number, at in enumerate("harbour crane ferry quay anchor mole buoy lock dock pier".split())
]


@pytest.fixture
def overlay(tmp_path: Path):
    """`overlay(**cleaning)`: the tiny build on ten chats."""

    def write(recipe: dict | None = None, **cleaning: float) -> list[object]:
        chats = tmp_path / "chats.jsonl"
        chats.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
        dataset = {"files": [str(chats)], "cleaning": {"near_duplicates": None, **cleaning}}
        config = {
            "datasets": {"ten": dataset},
            "recipes": {"mistral-lora-demo": recipe or {}},
            "runs": {"mistral": {"dataset": "ten"}},
            "build": ["mistral"],
        }
        path = tmp_path / "overlay.yaml"
        path.write_text(yaml.safe_dump(config))
        return ["--configfile", DEMO, TINY, path]

    return write


@pytest.mark.parametrize(
    ("target", "fractions", "split"),
    [
        ("all", {"validation_fraction": 0}, "validation"),
        ("all", {"test_fraction": 0}, "test"),
        ("export", {"validation_fraction": 0, "test_fraction": 0}, "validation"),
        ("evaluate", {"test_fraction": 0}, "test"),
        ("experiment", {"validation_fraction": 0}, "validation"),
    ],
)
def test_nothing_held_out_is_refused_before_the_first_job(
    workflow, overlay, target, fractions, split
) -> None:
    result = workflow(target, "-n", "--cores", 2, *overlay(**fractions))
    assert result.returncode == 1
    for part in (
        f"nothing is held out for {split}, but this build scores runs.mistral on it",
        f"datasets.ten.cleaning.{split}_fraction",
        f"set {split}_fraction: 0.05",
    ):
        assert part in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_what_scores_nothing_on_a_split_needs_none(workflow, overlay) -> None:
    no_test = overlay(test_fraction=0)
    assert workflow("export", "-n", "--cores", 2, *no_test).returncode == 0
    nothing = overlay(validation_fraction=0, test_fraction=0)
    assert workflow("train", "-n", "--cores", 2, *nothing).returncode == 0
    stopping = overlay(
        recipe={"evaluations": 3, "early_stopping": 1}, validation_fraction=0, test_fraction=0
    )
    assert workflow("train", "-n", "--cores", 2, *stopping).returncode == 1


def test_ten_chats_with_the_default_shares_stop_before_training(
    workflow, overlay, tmp_path
) -> None:
    result = workflow("train", "--cores", 2, *overlay())
    assert result.returncode == 1
    for part in (
        "the validation and the test split are empty",
        "0.05 of 10 conversations",
        "set validation_fraction: 0.26",
    ):
        assert part in result.stdout + result.stderr  # Snakemake shows the log of what failed
    assert not list(tmp_path.glob("results/runs/*/adapter"))
    assert not list(tmp_path.glob("results/data/*/*/tokens/*"))
    # What the message proposes holds something out of both.
    proposed = overlay(validation_fraction=0.26, test_fraction=0.26)
    result = workflow("data", "--cores", 2, *proposed)
    assert result.returncode == 0, result.stderr[-4000:]
