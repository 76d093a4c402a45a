"""Say before training whether it fits the GPU, and how it will be laid out there; or why not.

Prints a table of the layouts and ends with an error, naming settings that do fit, where none does.
By hand, for a GPU that is not here, `--memory-gb`, and `--row-tokens` in place of a plan.

python -m workflow_scripts.train.plan_memory --facts facts.json --plan plan.parquet
    --recipe '{"rank": 32}' --training '{}' --memory-plan memory_plan.json
python -m workflow_scripts.train.plan_memory --facts facts.json --row-tokens 8192 --memory-gb 24
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.training import MemoryPlan
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
    facts = Facts.read(arguments.facts)

    import torch

    from workflow_scripts.models.checkpoint import NO_GPUS, default_device
    from workflow_scripts.packing.plan import read_plan
    from workflow_scripts.tokens.documents import Documents
    from workflow_scripts.train.memory import device, fit, layouts
    from workflow_scripts.train.memory.shape import DeviceType, PlannedRun
    from workflow_scripts.train.validation import longest_row

    if not recipe.honours_window:
        facts = facts.without_window()
    if arguments.memory_gb is None:
        device_type: DeviceType = "cuda" if default_device().type == "cuda" else "cpu"
        available = device.available_bytes()
        device_name = torch.cuda.get_device_name() if device_type == "cuda" else "cpu"
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if device_type == "cpu" and given not in NO_GPUS:
            logger.warning(
                "found no GPU that torch can use: CUDA_VISIBLE_DEVICES=%s is not, the CPU is; %s",
                given,
                log.DOCTOR,
            )
    else:
        device_type, available = "cuda", int(arguments.memory_gb * 1e9)
        training = training.model_copy(update={"memory_gb": None})
        device_name = f"a GPU with {arguments.memory_gb:g} GB"
    row_tokens = arguments.row_tokens or read_plan(arguments.plan).longest_row
    run = PlannedRun(
        facts,
        recipe,
        training,
        row_tokens=row_tokens,
        device_type=device_type,
        n_gpus=arguments.gpus or training.gpus * training.nodes,
        longest_evaluation=arguments.validation
        and longest_row(
            Documents(arguments.validation),
            facts,
            row_tokens=row_tokens,
            n_conversations=recipe.validation_conversations,
        ),
    )
    logger.info(
        "started %s device=%s recipe=%s training=%s",
        log.versions("torch"),
        device_name,
        recipe.model_dump_json(),
        training.model_dump_json(),
    )
    setup, parts = fit.choose(run, available_bytes=available)
    logger.info("%s", fit.table(run, available_bytes=available, chosen=setup))
    if arguments.memory_plan:
        MemoryPlan(
            device=device_name,
            row_tokens=run.row_tokens,
            evaluation_tokens=run.evaluation_tokens,
            n_gpus=run.n_gpus,
            available_bytes=available,
            usable_bytes=int(fit.usable_bytes(training, available)),
            **dict(setup),
            predicted_peak_memory_bytes=parts.peak,
            predicted_bytes=parts,
            candidates=tuple(layouts.candidates(run)),
        ).write(arguments.memory_plan)
    logger.info("planned %s predicted_bytes=%d", setup, parts.peak)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
