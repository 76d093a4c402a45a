"""A run that is ended early, whenever and however, resumes and ends with the same result."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest
import torch

from tests.unit.train.conftest import N_STEPS, RECIPE, Run


def wait_for(process, folder, happened):
    """Poll until `happened()`; the process must still run."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.0005)


def assert_same_ending(found: Run, whole: Run):
    expected, weights = whole.weights(), found.weights()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # Measured 0: the arithmetic is the same.
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6, msg=name)
    for split in ("train", "validation"):
        measured, of_whole = getattr(found.history, split), getattr(whole.history, split)
        assert len(measured) == len(of_whole)
        for one, other in zip(measured, of_whole, strict=True):
            assert one.model_dump() == pytest.approx(other.model_dump(), rel=1e-5)


def checkpoint_steps(folder):
    return sorted(int(path.name[11:]) for path in folder.glob("resume/*/checkpoint-*"))


KILLED_AT = {
    "before the first checkpoint": lambda folder: any(folder.glob("resume/*/identity.json")),
    "while the first is written": lambda folder: any(folder.glob("resume/*/.writing/*/*")),
    "after the second": lambda folder: any(folder.glob("resume/*/checkpoint-2")),
    "while the fourth is written": lambda folder: any(
        folder.glob("resume/*/.writing/checkpoint-4/*")
    ),
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_a_killed_run_resumes_from_a_whole_checkpoint(prepared, whole_run, tmp_path, moment):
    process = prepared.start(RECIPE, tmp_path)
    wait_for(process, tmp_path, lambda: KILLED_AT[moment](tmp_path))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    saved = checkpoint_steps(tmp_path)
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    if moment == "while the fourth is written":
        assert 3 in saved

    resumed = prepared.run(RECIPE, tmp_path)
    assert resumed.manifest.resumed is bool(saved)
    if saved:
        assert f"checkpoint-{saved[-1]}" in resumed.log
    assert resumed.manifest.n_steps == N_STEPS
    assert_same_ending(resumed, whole_run)
    assert list((tmp_path / "resume").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_saves_first_and_says_how_to_resume(prepared, whole_run, tmp_path, number):
    """No periodic checkpoint is due, so the one that exists was saved because of the signal."""
    process = prepared.start(RECIPE, tmp_path, checkpoint_steps=1000)
    wait_for(process, tmp_path, lambda: "probed attention" in (tmp_path / "log").read_text())
    process.send_signal(number)
    assert process.wait(timeout=60) == 1
    text = (tmp_path / "log").read_text()
    (step,) = checkpoint_steps(tmp_path)
    assert 1 <= step < N_STEPS
    assert f"training was ended by {signal.Signals(number).name}" in text
    assert f"step {step} of {N_STEPS}" in text and "Traceback" not in text

    resumed = prepared.run(RECIPE, tmp_path, checkpoint_steps=1000)
    assert resumed.manifest.resumed is True
    assert_same_ending(resumed, whole_run)


def test_a_signal_in_the_last_step_keeps_what_a_second_start_needs(prepared, tmp_path):
    """A batch system counts a job that it ended as failed, and Snakemake deletes its outputs."""
    recipe = {**RECIPE, "max_steps": 1, "evaluations": 1}
    process = prepared.start(recipe, tmp_path, checkpoint_steps=1000)
    wait_for(process, tmp_path, lambda: "probed attention" in (tmp_path / "log").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    first = Run.read(tmp_path)
    weights = first.weights()
    assert checkpoint_steps(tmp_path) == [1] and "in spite of SIGTERM" in first.log
    shutil.rmtree(tmp_path / "adapter")

    again = prepared.run(recipe, tmp_path, checkpoint_steps=1000)
    assert again.manifest.resumed is True and again.manifest.n_steps == 1
    assert again.history == first.history
    torch.testing.assert_close(again.weights(), weights, rtol=0, atol=0)
    assert list((tmp_path / "resume").iterdir()) == []


def test_a_full_disk_costs_checkpoints_and_not_the_run(prepared, whole_run, tmp_path):
    """The system refuses files as large as the optimizer's state; the adapter is half that size."""
    process = prepared.start(RECIPE, tmp_path)
    wait_for(process, tmp_path, lambda: bool(checkpoint_steps(tmp_path)))
    process.kill()
    process.wait()
    saved = checkpoint_steps(tmp_path)
    adapter, optimizer = (
        next(tmp_path.glob(f"resume/*/checkpoint-{saved[-1]}/{name}")).stat().st_size
        for name in ("adapter_model.safetensors", "optimizer.pt")
    )
    assert adapter * 1.2 < optimizer
    with (tmp_path / "log").open("ab") as stream:
        done = subprocess.run(
            ["prlimit", f"--fsize={int(adapter * 1.1)}", *prepared_command(prepared, tmp_path)],
            stdout=stream, stderr=stream, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    run_log = (tmp_path / "log").read_text()
    assert done.returncode == 0, run_log
    found = Run.read(tmp_path)
    assert found.manifest.n_failed_checkpoints == N_STEPS - saved[-1]
    assert run_log.count("could not write a checkpoint") == N_STEPS - saved[-1]
    assert_same_ending(found, whole_run)


def prepared_command(prepared, folder):
    import sys

    from tests.unit.train.conftest import MODULE

    return [sys.executable, "-m", MODULE, *prepared.arguments(RECIPE, folder)]


def test_another_recipe_starts_from_scratch_and_logs_it(prepared, tmp_path):
    process = prepared.start(RECIPE, tmp_path)
    wait_for(process, tmp_path, lambda: bool(checkpoint_steps(tmp_path)))
    process.kill()
    process.wait()
    left = {path.name for path in (tmp_path / "resume").iterdir()}
    found = prepared.run({**RECIPE, "learning_rate": 0.02}, tmp_path)
    assert found.manifest.resumed is False
    assert "started from scratch" in found.log and "recipe.learning_rate: 0.01 → 0.02" in found.log
    assert {path.name for path in (tmp_path / "resume").iterdir()} == left


def test_the_layout_may_change_when_a_run_resumes(prepared, tmp_path):
    """Another GPU may hold other micro-batches; the step, its rows and its loss are the same."""
    recipe = {**RECIPE, "rows_per_step": 2}
    whole = prepared.run(recipe, tmp_path / "whole", rows_per_micro_batch=2)
    folder = tmp_path / "laid out anew"
    process = prepared.start(recipe, folder, rows_per_micro_batch=2)
    wait_for(process, folder, lambda: any(folder.glob("resume/*/checkpoint-2")))
    process.kill()
    process.wait()
    options = {"rows_per_micro_batch": 1, "gradient_checkpointing": "full"}
    resumed = prepared.run(recipe, folder, **options)
    assert resumed.manifest.resumed is True
    assert resumed.manifest.rows_per_micro_batch == 1
    for one, other in zip(resumed.history.train, whole.history.train, strict=True):
        assert one.model_dump() == pytest.approx(
            other.model_dump(), rel=1e-4
        )  # measured 1e-6; the sums run in another order


def test_the_best_weights_survive_a_kill(prepared, tmp_path):
    """The rate is so high that the loss rises again: the best weights are not the last."""
    recipe = {**RECIPE, "keeps_best": True, "evaluations": 5, "learning_rate": 0.1}
    whole = prepared.run(recipe, tmp_path / "whole")
    losses = [entry.loss_nats_per_token for entry in whole.history.validation]
    best = whole.manifest.best_step
    assert losses.index(min(losses)) + 1 == best < N_STEPS
    folder = tmp_path / "killed"
    process = prepared.start(recipe, folder)
    wait_for(process, folder, lambda: any(folder.glob(f"resume/*/checkpoint-{best + 1}")))
    process.kill()
    process.wait()
    resumed = prepared.run(recipe, folder)
    assert resumed.manifest.resumed is True and resumed.manifest.best_step == best
    assert_same_ending(resumed, whole)
