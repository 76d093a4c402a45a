"""Training jobs and trainers from a test's facts, plan and documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training import identity_of
from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.packing.plan import Plan
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.tokens.documents import Documents
from workflow_scripts.train.checkpoints import Checkpoints
from workflow_scripts.train.job import Job
from workflow_scripts.train.trainer import make_trainer


def make_job(
    facts: ModelShape,
    plan: Plan,
    documents: Documents,
    recipe: RecipeSettings,
    *,
    validation: Documents | None = None,
    **training: Any,
) -> Job:
    """A job; the documents are also those of validation unless others are given."""
    return Job(
        recipe=recipe,
        training=TrainingSettings(trackers=[], **training),
        facts=facts,
        plan=plan,
        train=documents,
        validation=documents if validation is None else validation,
        identity=identity_of(recipe=recipe),
    )


def trainer_of(
    model: Any, job: Job, folder: Path, *, rows_per_micro_batch: int = 1, **options: Any
) -> Any:
    """The product's trainer, with checkpoints in `folder`."""
    return make_trainer(
        model,
        job,
        Checkpoints(folder, job.identity),
        rows_per_micro_batch=rows_per_micro_batch,
        **options,
    )
