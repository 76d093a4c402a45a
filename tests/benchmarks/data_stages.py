"""Benchmark of the data stages: chats to token ids, against datasets.map and axolotl.

First Tramontane alone on the whole file, then all contestants on a smaller one, in turn within
every repetition, so that a slow minute of the machine meets all of them. Commands are timed whole,
start-up included.

python -m tests.benchmarks.data_stages --conversations 1000000 --peer-conversations 50000
    --repetitions 3 --axolotl /path/to/its/environment/bin/axolotl

python -m tests.benchmarks.data_stages --table tests/benchmarks/results/data_stages.json
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import contestants, measured_command, synthetic_chats
from tests.benchmarks.contestants import Contestant
from tests.benchmarks.data_stages_table import table
from tests.benchmarks.machine import REPOSITORY, circumstances, versions
from tests.benchmarks.measured_command import Measurement
from workflow_scripts import files, log

logger = log.stage_logger("data_stages")

RESULT = REPOSITORY / "tests/benchmarks/results/data_stages.json"
TOKENIZER_FILE = "mistral_instruct_tokenizer_240323.model.v3"
PACKAGES = "mistral-common datasets ftfy numpy py3langid pyarrow rensa tokenizers".split()
AXOLOTL_PACKAGES = "axolotl datasets tokenizers torch transformers".split()
# Compiles what Python compiles once, and brings the libraries into the system's cache.
WARM_UP_CONVERSATIONS = 200


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--table", type=Path, help="print the table of this result, and end")
    parser.add_argument(
        "--conversations", type=int, default=1_000_000, help="of Tramontane's own run; 0 is none"
    )
    parser.add_argument(
        "--peer-conversations", type=int, default=50_000, help="of the comparison; 0 is none"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="of the comparison")
    parser.add_argument("--processes", type=int, default=2, help="workers of every contestant")
    parser.add_argument("--seed", type=int, default=0, help="of the chats")
    parser.add_argument("--axolotl", type=Path, help="its program, in an environment of its own")
    parser.add_argument("--scratch", type=Path, help="room for 15 KB a conversation")
    parser.add_argument("--result", type=Path, default=RESULT, help="to write: JSON")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(files.read_json(arguments.table)))
        return

    with tempfile.TemporaryDirectory(prefix="data_stages.", dir=arguments.scratch) as scratch:
        bench = Bench(Path(scratch), arguments.processes, arguments.seed)
        tokenizer = export_tokenizer(Path(scratch))
        result = {
            **circumstances(),
            "versions": versions(sys.executable, PACKAGES),
            "n_processes": arguments.processes,
            "tokenizer_process": dataclasses.asdict(measure_tokenizer(tokenizer)),
        }
        invited = invite(tokenizer, n_processes=arguments.processes, axolotl=arguments.axolotl)
        if arguments.axolotl:
            python = arguments.axolotl.parent / "python"
            result["axolotl_versions"] = versions(python, AXOLOTL_PACKAGES)
        for contestant in invited:
            bench.run(contestant, WARM_UP_CONVERSATIONS)
        if arguments.conversations:
            ours = next(contestant for contestant in invited if contestant.name == "tramontane")
            run = bench.run(ours, arguments.conversations)
            result["alone"] = {"chats": bench.statistics(arguments.conversations), **run.facts()}
            # Now, as the comparison may yet fail after an hour.
            files.write_json(arguments.result, result)
        if arguments.peer_conversations:
            result["comparison"] = {
                "chats": bench.statistics(arguments.peer_conversations),
                "contestants": compare(
                    bench,
                    invited,
                    n_conversations=arguments.peer_conversations,
                    n_repetitions=arguments.repetitions,
                ),
            }
    files.write_json(arguments.result, result)
    logger.info("wrote %s", arguments.result)
    print(table(result))


def export_tokenizer(folder: Path) -> Path:
    """What the stage `export_tokenizer` makes of the v3 tokenizer that mistral-common carries."""
    import mistral_common

    checkpoint, tokenizer = folder / "checkpoint", folder / "tokenizer"
    checkpoint.mkdir()
    published = Path(mistral_common.__file__).parent / "data" / TOKENIZER_FILE
    shutil.copyfile(published, checkpoint / "tokenizer.model.v3")
    command = [sys.executable, "-m", "workflow_scripts.models.export_tokenizer"]
    command += ["--checkpoint", str(checkpoint), "--tokenizer", str(tokenizer)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return tokenizer


def measure_tokenizer(tokenizer: Path) -> Measurement:
    """A process that has loaded the tokenizer and does nothing else."""
    code = (
        "import sys, time; from pathlib import Path;"
        "from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer;"
        "tokenizer = load_mistral_tokenizer(Path(sys.argv[1]), for_training=True);"
        # Longer than the interval at which memory is sampled.
        f"time.sleep({2 * measured_command.SECONDS_BETWEEN_SAMPLES})"
    )
    return measured_command.measure([sys.executable, "-c", code, tokenizer], folder=REPOSITORY)


def invite(tokenizer: Path, *, n_processes: int, axolotl: Path | None) -> list[Contestant]:
    """Everyone who takes part, in the order of a repetition."""
    found = [contestants.datasets_map(tokenizer, n_processes=n_processes)]
    for name, cleaning in (("tramontane", {}), ("tramontane_same_work", contestants.SAME_WORK)):
        found.append(
            contestants.tramontane(tokenizer, n_processes=n_processes, name=name, cleaning=cleaning)
        )
    if axolotl is not None:
        found.append(contestants.axolotl(axolotl, tokenizer, n_processes=n_processes))
    return found


@dataclass(frozen=True)
class Run:
    """One contestant, once over one file."""

    n_conversations: int
    stages: dict[str, Measurement]
    n_tokens: int
    documents: list[bytes]
    """A digest of the token ids of each document."""

    def facts(self) -> dict[str, Any]:
        stages = self.stages.values()
        duration = sum(stage.duration_seconds for stage in stages)
        # Stages run one after the other: times add up, memory does not.
        memory = [field.name for field in dataclasses.fields(Measurement) if "peak" in field.name]
        return {
            "n_conversations": self.n_conversations,
            "n_documents": len(self.documents),
            "n_tokens": self.n_tokens,
            "duration_seconds": duration,
            "conversations_per_second": self.n_conversations / duration,
            "tokens_per_second": self.n_tokens / duration,
            "processor_seconds": sum(stage.processor_seconds for stage in stages),
            **{name: max(getattr(stage, name) for stage in stages) for name in memory},
            "stages": {name: dataclasses.asdict(stage) for name, stage in self.stages.items()},
        }


class Bench:
    """Where contestants run: the chats of one seed, made once a size.

    Args:
        scratch: an empty folder.
    """

    def __init__(self, scratch: Path, n_processes: int, seed: int) -> None:
        self._scratch = scratch
        self._n_processes = n_processes
        self._seed = seed
        self._made: dict[Path, dict[str, Any]] = {}

    def chats(self, n_conversations: int) -> Path:
        path = self._scratch / f"chats-{n_conversations}.jsonl"
        if path not in self._made:
            self._made[path] = synthetic_chats.write_chats(
                path,
                n_conversations=n_conversations,
                seed=self._seed,
                n_processes=self._n_processes,
            )
            logger.info("made %s", log.fields(self._made[path]))
        return path

    def statistics(self, n_conversations: int) -> dict[str, Any]:
        """What was made, and its words."""
        path = self.chats(n_conversations)
        return {**self._made[path], **synthetic_chats.measure(path)}

    def run(self, contestant: Contestant, n_conversations: int) -> Run:
        """Every stage of a contestant, in a folder that is removed afterwards.

        Raises:
            StageError: a command fails, or it leaves no document.
        """
        chats = self.chats(n_conversations)
        stages: dict[str, Measurement] = {}
        with tempfile.TemporaryDirectory(prefix=f"{contestant.name}.", dir=self._scratch) as name:
            folder = Path(name)
            for stage in contestant.stages(chats, folder):
                measurement = measured_command.measure(
                    stage.command,
                    folder=REPOSITORY,
                    environment=stage.environment,
                    log_file=folder / f"{stage.name}.log",
                )
                stages[stage.name] = measurement
                logger.info(
                    "ran contestant=%s stage=%s n_conversations=%d %s",
                    contestant.name,
                    stage.name,
                    n_conversations,
                    log.fields(dataclasses.asdict(measurement)),
                )
            n_tokens, documents = 0, []
            for token_ids in contestants.written_documents(folder.glob(contestant.written)):
                n_tokens += len(token_ids)
                documents.append(hashlib.blake2b(token_ids, digest_size=8).digest())
        if not documents:
            raise log.StageError(
                "a contestant wrote no document", where=contestant.name, expected=contestant.written
            )
        return Run(n_conversations, stages, n_tokens, documents)


def compare(
    bench: Bench, invited: Sequence[Contestant], *, n_conversations: int, n_repetitions: int
) -> dict[str, Any]:
    """Every contestant once a repetition.

    Returns:
        By contestant: `repetitions`, and `as_mistral_common_fraction`, the share of its documents
        whose token ids datasets.map, which calls the library itself, wrote too.
    """
    repetitions: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in invited}
    documents: dict[str, list[bytes]] = {}
    for _ in range(n_repetitions):
        for contestant in invited:
            run = bench.run(contestant, n_conversations)
            repetitions[contestant.name].append(run.facts())
            documents[contestant.name] = run.documents
    reference = set(documents["datasets_map"])
    return {
        name: {
            "as_mistral_common_fraction": statistics.mean(
                document in reference for document in documents[name]
            ),
            "repetitions": repetitions[name],
        }
        for name in repetitions
    }


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
