"""Benchmark of what packing is worth: tokens a second and memory of training, by contestant.

Padded rows, concatenated ones and ours; ours with transformers' own attention; and TRL's trainer
with its packing: on the same documents, each in a process of its own, in turn within every
repetition. A model of random weights is made in each process, so nothing is downloaded.

python -m tests.benchmarks.packed_training --shape demo --repetitions 3
    --trl /path/to/a/folder/with/trl --result tests/benchmarks/results/packed_training_cpu.json

python -m tests.benchmarks.packed_training --shape mistral-7b --repetitions 2
    --trl /path/to/a/folder/with/trl --result tests/benchmarks/results/packed_training_gpu.json

python -m tests.benchmarks.packed_training
    --table tests/benchmarks/results/packed_training_cpu.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import measured_command
from tests.benchmarks.machine import REPOSITORY, circumstances, version_in, versions
from tests.benchmarks.model_shapes import CONFIGS
from tests.benchmarks.packed_training_table import table
from tests.benchmarks.training_contestants import SEED
from tests.benchmarks.training_documents import write_documents
from workflow_scripts import files, log

logger = log.stage_logger("packed_training")

CONTESTANTS = ("none", "concatenate", "best_fit", "best_fit_transformers", "trl")
PACKAGES = "torch transformers peft accelerate bitsandbytes".split()


@dataclass(frozen=True)
class Measure:
    """How much is trained on a shape."""

    row_tokens: tuple[int, ...]
    micro_batch_tokens: int
    """Rows of a micro-batch × row_tokens; one micro-batch a step."""
    n_documents: int
    length_fraction: float
    """Of the lengths of chats."""
    most_steps: int | None
    """None is an epoch."""
    n_warm_up: int
    gradient_checkpointing: bool


MEASURES = {
    "toy": Measure((128,), 256, 80, 0.05, None, 1, True),
    "demo": Measure((2_560,), 5_120, 96, 1.0, None, 2, False),
    "mistral-7b": Measure((4_096, 8_192, 32_768), 32_768, 800, 1.0, 25, 3, True),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--table", type=Path, help="print the table of this result, and end")
    parser.add_argument("--shape", choices=CONFIGS, help="of the model")
    parser.add_argument("--row-tokens", type=int, nargs="+", help="default: the shape's")
    parser.add_argument("--documents", type=int, help="how many; default: the shape's")
    parser.add_argument("--contestants", choices=CONTESTANTS, nargs="+", default=CONTESTANTS)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--trl", type=Path, help="folder to import it from; without, it is left out"
    )
    parser.add_argument("--result", type=Path, help="to write: JSON")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(files.read_json(arguments.table)))
        return
    if not (arguments.shape and arguments.result):
        parser.error("--shape and --result are needed, or --table")

    names = [name for name in arguments.contestants if name != "trl" or arguments.trl]
    measure = MEASURES[arguments.shape]
    n_documents = arguments.documents or measure.n_documents
    result: dict[str, Any] = {
        **circumstances(),
        "versions": versions(sys.executable, PACKAGES),
        "trl_version": version_in(arguments.trl, "trl") if arguments.trl else None,
        "shape": arguments.shape,
        "gradient_checkpointing": measure.gradient_checkpointing,
        "n_warm_up_steps": measure.n_warm_up,
        "rows": [],
    }
    for row_tokens in arguments.row_tokens or measure.row_tokens:
        with tempfile.TemporaryDirectory(prefix="packed_training.") as scratch:
            documents = write_documents(
                Path(scratch) / "documents.arrow",
                n_documents=n_documents,
                length_fraction=measure.length_fraction,
                longest=row_tokens,
                vocabulary_size=CONFIGS[arguments.shape]["vocab_size"],
                seed=SEED,
            )
            contestants: dict[str, Any] = {name: [] for name in names}
            n_rows = measure.micro_batch_tokens // row_tokens
            entry = {"row_tokens": row_tokens, "rows_per_micro_batch": n_rows}
            result["rows"].append({**entry, "documents": documents, "contestants": contestants})
            for _ in range(arguments.repetitions):
                for name in names:
                    run = train(
                        name,
                        Path(scratch),
                        shape=arguments.shape,
                        row_tokens=row_tokens,
                        n_rows=n_rows,
                        trl=arguments.trl,
                    )
                    contestants[name].append(run)
                    logger.info(
                        "trained contestant=%s row_tokens=%d %s", name, row_tokens, log.fields(run)
                    )
                    files.write_json(arguments.result, result)  # now, as the next may fail
    logger.info("wrote %s", arguments.result)
    print(table(result))


def train(
    contestant: str, scratch: Path, *, shape: str, row_tokens: int, n_rows: int, trl: Path | None
) -> dict[str, Any]:
    """One contestant, once, in a process of its own."""
    measure = MEASURES[shape]
    command: list[object] = [sys.executable, "-m", "tests.benchmarks.training_contestants"]
    command += ["--contestant", contestant, "--shape", shape]
    command += ["--documents", scratch / "documents.arrow", "--scratch", scratch / "trainer"]
    command += ["--row-tokens", row_tokens, "--rows", n_rows]
    command += ["--warm-up-steps", measure.n_warm_up, "--measured", scratch / "measured.json"]
    command += ["--gradient-checkpointing"] if measure.gradient_checkpointing else []
    command += ["--most-steps", measure.most_steps] if measure.most_steps else []
    inherited = os.environ.get("PYTHONPATH")
    places = [REPOSITORY, trl if contestant == "trl" else None, inherited]
    process = measured_command.measure(
        command,
        folder=REPOSITORY,
        environment={
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, places))),
            "OMP_WAIT_POLICY": "PASSIVE",  # as the workflow starts its jobs
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(scratch / "hub_cache"),
        },
        log_file=scratch / f"{contestant}.log",
    )
    return {
        **files.read_json(scratch / "measured.json"),
        "process_duration_seconds": process.duration_seconds,
    }


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
