from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from workflow_scripts import files
from workflow_scripts.data.packing import Piece, Pieces, best_fit
from workflow_scripts.data.plan import write_plan
from workflow_scripts.log import StageError
from workflow_scripts.train import train_adapter
from workflow_scripts.train.train_adapter import last_whole_checkpoint

REPOSITORY = Path(__file__).resolve().parents[3]
MODULE = "workflow_scripts.train.train_adapter"
LENGTHS = [200, 90, 120, 40, 180, 60, 30, 150, 75, 110]
N_STEPS = 5
MARK = 123.5
RECIPE = {
    "rank": 8,
    "alpha": 16,
    "kv_rank": "matched",
    "learning_rate": 0.01,
    "evaluations": 2,
    "epochs": 10,
    "max_steps": N_STEPS,
    "checkpoint_steps": 1,
}


class Prepared(NamedTuple):
    checkpoint: Path
    facts: Path
    tokens: Path
    plan: Path

    def arguments(self, recipe, resume_from, adapter):
        paths = ["--checkpoint", self.checkpoint, "--facts", self.facts, "--tokens", self.tokens]
        paths += ["--plan", self.plan, "--resume-from", resume_from, "--adapter", adapter]
        return [*map(str, paths), "--settings", json.dumps(recipe)]


class Run(NamedTuple):
    adapter: Path
    manifest: dict
    history: dict
    checkpoints: Path


