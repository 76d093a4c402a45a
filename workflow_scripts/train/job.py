"""The input of a training: settings, model facts, plan and documents, and the run's identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workflow_scripts import files
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.handover.training import RunIdentity
from workflow_scripts.packing.plan import Plan, read_plan
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.tokens.documents import Documents
from workflow_scripts.train.memory import device
from workflow_scripts.train.memory.shape import DeviceType, PlannedRun
from workflow_scripts.train.validation import validation_rows


@dataclass(frozen=True)
class Job:
    """One model on one plan of one dataset by one recipe."""

    recipe: RecipeSettings
    training: TrainingSettings
    facts: ModelShape
    """The model as it trains: without its window where the recipe does not honour it."""
    plan: Plan
    train: Documents
    validation: Documents
    identity: RunIdentity

    @classmethod
    def read(
        cls,
        *,
        facts: Path,
        plan: Path,
        tokens: Path,
        recipe: RecipeSettings,
        training: TrainingSettings,
        output_version: int,
    ) -> Job:
        """Read the files of the earlier stages.

        Args:
            tokens: folder of render_chats.
            output_version: of the program that trains.
        """
        train, validation = tokens / "train.arrow", tokens / "validation.arrow"
        model = Facts.read(facts)
        return cls(
            recipe=recipe,
            training=training,
            facts=model if recipe.honours_window else model.without_window(),
            plan=read_plan(plan),
            train=Documents(train),
            validation=Documents(validation),
            identity=RunIdentity(
                recipe=recipe,
                base={name: entry.sha256 for name, entry in model.files.items()},
                rope_parameters=model.rope_parameters,
                tokens=files.sha256(train),
                validation=files.sha256(validation),
                plan=files.sha256(plan),
                output_version=output_version,
            ),
        )

    def planned_run(self, *, n_gpus: int) -> PlannedRun:
        """The run as `plan_memory` sees it, on the device of this process."""
        return planned_run(
            self.facts,
            self.recipe,
            self.training,
            row_tokens=self.plan.longest_row,
            validation=self.validation,
            device_type=device.kind(),
            n_gpus=n_gpus,
        )


def planned_run(
    facts: ModelShape,
    recipe: RecipeSettings,
    training: TrainingSettings,
    *,
    row_tokens: int,
    validation: Documents | None,
    device_type: DeviceType,
    n_gpus: int,
) -> PlannedRun:
    """The run whose memory is planned.

    Args:
        row_tokens: length of the longest row of training.
        validation: documents of the validation split; None assumes the longest possible rows.
    """
    longest = None
    if validation is not None:
        rows = validation_rows(
            validation,
            facts,
            row_tokens=row_tokens,
            n_conversations=recipe.validation_conversations,
        )
        longest = int(rows.n_tokens.max(initial=1))
    return PlannedRun(
        facts,
        recipe,
        training,
        row_tokens=row_tokens,
        device_type=device_type,
        n_gpus=n_gpus,
        longest_evaluation=longest,
    )
