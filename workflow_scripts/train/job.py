"""What a training run is given: settings, model facts, plan, documents; and what identifies it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts import files
from workflow_scripts.data.documents import Documents
from workflow_scripts.data.plan import Plan, read_plan
from workflow_scripts.settings import RecipeSettings, TrainingSettings


@dataclass(frozen=True)
class Job:
    """One model on one plan of one dataset by one recipe."""

    recipe: RecipeSettings
    training: TrainingSettings
    facts: dict[str, Any]
    plan: Plan
    train: Documents
    validation: Documents
    identity: dict[str, Any]
    """All that decides the result."""

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
        model = files.read_json(facts)
        return cls(
            recipe=recipe,
            training=training,
            facts=model,
            plan=read_plan(plan),
            train=Documents(train),
            validation=Documents(validation),
            identity={
                "recipe": recipe.model_dump(mode="json"),
                "base": {name: entry["sha256"] for name, entry in model["files"].items()},
                "rope_parameters": model["rope_parameters"],
                "tokens": files.sha256(train),
                "validation": files.sha256(validation),
                "plan": files.sha256(plan),
                "output_version": output_version,
            },
        )
