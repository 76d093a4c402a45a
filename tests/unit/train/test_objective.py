"""Loss and gradients of a step do not depend on how its documents are packed and divided."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.train import one_step, sharded_step
from workflow_scripts.packing.packing import STRATEGIES, Pieces
from workflow_scripts.packing.plan import read_plan, write_plan
from workflow_scripts.tokens.documents import Documents
from workflow_scripts.train.batches import Collator

REPOSITORY = Path(__file__).resolve().parents[3]
LENGTHS = [40, 9, 23, 3, 31, 12, 6, 17, 28, 14]
N_ROWS = {"best_fit": 5, "none": 10, "concatenate": 5}
# Relative to the largest entry of a matrix; measured 2e-6.
TOLERANCE = 1e-5


class Prepared(NamedTuple):
    checkpoint: Path
    facts: Path
    documents: Path
    plans: Path

    def paths(self, strategy: str, folder: Path) -> dict[str, Path]:
        return {
            "checkpoint": self.checkpoint,
            "facts": self.facts,
            "documents": self.documents,
            "plan": self.plans / f"{strategy}.parquet",
            "folder": folder,
        }


@pytest.fixture(scope="module")
def prepared(checkpoint, facts_path, random_documents, plan_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("objective")
    random_documents(folder / "train.arrow", LENGTHS)
    for name, strategy in STRATEGIES.items():
        rows = strategy(Pieces.whole(LENGTHS), row_tokens=40, seed=0)
        assert len(rows) == N_ROWS[name]
        plan = plan_of(rows, row_tokens=40, strategy=name)
        write_plan(folder / f"{name}.parquet", plan)
    return Prepared(checkpoint, facts_path, folder / "train.arrow", folder)


def layout(rows_per_micro_batch, micro_batches, n_processes=1):
    return {
        "recipe": {"rows_per_step": rows_per_micro_batch * micro_batches * n_processes},
        "rows_per_micro_batch": rows_per_micro_batch,
    }


@pytest.fixture(scope="module")
def one_document_a_micro_batch(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return one_step.take_step(**prepared.paths("none", folder), **layout(1, 10))


def largest_difference(found, expected):
    """Greatest difference of losses and gradients, relative to the largest entry of each."""
    assert found.keys() == expected.keys()
    assert sum("lora" in name for name in found) == 28
    assert all(part.abs().max() > 0 for part in expected.values())
    return max(
        float((found[name] - part).abs().max() / part.abs().max())
        for name, part in expected.items()
    )


@pytest.mark.parametrize(
    ("strategy", "rows", "micro_batches"),
    [
        ("none", 10, 1),
        ("none", 3, 4),  # two places stay empty
        ("best_fit", 5, 1),
        ("best_fit", 1, 5),
        ("best_fit", 2, 3),  # one place stays empty
        ("best_fit", 1, 8),  # three micro-batches hold nothing
    ],
)
def test_a_step_is_the_same_however_its_rows_are_grouped(
    prepared, one_document_a_micro_batch, tmp_path, strategy, rows, micro_batches
):
    paths = prepared.paths(strategy, tmp_path)
    found = one_step.take_step(**paths, **layout(rows, micro_batches))
    assert largest_difference(found, one_document_a_micro_batch) <= TOLERANCE


@pytest.mark.parametrize(
    ("strategy", "rows", "micro_batches"), [("best_fit", 1, 3), ("none", 2, 3)]
)
def test_a_step_is_the_same_on_two_processes(
    prepared, one_document_a_micro_batch, tmp_path, strategy, rows, micro_batches
):
    """One or two places stay empty, so the processes have different numbers of rows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.unit.train.one_step"]
    for name, path in prepared.paths(strategy, tmp_path).items():
        command += [f"--{name}", str(path)]
    options = layout(rows, micro_batches, n_processes=2)
    command += ["--recipe", json.dumps(options["recipe"])]
    command += ["--rows-per-micro-batch", str(rows)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        assert largest_difference(found, one_document_a_micro_batch) <= TOLERANCE


def test_a_sharded_model_has_the_loss_and_gradients_of_the_whole(prepared, tmp_path):
    """FSDP2 on two processes, each with its rows, compared with the whole model on all rows."""
    paths = prepared.paths("best_fit", tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.unit.train.sharded_step"]
    for name in ("checkpoint", "documents", "plan", "folder"):
        command += [f"--{name}", str(paths[name])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "sharded.safetensors")

    model = sharded_step.adapted(prepared.checkpoint)
    rows = list(read_plan(paths["plan"]).rows)
    collate = Collator(Documents(prepared.documents), crosses_documents=False)
    loss = model(**collate(rows)).loss
    loss.backward()
    expected = {"loss": loss.detach()[None], **sharded_step.gradients(model)}
    assert largest_difference(found, expected) <= TOLERANCE


def test_attention_across_documents_is_another_objective(
    prepared, one_document_a_micro_batch, tmp_path
):
    """The comparison detects a leak, in the gradients and in the loss."""
    paths = prepared.paths("concatenate", tmp_path)
    found = one_step.take_step(**paths, **layout(1, 5))
    assert largest_difference(found, one_document_a_micro_batch) > 0.05
    assert abs(found["loss"] - one_document_a_micro_batch["loss"]) > 1e-3


def test_a_mean_of_means_would_be_another_objective(
    prepared, one_document_a_micro_batch, plan_of, tmp_path
):
    """Rows have different numbers of supervised tokens, so equal weights would change the step."""
    steps = []
    for number, row in enumerate(read_plan(prepared.plans / "best_fit.parquet").rows):
        path = tmp_path / f"row-{number}.parquet"
        write_plan(path, plan_of([row], row_tokens=40))
        paths = prepared.paths("best_fit", tmp_path) | {"plan": path}
        steps.append(one_step.take_step(**paths, **layout(1, 1)))
    mean = {name: torch.stack([step[name] for step in steps]).mean(dim=0) for name in steps[0]}
    assert largest_difference(mean, one_document_a_micro_batch) > 0.01
