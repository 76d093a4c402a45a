"""What a recipe and a model's scaling say reaches every stage that depends on it: dry runs that
print their commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import DEMO, TINY, Snakemake, jobs_of, snakemake_in


def commands(workflow: Snakemake, tmp_path: Path, overlay: dict, *targets: str) -> list[str]:
    """The shell commands of a dry run, each as one line."""
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    result = workflow(*targets, "-n", "-p", "--cores", 8, "--configfile", DEMO, path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return re.findall(
        r"^(?:Shell command:)?\s*(python -m .*)$", result.stdout + result.stderr, re.M
    )


@pytest.mark.parametrize(
    ("method", "precision"),
    [("qlora", "nf4"), ("lora_int8", "int8"), ("lora", "native"), ("full", "native")],
)
def test_a_run_is_scored_on_the_base_it_was_trained_on(
    workflow, tmp_path: Path, method: str, precision: str
) -> None:
    overlay = {"recipes": {"mistral-lora-demo": {"method": method}}, "build": ["mistral"]}
    found = commands(workflow, tmp_path, overlay)
    live = [line for line in found if "--adapter results/runs/mistral/adapter" in line]
    scored = [
        line for line in live if "workflow_scripts.evaluate." in line or "check_merged" in line
    ]
    assert {re.search(r"scripts\.\w+\.(\w+)", line)[1] for line in scored} == {
        "check_merged",
        "evaluate_perplexity",
        "benchmark_inference",
    }
    assert all(f"--precision {precision} " in line for line in scored)
    # The base's own scores are taken in 16 and in 4 bits whatever the recipe.
    scores = r"evaluate_perplexity .*--scores results/evaluation/\S+/base"
    bases = [line for line in found if re.search(scores, line)]
    assert sorted(re.search(r"--precision (\w+)", line)[1] for line in bases) == ["native", "nf4"]


def test_scaling_is_asked_for_once_and_read_from_the_facts(workflow, tmp_path: Path) -> None:
    overlay = {"models": {"demo": {"rope_scaling": {"type": "yarn", "factor": 4}}}}
    found = commands(workflow, tmp_path, {**overlay, "build": ["mistral"]})
    (asked,) = [line for line in found if "--rope-scaling" in line]
    assert "read_model_facts" in asked
    assert '{"type":"yarn","factor":4.0,"original_context_tokens":null}' in asked
    merge = next(line for line in found if "merge_adapter" in line)
    assert "--facts results/models/demo/facts.json" in merge


def test_a_model_as_it_is_asks_for_nothing(workflow, tmp_path: Path) -> None:
    found = commands(workflow, tmp_path, {"build": ["mistral"]})
    facts = next(line for line in found if "read_model_facts" in line)
    assert "--rope-scaling" not in facts and "''" not in facts


def test_scaling_fetches_no_model_and_tokenizes_nothing_again(tiny: Path, tmp_path: Path) -> None:
    overlay = {"models": {"demo": {"rope_scaling": {"type": "yarn", "factor": 4}}}}
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    jobs = jobs_of(snakemake_in(tiny)("-n", "--cores", 8, "--configfile", DEMO, TINY, path))
    assert jobs["read_model_facts"] == 1
    assert jobs["train_adapter"] == jobs["merge_adapter"] == 2
    untouched = {"build_random_model", "export_tokenizer", "clean_dataset", "render_chats"}
    assert not untouched & jobs.keys()
