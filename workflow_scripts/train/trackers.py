"""Trackers that record curves while a run trains: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from workflow_scripts.log import StageError
from workflow_scripts.settings import TrainingSettings


def trackers_ready(training: TrainingSettings, *, curves: Path | None) -> list[str]:
    """Set the trackers' environment variables, and return their names for transformers.

    Args:
        curves: folder for TensorBoard; None leaves TensorBoard out.
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
                to_fix=f"pip install {tracker}, or remove it from training.trackers",
            )
    if curves is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(curves)
    os.environ.setdefault("WANDB_PROJECT", training.tracker_project)
    os.environ.setdefault("WANDB_LOG_MODEL", "false")
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", training.tracker_project)
    return trackers
