"""Say before training whether it fits the GPU, and how it will be laid out there; or why not.

Prints a table of the layouts and ends with an error, naming settings that do fit, where none does.
By hand, for a GPU that is not here, `--memory-gb`, and `--row-tokens` in place of a plan.

python -m workflow_scripts.train.plan_memory --facts facts.json --plan plan.parquet
    --recipe '{"rank": 32}' --training '{}' --memory-plan memory_plan.json
python -m workflow_scripts.train.plan_memory --facts facts.json --row-tokens 8192 --memory-gb 24
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log
from workflow_scripts.settings import RecipeSettings, TrainingSettings, settings_from_json

OUTPUT_VERSION = 1
logger = log.stage_logger("plan_memory")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--facts", type=Path, required=True, help="model facts")
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--plan", type=Path, help="packing plan of the train split")
    rows.add_argument("--row-tokens", type=int, help="length of a row, where there is no plan")
    parser.add_argument(
        "--validation", type=Path, help="documents of the validation split; else the longest rows"
    )
    parser.add_argument("--recipe", default="{}", help="JSON of `recipes.<name>`")
    parser.add_argument("--training", default="{}", help="JSON of `training`")
    parser.add_argument("--gpus", type=int, help="of all nodes; else what `training` says")
    parser.add_argument(
        "--memory-gb", type=float, help="plan for a CUDA GPU with so much free, GB of 10⁹ bytes"
    )
    parser.add_argument("--memory-plan", type=Path, help="to write: JSON")
    arguments = parser.parse_args(argv)
    recipe = settings_from_json(RecipeSettings, arguments.recipe)
    training = settings_from_json(TrainingSettings, arguments.training)
    facts = files.read_json(arguments.facts)

    import torch

    from workflow_scripts.models.checkpoint import default_device
    from workflow_scripts.train import memory

    if arguments.memory_gb is None:
        device_type = default_device().type
        available = memory.available_bytes()
        device = torch.cuda.get_device_name() if device_type == "cuda" else "cpu"
    else:
        device_type, available = "cuda", int(arguments.memory_gb * 1e9)
        training = training.model_copy(update={"memory_gb": None})
        device = f"a GPU with {arguments.memory_gb:g} GB"
    n_gpus = arguments.gpus or training.gpus * training.nodes
    row_tokens = arguments.row_tokens or longest_row(arguments.plan)
    options: dict[str, Any] = {
        "row_tokens": row_tokens,
        "n_gpus": n_gpus,
        "available_bytes": available,
        "device_type": device_type,
        "evaluation_tokens": longest_validation_row(
            arguments.validation, facts, recipe, row_tokens=row_tokens
        )
        if arguments.validation
        else None,
    }
    logger.info(
        "started %s device=%s recipe=%s training=%s",
        log.versions("torch"),
        device,
        recipe.model_dump_json(),
        training.model_dump_json(),
    )
    setup, parts = memory.choose(facts, recipe, training, **options)
    logger.info("%s", memory.table(facts, recipe, training, chosen=setup, **options))
    plan = {
        "device": device,
        **options,
        "usable_bytes": int(memory.usable_bytes(training, available)),
        **dataclasses.asdict(setup),
        "predicted_peak_memory_bytes": parts["peak"],
        "predicted_bytes": parts,
    }
    del options["available_bytes"]
    found = memory.candidates(facts, recipe, training, **options)
    plan["candidates"] = [memory.as_json(candidate) for candidate in found]
    if arguments.memory_plan:
        files.write_json(arguments.memory_plan, plan)
    logger.info("planned %s %s", setup, log.fields(plan))


def longest_row(path: Path) -> int:
    """Tokens of the longest row of a plan."""
    from workflow_scripts.data.plan import read_plan

    return int(read_plan(path).rows.n_tokens.max(initial=1))


def longest_validation_row(
    path: Path, facts: dict[str, Any], recipe: RecipeSettings, *, row_tokens: int
) -> int:
    """Tokens of the longest row that the validation loss is taken on."""
    from workflow_scripts.data.documents import Documents
    from workflow_scripts.train.validation import validation_rows

    rows = validation_rows(
        Documents(path),
        facts,
        row_tokens=row_tokens,
        n_conversations=recipe.validation_conversations,
    )
    return int(rows.n_tokens.max(initial=1))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
