"""Benchmark of training: tokens a second, memory and share of the arithmetic limit, by contestant.

Ours, TRL at its best, TRL with our attention, plain transformers with PEFT, Unsloth; on the same
documents and labels, each in a process of its own, in turn within every repetition. A model of
random weights is made in each process, so nothing is downloaded. What cannot run says why.

On a GPU, a call of at most ten minutes for each length of row; then on a CPU:

python -m tests.benchmarks.training_throughput --shape mistral-7b --row-tokens 4096
    --rows-per-micro-batch 8 --trl /tmp/trl_packages --liger /tmp/liger --result throughput_4k.json
python -m tests.benchmarks.training_throughput --shape mistral-7b --row-tokens 32768
    --rows-per-micro-batch 1 --trl /tmp/trl_packages --liger /tmp/liger --result throughput_32k.json
python -m tests.benchmarks.training_throughput --shape demo --documents demo
    --contestants tramontane transformers_peft --repetitions 3 --result padding.json
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
from tests.benchmarks.training_contestants import OUT_OF_MEMORY, PEERS, SEED
from tests.benchmarks.training_documents import write_demo_documents, write_documents
from tests.benchmarks.training_throughput_table import table
from workflow_scripts import files, log

logger = log.stage_logger("training_throughput")

CONTESTANTS = (
    "tramontane", "tramontane_checkpointed", "tramontane_offloaded",
    "trl", "trl_our_attention", "transformers_peft", "unsloth",
)  # fmt: skip
PACKAGES = "torch transformers peft accelerate bitsandbytes".split()


@dataclass(frozen=True)
class Measure:
    """How much is trained on a shape."""

    row_tokens: int
    rows_per_micro_batch: int
    n_documents: int
    length_fraction: float
    """Of the lengths of chats."""
    most_steps: int | None
    """None is an epoch."""
    most_seconds: float | None
    """Of measured steps."""
    n_warm_up: int
    documents_per_batch: int | None
    """Of a padded batch, of which a step has as many as packed rows hold documents; None is as many
    as there are rows: that fits, whatever their lengths are."""
    repetitions: int


MEASURES = {
    "toy": Measure(128, 2, 60, 0.05, 6, None, 1, None, 1),
    # The demo's packing: a row of 2,560 tokens a step. Logits of 16 padded documents of 2,000
    # tokens and 32k words would be 4 GB, and their gradients as much.
    "demo": Measure(2_560, 1, 96, 1.0, 14, None, 2, 8, 3),
    "mistral-7b": Measure(4_096, 8, 800, 1.0, 12, 20.0, 2, None, 1),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--table", type=Path, help="print the table of this result, and end")
    parser.add_argument("--shape", choices=CONFIGS, help="of the model")
    parser.add_argument("--row-tokens", type=int, help="default: the shape's")
    parser.add_argument("--rows-per-micro-batch", type=int, help="one a step; default: the shape's")
    parser.add_argument("--documents", choices=("chats", "demo"), default="chats", help="whose")
    parser.add_argument("--most-steps", type=int, help="default: the shape's")
    parser.add_argument("--contestants", choices=CONTESTANTS, nargs="+", default=CONTESTANTS)
    parser.add_argument("--peer-attention", help="of the others; default: the fastest installed")
    parser.add_argument("--repetitions", type=int, help="default: the shape's")
    parser.add_argument("--trl", type=Path, help="folder to import it from")
    parser.add_argument("--liger", type=Path, help="folder to import liger_kernel from")
    parser.add_argument("--result", type=Path, help="to write: JSON")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(files.read_json(arguments.table)))
        return
    if not (arguments.shape and arguments.result):
        parser.error("--shape and --result are needed, or --table")

    measure = MEASURES[arguments.shape]
    row_tokens = arguments.row_tokens or measure.row_tokens
    n_rows = arguments.rows_per_micro_batch or measure.rows_per_micro_batch
    with tempfile.TemporaryDirectory(prefix="training_throughput.") as folder:
        scratch = Path(folder)
        documents = make_documents(
            arguments.documents, scratch, measure, shape=arguments.shape, row_tokens=row_tokens
        )
        needed = row_tokens * n_rows / documents["mean_tokens"]
        per_batch = measure.documents_per_batch or n_rows
        result: dict[str, Any] = {
            **circumstances(),
            "versions": versions(sys.executable, PACKAGES),
            "trl_version": version_in(arguments.trl, "trl") if arguments.trl else None,
            "liger_version": version_in(arguments.liger, "liger_kernel")
            if arguments.liger
            else None,
            "shape": arguments.shape,
            "row_tokens": row_tokens,
            "rows_per_micro_batch": n_rows,
            "documents_per_batch": per_batch,
            "batches_per_step": max(1, round(needed / per_batch)),
            "n_warm_up_steps": measure.n_warm_up,
            "documents": documents,
            "matrix_rates": [],
            "contestants": {name: [] for name in arguments.contestants},
        }
        runner = Runner(arguments, measure, result, scratch)
        for _ in range(arguments.repetitions or measure.repetitions):
            result["matrix_rates"].append(runner.matrix_rate())
            for name in arguments.contestants:
                run = runner.train(name)
                result["contestants"][name].append(run)
                logger.info("trained contestant=%s %s", name, log.fields(run))
                files.write_json(arguments.result, result)  # now, as the next may fail
    logger.info("wrote %s", arguments.result)
    print(table(result))


def make_documents(
    whose: str, scratch: Path, measure: Measure, *, shape: str, row_tokens: int
) -> dict[str, Any]:
    """Write them, and say what they are."""
    path = scratch / "documents.arrow"
    if whose == "demo":
        stages = scratch / "stages"
        stages.mkdir()
        return write_demo_documents(path, stages)
    return write_documents(
        path,
        n_documents=measure.n_documents,
        length_fraction=measure.length_fraction,
        longest=row_tokens,
        vocabulary_size=CONFIGS[shape]["vocab_size"],
        seed=SEED,
    )


def last_words(log_file: Path, error: log.StageError) -> str:
    """What a contestant died of: our own message, else the last line of its log."""
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()] or [str(error)]
    ours = [line for line in lines if line.startswith("training_contestants: ")]
    return (ours or lines)[-1]


class Runner:
    """Processes of one result."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        measure: Measure,
        result: dict[str, Any],
        scratch: Path,
    ) -> None:
        self._arguments = arguments
        self._measure = measure
        self._result = result
        self._scratch = scratch
        self._checkpoints: set[str] = set()
        """Peers that ran out of memory without gradient checkpointing."""

    def matrix_rate(self) -> dict[str, Any]:
        """Of this machine, now."""
        measured = self._scratch / "rate.json"
        self._run("tests.benchmarks.matrix_rate", ["--measured", measured], name="matrix_rate")
        return files.read_json(measured)

    def train(self, name: str) -> dict[str, Any]:
        """One contestant, once. A peer keeps all activations; where these do not fit, it is run
        again with gradient checkpointing, and from then on with it."""
        if name in PEERS and name not in self._checkpoints:
            run = self._train(name, checkpoints=False)
            if not run.get("failed", "").startswith(OUT_OF_MEMORY):
                return run
            self._checkpoints.add(name)
        return self._train(name, checkpoints=name in self._checkpoints)

    def _train(self, name: str, *, checkpoints: bool) -> dict[str, Any]:
        arguments, measure, result = self._arguments, self._measure, self._result
        measured = self._scratch / "measured.json"
        measured.unlink(missing_ok=True)
        most_steps = arguments.most_steps or measure.most_steps
        options: list[object] = ["--contestant", name, "--shape", arguments.shape]
        options += ["--documents", self._scratch / "documents.arrow"]
        options += ["--row-tokens", result["row_tokens"], "--rows", result["rows_per_micro_batch"]]
        options += ["--documents-per-batch", result["documents_per_batch"]]
        options += ["--batches-per-step", result["batches_per_step"]]
        options += ["--warm-up-steps", measure.n_warm_up]
        options += ["--scratch", self._scratch / name, "--measured", measured]
        options += ["--gradient-checkpointing"] if checkpoints else []
        options += ["--most-steps", most_steps] if most_steps else []
        options += ["--most-seconds", measure.most_seconds] if measure.most_seconds else []
        if arguments.peer_attention:
            options += ["--peer-attention", arguments.peer_attention]
        try:
            self._run("tests.benchmarks.training_contestants", options, name=name)
        except log.StageError as error:
            # The others go on.
            return {"device": None, "failed": last_words(self._scratch / f"{name}.log", error)}
        return files.read_json(measured)

    def _run(self, module: str, options: Sequence[object], *, name: str) -> None:
        arguments = self._arguments
        trl = arguments.trl if name.startswith(("trl", "unsloth")) else None
        places = [REPOSITORY, trl, arguments.liger, os.environ.get("PYTHONPATH")]
        measured_command.measure(
            [sys.executable, "-m", module, *options],
            folder=REPOSITORY,
            environment={
                "PYTHONPATH": os.pathsep.join(map(str, filter(None, places))),
                "OMP_WAIT_POLICY": "PASSIVE",  # as the workflow starts its jobs
                "HF_HUB_OFFLINE": "1",
            },
            log_file=self._scratch / f"{name}.log",
        )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
