"""A tiny model, documents and a plan on disk, as input of `train_adapter`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from workflow_scripts.handover.training import History, TrainingManifest
from workflow_scripts.packing.packing import Pieces, best_fit
from workflow_scripts.packing.plan import write_plan

REPOSITORY = Path(__file__).resolve().parents[3]
MODULE = "workflow_scripts.train.train_adapter"
LENGTHS = [200, 90, 120, 40, 180, 60, 30, 150, 75, 110]
N_STEPS = 5
RECIPE = {
    "rank": 8,
    "alpha": 16,
    "kv_rank": "matched",
    "learning_rate": 0.01,
    "evaluations": 2,
    "epochs": 10,
    "max_steps": N_STEPS,
    "rows_per_step": 1,
    "keeps_best": False,
}


class Prepared(NamedTuple):
    checkpoint: Path
    facts: Path
    tokens: Path
    plan: Path

    def arguments(self, recipe: dict[str, Any], folder: Path, **training: Any) -> list[str]:
        """Command line that writes checkpoints, curves and the adapter into `folder`."""
        paths = ["--checkpoint", self.checkpoint, "--facts", self.facts, "--tokens", self.tokens]
        paths += ["--plan", self.plan, "--resume-from", folder / "resume"]
        paths += ["--curves", folder / "curves", "--adapter", folder / "adapter"]
        settings = {"checkpoint_steps": 1, "trackers": [], **training}
        texts = ["--settings", json.dumps(recipe), "--training", json.dumps(settings)]
        return [*map(str, paths), *texts]

    def start(self, recipe: dict[str, Any], folder: Path, **training: Any) -> subprocess.Popen:
        """Start the program in a separate process, with its log in `folder/log`."""
        command = [sys.executable, "-m", MODULE, *self.arguments(recipe, folder, **training)]
        folder.mkdir(parents=True, exist_ok=True)
        # A separate process group, as a signal to it must not reach the tests.
        with (folder / "log").open("ab") as stream:
            return subprocess.Popen(
                command, cwd=REPOSITORY, stdout=stream, stderr=stream, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def run(self, recipe: dict[str, Any], folder: Path, **training: Any) -> Run:
        """Run the program; it must succeed."""
        process = self.start(recipe, folder, **training)
        assert process.wait(timeout=300) == 0, (folder / "log").read_text()
        return Run.read(folder)


class Run(NamedTuple):
    """Outputs of a run."""

    folder: Path
    manifest: TrainingManifest
    history: History
    log: str

    @classmethod
    def read(cls, folder: Path) -> Run:
        adapter = folder / "adapter"
        return cls(
            folder,
            TrainingManifest.read(adapter / "training_manifest.json"),
            History.read(adapter / "history.json"),
            (folder / "log").read_text(),
        )

    def weights(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def prepared(checkpoint, facts_path, random_documents, plan_of, tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    random_documents(folder / "train.arrow", LENGTHS)
    random_documents(folder / "validation.arrow", [30, 50], seed=9)
    rows = best_fit(Pieces.whole(LENGTHS), row_tokens=256, seed=0)
    write_plan(folder / "plan.parquet", plan_of(rows, row_tokens=256))
    return Prepared(checkpoint, facts_path, folder, folder / "plan.parquet")


@pytest.fixture(scope="session")
def whole_run(prepared, tmp_path_factory) -> Run:
    """A run that nothing interrupts."""
    return prepared.run(RECIPE, tmp_path_factory.mktemp("whole"))
