from __future__ import annotations

import os
import signal
import stat
import time

import pytest
import torch

from tests.unit.train.conftest import RECIPE
from workflow_scripts.log import StageError
from workflow_scripts.packing.packing import Pieces, best_fit
from workflow_scripts.packing.plan import write_plan
from workflow_scripts.settings import TrainingSettings
from workflow_scripts.train.processes import launch_command

SHARED = {**RECIPE, "rows_per_step": 4, "max_steps": 6, "evaluations": 3}


@pytest.fixture(scope="module")
def alike(prepared, random_documents, plan_of, tmp_path_factory):
    """The same job with rows of equal cost, so that a step has the same rows on one or two
    processes. The last step of an epoch has two rows for four places."""
    folder = tmp_path_factory.mktemp("alike")
    lengths = [64] * 20
    random_documents(folder / "train.arrow", lengths)
    random_documents(folder / "validation.arrow", [30, 50, 20], seed=9)
    rows = best_fit(Pieces.whole(lengths), row_tokens=128, seed=0)
    write_plan(folder / "plan.parquet", plan_of(rows, row_tokens=128))
    return prepared._replace(tokens=folder, plan=folder / "plan.parquet")


@pytest.fixture(scope="module")
def alone(alike, tmp_path_factory):
    return alike.run(SHARED, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp2"])
def test_two_processes_have_the_loss_curve_of_one(alike, alone, tmp_path, parallelism):
    options = {"gpus": 2, "parallelism": parallelism, "gradient_checkpointing": 1}
    found = alike.run(SHARED, tmp_path, **options)
    assert found.manifest.n_processes == 2
    for split in ("train", "validation"):
        measured, of_alone = getattr(found.history, split), getattr(alone.history, split)
        assert len(measured) == len(of_alone) > 2
        for one, other in zip(measured, of_alone, strict=True):
            for key, value in other:
                # Measured 2e-6 for the losses; the norms sum in another order.
                rel = 1e-5 if "loss" in key else 1e-4
                assert getattr(one, key) == pytest.approx(value, rel=rel), key
    expected, weights = alone.weights(), found.weights()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-3 * scale, msg=name)


def test_two_processes_that_are_told_to_end_resume_together(alike, alone, tmp_path):
    process = alike.start(SHARED, tmp_path, gpus=2, checkpoint_steps=1000)
    log = tmp_path / "log"
    deadline = time.monotonic() + 120
    while log.read_text().count("probed attention") < 2:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 1, log.read_text()
    assert "training was ended by" in log.read_text()
    assert len(list(tmp_path.glob("resume/*/checkpoint-*"))) == 1
    resumed = alike.run(SHARED, tmp_path, gpus=2, checkpoint_steps=1000)
    assert resumed.manifest.resumed is True
    for one, other in zip(resumed.history.train, alone.history.train, strict=True):
        assert one.loss_nats_per_token == pytest.approx(other.loss_nats_per_token, rel=1e-5)


def test_rows_that_two_processes_cannot_share_stop_before_training(alike, tmp_path):
    process = alike.start({**SHARED, "rows_per_step": 3}, tmp_path, gpus=2)
    assert process.wait(timeout=120) == 1
    text = (tmp_path / "log").read_text()
    assert "rows_per_step" in text and "multiple" in text


def test_on_one_node_torchrun_chooses_the_port():
    command = launch_command("a.program", ["--x", "1"], TrainingSettings(gpus=4), {})
    assert "--standalone" in command and command[command.index("--nproc-per-node") + 1] == "4"
    assert command[-4:] == ["--module", "a.program", "--x", "1"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands in job 40123, of two nodes, and job 40124, of one node."""

    def answer(command, script):
        program = tmp_path / command
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    answer("squeue", 'case "$3" in 40123) echo "gpu[03-04]";; 40124) echo gpu07;; esac')
    answer(
        "scontrol",
        'case "$2 $3" in "hostnames gpu[03-04]") printf "gpu03\\ngpu04\\n";;'
        ' hostnames*) echo "$3";;'
        ' "node gpu03") echo "NodeName=gpu03 Arch=x86_64";'
        ' echo "   NodeAddr=10.0.0.3 NodeHostName=gpu03 Version=22.05.8";; esac',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_several_nodes_meet_at_the_first_node_of_the_allocation(slurm):
    settings = TrainingSettings(gpus=8, nodes=2)
    command = launch_command("a.program", [], settings, {"SLURM_JOB_ID": "40123"})
    assert command[:3] == ["srun", "--nodes", "2"]
    assert command[command.index("--rdzv-endpoint") + 1] == "10.0.0.3:20123"
    assert command[command.index("--nnodes") + 1] == "2"


@pytest.mark.parametrize("environment", [{"SLURM_JOB_ID": "40124"}, {}])
def test_fewer_nodes_than_training_needs_is_a_stage_error(slurm, environment):
    with pytest.raises(StageError, match="fewer nodes than") as caught:
        launch_command("a.program", [], TrainingSettings(nodes=2), environment)
    assert "training.nodes" in str(caught.value)
