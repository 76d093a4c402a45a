"""The command as a user types it: for a plan on this machine, and for a GPU that is not here."""

from __future__ import annotations

import json
import re

import pytest

from tests.unit.train.shapes import MISTRAL_7B, setup_of
from workflow_scripts.handover.training import MemoryPlan
from workflow_scripts.log import StageError
from workflow_scripts.train import plan_memory
from workflow_scripts.train.memory import fit


@pytest.fixture
def facts_of_7b(tmp_path):
    MISTRAL_7B.write(tmp_path / "facts.json")
    return tmp_path / "facts.json"


def test_the_plan_of_a_run_on_this_machine(prepared, tmp_path):
    written = tmp_path / "memory_plan.json"
    plan_memory.main(
        ["--facts", str(prepared.facts), "--plan", str(prepared.plan)]
        + ["--validation", str(prepared.tokens / "validation.arrow")]
        + ["--recipe", '{"rows_per_step": 2}', "--memory-plan", str(written)]
    )
    plan = MemoryPlan.read(written)
    assert plan.device == "cpu" and plan.n_gpus == 1
    assert 200 <= plan.row_tokens <= 256
    assert plan.evaluation_tokens == plan.row_tokens  # validation rows are shorter
    assert plan.rows_per_micro_batch in (1, 2)
    assert plan.predicted_peak_memory_bytes <= plan.usable_bytes < plan.available_bytes
    chosen = setup_of(
        plan.rows_per_micro_batch, plan.n_checkpointed_layers, plan.offloads_activations
    )
    (candidate,) = [one for one in plan.candidates if one.setup == chosen]
    assert candidate.parts_bytes == plan.predicted_bytes


@pytest.mark.parametrize("memory_gb", [8, 12, 16, 24, 40, 48, 80])
def test_a_7b_is_planned_for_gpus_that_are_not_here(memory_gb, facts_of_7b, tmp_path, caplog):
    """QLoRA of rank 32 on rows of 4,096 tokens fits all of them; smaller ones are slower."""
    written = tmp_path / "memory_plan.json"
    with caplog.at_level("INFO"):
        plan_memory.main(
            ["--facts", str(facts_of_7b), "--row-tokens", "4096", "--recipe", '{"rank": 32}']
            + ["--memory-gb", str(memory_gb), "--memory-plan", str(written)]
        )
    plan = MemoryPlan.read(written)
    assert plan.device == f"a GPU with {memory_gb} GB"
    assert plan.predicted_peak_memory_bytes <= memory_gb * 1e9 * (1 - fit.MARGIN)
    table = next(message for message in caplog.messages if message.startswith("memory of training"))
    (line,) = re.findall(r"^ *(\d+) +(\d+) +(yes|no) .*chosen$", table, re.MULTILINE)
    assert line == (
        str(plan.rows_per_micro_batch),
        str(plan.n_checkpointed_layers),
        "yes" if plan.offloads_activations else "no",
    )


def test_a_run_that_does_not_fit_ends_with_settings_that_do(facts_of_7b, tmp_path):
    written = tmp_path / "memory_plan.json"
    with pytest.raises(StageError, match="does not fit") as refused:
        plan_memory.main(
            ["--facts", str(facts_of_7b), "--row-tokens", "32768", "--memory-gb", "8"]
            + ["--memory-plan", str(written)]
        )
    assert not written.exists()
    tokens = re.search(r"packings\.<name>\.row_tokens: (\d+)", str(refused.value))[1]
    plan_memory.main(["--facts", str(facts_of_7b), "--row-tokens", tokens, "--memory-gb", "8"])


def test_memory_gb_of_the_command_takes_precedence_over_the_settings(facts_of_7b, tmp_path):
    written = tmp_path / "memory_plan.json"
    plan_memory.main(
        ["--facts", str(facts_of_7b), "--row-tokens", "4096", "--memory-gb", "24"]
        + ["--training", json.dumps({"memory_gb": 3}), "--memory-plan", str(written)]
    )
    assert MemoryPlan.read(written).available_bytes == 24 * 10**9


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.train.plan_memory")
    assert done.returncode == 0 and "--memory-gb" in done.stdout
    assert not {"torch", "transformers", "peft"} & imported


def test_a_given_gpu_that_is_not_used_is_logged(prepared, monkeypatch, caplog):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU that can be used is here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    arguments = ["--facts", str(prepared.facts), "--plan", str(prepared.plan)]
    plan_memory.main(arguments)
    assert "CUDA_VISIBLE_DEVICES=0, so the CPU is used" in caplog.text
    assert "workflow_scripts.doctor" in caplog.text
    caplog.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan_memory.main(arguments)
    assert "CUDA_VISIBLE_DEVICES" not in caplog.text
