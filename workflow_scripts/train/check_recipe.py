"""Gate: check that a recipe fits a model, as soon as the model's facts are known.

Ranks, target modules and settings for experts depend on the model, so they cannot be checked from
the config alone. This checks them before chats are rendered and packed.

python -m workflow_scripts.train.check_recipe --facts facts.json --recipe '{"rank": 32}'
    --name mistral-lora --check recipe_check.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.training import RecipeCheck
from workflow_scripts.settings import RecipeSettings, settings_from_json
from workflow_scripts.train import lora

OUTPUT_VERSION = 1
logger = log.stage_logger("check_recipe")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--facts", type=Path, required=True, help="model facts")
    parser.add_argument("--recipe", required=True, help="JSON of `recipes.<name>`")
    parser.add_argument("--name", default="<name>", help="the recipe's name, for messages")
    parser.add_argument("--check", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    recipe = settings_from_json(RecipeSettings, arguments.recipe)
    facts = Facts.read(arguments.facts)

    lora.check_recipe(recipe, facts, name=arguments.name)
    RecipeCheck(recipe=recipe).write(arguments.check)
    logger.info("passed recipe=%s", arguments.name)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
