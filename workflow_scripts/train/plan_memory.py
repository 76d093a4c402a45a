"""Does a training run fit into the GPU's memory, and laid out how? Trains nothing.

Prints a table of layouts (rows of a micro-batch, layers that are computed again, activations kept
on the CPU) with their memory by part; stops with the nearest settings that fit where none does.
Without a plan it answers for rows of any length, with `--memory-gb` for any GPU.

python -m workflow_scripts.train.plan_memory --facts facts.json --plan plan.parquet
    --recipe '{"rank": 32}' --training '{}' --memory-plan memory_plan.json
python -m workflow_scripts.train.plan_memory --facts facts.json --row-tokens 8192 --memory-gb 24
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.settings import RecipeSettings, TrainingSettings, settings_from_json

OUTPUT_VERSION = 1
logger = log.stage_logger("plan_memory")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--facts", type=Path, required=True, help="model facts")
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--plan", type=Path, help="packing plan of the train split")
    rows.add_argument("--row-tokens", type=int, help="length of a row, instead of a plan")
    parser.add_argument("--recipe", default="{}", help="JSON of `recipes.<name>`")
    parser.add_argument("--training", default="{}", help="JSON of `training`")
    parser.add_argument("--memory-gb", type=float, help="of another GPU than this machine's")
    parser.add_argument("--memory-plan", type=Path, help="to write: JSON")
    arguments = parser.parse_args(argv)
    recipe = settings_from_json(RecipeSettings, arguments.recipe)
    training = settings_from_json(TrainingSettings, arguments.training)

    from workflow_scripts.data.plan import read_plan
    from workflow_scripts.models.checkpoint import default_device
    from workflow_scripts.train import memory

    facts = files.read_json(arguments.facts)
    # A GPU's memory by hand is a GPU's plan, wherever it is asked for.
    by_hand = arguments.memory_gb is not None
    device = "cuda" if by_hand or default_device().type == "cuda" else "cpu"
    available = int(arguments.memory_gb * 1e9) if by_hand else memory.available_bytes()
    row_tokens = arguments.row_tokens or int(read_plan(arguments.plan).rows.n_tokens.max())
    options = {
        "row_tokens": row_tokens,
        "n_gpus": training.gpus * training.nodes,
        "available_bytes": available,
        "device_type": device,
    }
    setup, parts = memory.choose(facts, recipe, training, **options)
    table = memory.table(facts, recipe, training, chosen=setup, **options)
    logger.info("planned %s peak_bytes=%d\n%s", setup, parts["peak"], table)
    if arguments.memory_plan:
        files.write_json(
            arguments.memory_plan,
            {
                **options,
                "rows_per_micro_batch": setup.rows_per_micro_batch,
                "n_checkpointed_layers": setup.n_checkpointed_layers,
                "offloads_activations": setup.offloads_activations,
                "predicted_bytes": parts,
            },
        )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
