"""What a training run is given: settings, model facts, plan, documents; and what identifies it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workflow_scripts import files
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.handover.training import RunIdentity
from workflow_scripts.models.checkpoint import default_device
from workflow_scripts.packing.plan import Plan, read_plan
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.tokens.documents import Documents
from workflow_scripts.train.memory.shape import PlannedRun
from workflow_scripts.train.validation import longest_row


@dataclass(frozen=True)
class Job:
    """One model on one plan of one dataset by one recipe."""

    recipe: RecipeSettings
    training: TrainingSettings
    facts: ModelShape
    """As the model trains: without its window where the recipe does not honour it."""
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
        """From the files of the stages before.

        Args:
            tokens: folder of render_chats.
            output_version: of the program that trains.
        """
        train, validation = tokens / "train.arrow", tokens / "validation.arrow"
        model = Facts.read(facts)
        if not recipe.honours_window:
            model = model.without_window()
        return cls(
            recipe=recipe,
            training=training,
            facts=model,
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
        """As `plan_memory` sees it, on the kind of device that this process computes on."""
        row_tokens = self.plan.longest_row
        return PlannedRun(
            self.facts,
            self.recipe,
            self.training,
            row_tokens=row_tokens,
            device_type="cuda" if default_device().type == "cuda" else "cpu",
            n_gpus=n_gpus,
            longest_evaluation=longest_row(
                self.validation,
                self.facts,
                row_tokens=row_tokens,
                n_conversations=self.recipe.validation_conversations,
            ),
        )
