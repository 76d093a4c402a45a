"""Where curves go while a run trains: TensorBoard's files, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from workflow_scripts.log import StageError
from workflow_scripts.settings import TrainingSettings


def trackers_ready(training: TrainingSettings, *, name: str, curves: Path | None) -> list[str]:
    """Names of the trackers for transformers, their environment set; TensorBoard needs `curves`.

    Raises:
        StageError: a tracker's package is not installed.
    """
    trackers: list[str] = [
        tracker for tracker in training.trackers if tracker != "tensorboard" or curves is not None
    ]
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise StageError(
                "a tracker is not installed",
                where="training.trackers",
                found=tracker,
                to_fix=f"pip install {tracker}, or leave it out",
            )
    if curves is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(curves)
    os.environ.setdefault("WANDB_PROJECT", training.tracker_project)
    os.environ.setdefault("WANDB_LOG_MODEL", "false")
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", training.tracker_project)
    return trackers