@pytest.fixture(scope="module")
def prepared(checkpoint, facts_path, random_documents, plan_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    random_documents(folder / "train.arrow", LENGTHS)
    random_documents(folder / "validation.arrow", [30, 50], seed=9)
    rows = best_fit(Pieces.whole(LENGTHS), row_tokens=256, seed=0)
    write_plan(folder / "plan.parquet", plan_of(rows, row_tokens=256))
    return Prepared(checkpoint, facts_path, folder, folder / "plan.parquet")


def read_run(adapter, checkpoints):
    manifest = files.read_json(adapter / "training_manifest.json")
    return Run(adapter, manifest, files.read_json(adapter / "history.json"), checkpoints)


@pytest.fixture(scope="module")
def whole_run(prepared, run_stage, tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_stage(MODULE, *prepared.arguments(RECIPE, folder / "resume", folder / "adapter"))
    assert done.returncode == 0, done.stderr
    return read_run(folder / "adapter", folder / "resume")


@pytest.fixture(scope="module")
def killed(prepared, tmp_path_factory):
    """The resume folder of the same run, killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", MODULE]
    command += prepared.arguments(RECIPE, folder / "resume", folder / "adapter")
    with (folder / "log").open("wb") as stream:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=stream, stderr=stream)
        deadline = time.monotonic() + 100
        # The Trainer writes its state last: the checkpoint is whole once step 2 has a folder.
        while not list(folder.glob("resume/*/checkpoint-2")):
            assert process.poll() is None and time.monotonic() < deadline, (
                folder / "log"
            ).read_text()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    # The kill came within a later save, whose checkpoint is torn: here, the first one counts.
    for later in folder.glob("resume/*/checkpoint-[2-9]"):
        shutil.rmtree(later)
    assert [path.name for path in folder.glob("resume/*/*")] == ["checkpoint-1"]
    # Starting over would end in the same adapter: a mark in the saved past tells the two apart.
    (state_path,) = folder.glob("resume/*/checkpoint-1/trainer_state.json")
    state = files.read_json(state_path)
    state["log_history"][0]["loss"] = MARK
    files.write_json(state_path, state)
    return folder


@pytest.fixture(scope="module")
def resumed_run(prepared, killed, run_stage):
    arguments = prepared.arguments(RECIPE, killed / "resume", killed / "adapter")
    done = run_stage(MODULE, *arguments)
    assert done.returncode == 0, done.stderr
    assert "resumed checkpoint=" in done.stderr
    return read_run(killed / "adapter", killed / "resume")


def test_the_adapter_loads_and_moves_the_base(whole_run, checkpoint):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, str(whole_run.adapter))(tokens).logits
    assert (after - before).abs().max() > 0.1
    assert {path.name for path in whole_run.adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "history.json",
        "training_manifest.json",
    }


def test_the_history_has_every_step_and_a_gradient_in_each(whole_run):
    train = whole_run.history["train"]
    assert [entry["step"] for entry in train] == list(range(1, N_STEPS + 1))
    for entry in train:
        assert entry.keys() == {"step", "loss_nats_per_token", "gradient_norm", "learning_rate"}
        assert math.isfinite(entry["loss_nats_per_token"])
        assert 0 < entry["gradient_norm"] < math.inf
    assert [entry["step"] for entry in whole_run.history["validation"]] == [3, 5]
    assert all(entry.keys() == {"step", "loss_nats_per_token"} for entry in
               whole_run.history["validation"])  # fmt: skip


def test_the_manifest_says_what_was_done(whole_run, prepared):
    manifest = whole_run.manifest
    assert manifest["n_steps"] == N_STEPS
    assert manifest["resumed"] is False
    assert manifest["tokens_per_second"] > 0
    assert manifest["duration_seconds"] > 0
    assert manifest["peak_memory_bytes"] > 2**20
    assert (
        manifest["final_loss_nats_per_token"]
        == (whole_run.history["train"][-1]["loss_nats_per_token"])
    )
    tensors = load_file(whole_run.adapter / "adapter_model.safetensors")
    assert manifest["n_trainable_parameters"] == sum(t.numel() for t in tensors.values())
    identity = manifest["identity"]
    assert identity["plan"] == files.sha256(prepared.plan)
    assert identity["tokens"] == files.sha256(prepared.tokens / "train.arrow")
    assert identity["base"] == {
        "model.safetensors": files.sha256(prepared.checkpoint / "model.safetensors")
    }
    assert identity["recipe"]["max_steps"] == N_STEPS
    n_rows = len(best_fit(Pieces.whole(LENGTHS), row_tokens=256, seed=0))
    assert manifest["tokens_per_step"] == pytest.approx(sum(LENGTHS) / n_rows)


def test_a_killed_run_resumes_and_ends_where_an_uninterrupted_one_does(whole_run, resumed_run):
    assert resumed_run.manifest["resumed"] is True
    assert resumed_run.manifest["n_steps"] == N_STEPS
    expected = load_file(whole_run.adapter / "adapter_model.safetensors")
    found = load_file(resumed_run.adapter / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Measured 0: the same arithmetic.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    first, *later = resumed_run.history["train"]
    assert first["loss_nats_per_token"] == MARK
    for whole, resumed in zip(whole_run.history["train"][1:], later, strict=True):
        assert resumed == pytest.approx(whole, rel=1e-5)


def test_after_success_no_checkpoint_is_left(whole_run, resumed_run):
    for run in (whole_run, resumed_run):
        assert list(run.checkpoints.iterdir()) == []


def test_another_recipe_does_not_resume_this_runs_checkpoint(prepared, killed, tmp_path):
    """What is left of a killed run lies in a folder named by all that decides the result."""
    resume = tmp_path / "resume"
    # The killed run has been resumed and its folder removed, or it still lies there; either way
    # this run makes one of its own.
    shutil.copytree(killed / "resume", resume)
    before = {path.name for path in resume.iterdir()}
    adapter = tmp_path / "adapter"
    recipe = {**RECIPE, "max_steps": 1, "learning_rate": 0.02, "evaluations": 0}
    train_adapter.main(prepared.arguments(recipe, resume, adapter))
    assert files.read_json(adapter / "training_manifest.json")["resumed"] is False
    assert {path.name for path in resume.iterdir()} == before


def entry(step, **values):
    return {"step": step, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, **values}


def test_the_history_keeps_steps_and_evaluations_apart():
    log_history = [entry(1), {"step": 1, "eval_loss": 3.0}, entry(2), {"step": 2, "runtime": 1}]
    history = train_adapter.read_history(log_history)
    assert [row["step"] for row in history["train"]] == [1, 2]
    assert history["validation"] == [{"step": 1, "loss_nats_per_token": 3.0}]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("loss", math.nan, "step 2, loss_nats_per_token"),
        ("grad_norm", math.inf, "step 2, gradient_norm"),
    ],
)
def test_a_step_that_is_not_finite_is_a_stage_error(key, value, named):
    with pytest.raises(StageError, match="diverged") as caught:
        train_adapter.read_history([entry(1), entry(2, **{key: value})])
    assert named in str(caught.value)


def test_a_run_whose_every_gradient_is_zero_is_a_stage_error():
    history = [entry(1, grad_norm=0.0), entry(2, grad_norm=0.0)]
    with pytest.raises(StageError, match="training changed nothing"):
        train_adapter.read_history(history)
    assert train_adapter.read_history([entry(1, grad_norm=0.0), entry(2)])


@pytest.mark.parametrize(
    ("epochs", "per_step", "max_steps", "expected"),
    [(1.0, 1, None, 5), (1.0, 2, None, 3), (2.5, 2, None, 8), (2.5, 2, 6, 6), (0.3, 1, None, 2)],
)
def test_the_number_of_steps_follows_from_rows_and_epochs(
    checkpoint, random_documents, plan_of, tmp_path, epochs, per_step, max_steps, expected
):
    from workflow_scripts.models.checkpoint import load_model
    from workflow_scripts.settings import RecipeSettings
    from workflow_scripts.train.trainer import Throughput

    documents = random_documents(tmp_path / "train.arrow", [6] * 5)
    plan = plan_of([[Piece(n, 0, 6)] for n in range(5)], row_tokens=16)
    recipe = RecipeSettings(epochs=epochs, micro_batches_per_step=per_step, max_steps=max_steps)
    model = load_model(checkpoint, window=8, precision="float32")
    trainer = train_adapter.make_trainer(
        model, recipe, plan, documents, documents, tmp_path / "run", Throughput()
    )
    assert trainer.args.max_steps == expected


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help(MODULE)
    assert done.returncode == 0
    assert "--resume-from" in done.stdout
    assert not imported & {"torch", "transformers", "peft"}


def test_a_torn_checkpoint_is_removed_and_the_one_before_it_resumes(tmp_path):
    for step, is_whole in ((9, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "training_args.bin").touch()
        if is_whole:
            (folder / "trainer_state.json").write_text("{}")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-11").exists()


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
