"""Train a LoRA adapter on the base model, quantized or not, over the rows of a packing plan.

Before the first step it checks that training fits the memory (`plan_memory`) and that attention is
what the plan declares. While it trains it writes checkpoints, which are not among the declared
outputs, into a folder named by a fingerprint of everything that decides the result. A run that was
killed resumes from the newest complete checkpoint and ends with the same result.

python -m workflow_scripts.train.train_adapter --checkpoint checkpoint/ --facts facts.json
    --tokens tokens/ --plan plan.parquet --settings '{"rank": 32}' --training '{"gpus": 1}'
    --resume-from checkpoints/run --curves logs/tensorboard --adapter adapter/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.settings import RecipeSettings, TrainingSettings, settings_from_json
from workflow_scripts.train import checkpoints, processes

OUTPUT_VERSION = 3
MODULE = "workflow_scripts.train.train_adapter"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--facts", type=Path, required=True, help="model facts")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of render_chats")
    parser.add_argument("--plan", type=Path, required=True, help="packing plan of the train split")
    parser.add_argument("--settings", required=True, help="JSON of `recipes.<name>`")
    parser.add_argument("--training", default="{}", help="JSON of `training`")
    parser.add_argument(
        "--resume-from", type=Path, required=True, help="folder for checkpoints while training"
    )
    parser.add_argument("--curves", type=Path, help="folder for TensorBoard's curves")
    parser.add_argument("--adapter", type=Path, required=True, help="to write into: folder")
    arguments = parser.parse_args(argv)
    recipe = settings_from_json(RecipeSettings, arguments.settings)
    training = settings_from_json(TrainingSettings, arguments.training)
    if training.gpus * training.nodes > 1 and not processes.is_worker():
        handed_on = list(sys.argv[1:] if argv is None else argv)
        before = checkpoints.all_steps_down(arguments.resume_from)
        try:
            processes.run(MODULE, handed_on, training)
        except log.StageError:
            if checkpoints.all_steps_down(arguments.resume_from) == before:
                raise
            # Memory ran out, and the workers noted that a smaller layout is to be tried.
            processes.run(MODULE, handed_on, training)
        return

    from workflow_scripts.train.job import Job
    from workflow_scripts.train.training import Folders, train

    job = Job.read(
        facts=arguments.facts,
        plan=arguments.plan,
        tokens=arguments.tokens,
        recipe=recipe,
        training=training,
        output_version=OUTPUT_VERSION,
    )
    folders = Folders(
        base=arguments.checkpoint,
        resume_from=arguments.resume_from,
        adapter=arguments.adapter,
        curves=arguments.curves,
    )
    train(job, folders)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
