"""Check before training that it fits into the GPU's memory, and choose its layout there.

Prints a table of the layouts. If none fits, ends with an error that names settings that do. To plan
for a GPU that is not in this machine, give `--memory-gb`; `--row-tokens` replaces a plan.

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
from workflow_scripts.models.checkpoint import NO_GPUS
from workflow_scripts.packing.plan import read_plan
from workflow_scripts.settings import RecipeSettings, TrainingSettings, settings_from_json
from workflow_scripts.tokens.documents import Documents

OUTPUT_VERSION = 1
logger = log.stage_logger("plan_memory")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--facts", type=Path, required=True, help="model facts")
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--plan", type=Path, help="packing plan of the train split")
    rows.add_argument("--row-tokens", type=int, help="length of a row, instead of a plan")
    parser.add_argument(
        "--validation",
        type=Path,
        help="documents of the validation split; default: assume the longest possible rows",
    )
    parser.add_argument("--recipe", default="{}", help="JSON of `recipes.<name>`")
    parser.add_argument("--training", default="{}", help="JSON of `training`")
    parser.add_argument("--gpus", type=int, help="GPUs of all nodes; default: those of `training`")
    parser.add_argument(
        "--memory-gb", type=float, help="plan for a CUDA GPU with this much free, GB of 10⁹ bytes"
    )
    parser.add_argument("--memory-plan", type=Path, help="to write: JSON")
    arguments = parser.parse_args(argv)
    recipe = settings_from_json(RecipeSettings, arguments.recipe)
    training = settings_from_json(TrainingSettings, arguments.training)
    facts = Facts.read(arguments.facts)

    from workflow_scripts.train.job import planned_run
    from workflow_scripts.train.memory import device, fit
    from workflow_scripts.train.memory.layouts import Layouts

    if not recipe.honours_window:
        facts = facts.without_window()
    if arguments.memory_gb is None:
        device_type, device_name = device.kind(), device.name()
        available = device.available_bytes()
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if device_type == "cpu" and given not in NO_GPUS:
            logger.warning(
                "torch cannot use the GPU of CUDA_VISIBLE_DEVICES=%s, so the CPU is used; %s",
                given,
                log.DOCTOR,
            )
    else:
        device_type, available = "cuda", int(arguments.memory_gb * 1e9)
        training = training.model_copy(update={"memory_gb": None})
        device_name = f"a GPU with {arguments.memory_gb:g} GB"
    row_tokens = arguments.row_tokens or read_plan(arguments.plan).longest_row
    run = planned_run(
        facts,
        recipe,
        training,
        row_tokens=row_tokens,
        validation=arguments.validation and Documents(arguments.validation),
        device_type=device_type,
        n_gpus=arguments.gpus or training.gpus * training.nodes,
    )
    logger.info(
        "started %s device=%s recipe=%s training=%s",
        log.versions("torch"),
        device_name,
        recipe.model_dump_json(),
        training.model_dump_json(),
    )
    layouts = Layouts.of(run)
    chosen = fit.choose(layouts, available_bytes=available)
    logger.info("%s", fit.table(layouts, available_bytes=available, chosen=chosen))
    if arguments.memory_plan:
        MemoryPlan(
            device=device_name,
            row_tokens=row_tokens,
            evaluation_tokens=run.evaluation_tokens,
            n_gpus=run.n_gpus,
            available_bytes=available,
            usable_bytes=int(fit.usable_bytes(training, available)),
            **dict(chosen.setup),
            predicted_peak_memory_bytes=chosen.peak,
            predicted_bytes=chosen.parts_bytes,
            candidates=layouts.candidates,
        ).write(arguments.memory_plan)
    logger.info("planned %s predicted_bytes=%d", chosen.setup, chosen.peak)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
