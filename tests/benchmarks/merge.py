"""Benchmark of merging: time and memory beside PEFT's merge and a plain copy of the same files.

Everyone in turn within every repetition, each in a process of its own, once with the base in the
page cache and once without; what is written is synced, and removed before the next begins.

python -m tests.benchmarks.merge --layers 14 --repetitions 3 --scratch /tmp

python -m tests.benchmarks.merge --table tests/benchmarks/results/merge.json
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import measured_command
from tests.benchmarks.machine import REPOSITORY, circumstances, versions
from tests.benchmarks.merge_table import table
from tests.benchmarks.model_shapes import CONFIGS, bare_facts
from workflow_scripts import files, log

logger = log.stage_logger("merge")

RESULT = REPOSITORY / "tests/benchmarks/results/merge.json"
PACKAGES = "torch safetensors peft transformers bitsandbytes".split()
CONTESTANTS = ("copy", "original", "dequantized", "peft")
CACHES = ("warm", "cold")
SHARD_BYTES = 2 * 10**9
RANK = 32


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--table", type=Path, help="print the table of this result, and end")
    parser.add_argument("--shape", choices=CONFIGS, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="of the shape; default: all")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", type=Path, help="room for two models")
    parser.add_argument("--result", type=Path, default=RESULT, help="to write: JSON")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(files.read_json(arguments.table)))
        return

    from tests.benchmarks.synthetic_checkpoint import write_adapter, write_checkpoint

    config = dict(CONFIGS[arguments.shape])
    config["num_hidden_layers"] = arguments.layers or config["num_hidden_layers"]
    result: dict[str, Any] = {**circumstances(), "versions": versions(sys.executable, PACKAGES)}
    with tempfile.TemporaryDirectory(prefix="merge.", dir=arguments.scratch) as name:
        scratch = Path(name)
        shards = write_checkpoint(scratch / "base", config, shard_bytes=SHARD_BYTES)
        write_adapter(scratch / "adapter", config, rank=RANK)
        bare_facts(config).write(scratch / "facts.json")
        (scratch / "tokenizer").mkdir()
        result |= {
            "shape": arguments.shape,
            "n_layers": config["num_hidden_layers"],
            "size_bytes": sum(shard.stat().st_size for shard in shards),
            "shard_bytes": SHARD_BYTES,
            "rank": RANK,
            "n_threads": arguments.threads,
            "caches": {},
        }
        for cache in arguments.caches:
            runs: dict[str, Any] = {contestant: [] for contestant in arguments.contestants}
            for _ in range(arguments.repetitions):
                for contestant in arguments.contestants:
                    measured = run(contestant, scratch, shards, cache, arguments.threads)
                    runs[contestant].append(measured)
                    logger.info("measured %s cache=%s %s", contestant, cache, log.fields(measured))
            result["caches"][cache] = runs
            files.write_json(arguments.result, result)
    logger.info("wrote %s", arguments.result)
    print(table(result))


def run(
    contestant: str, scratch: Path, shards: Sequence[Path], cache: str, n_threads: int
) -> dict[str, Any]:
    """One contestant, once.

    Args:
        scratch: with `base`, `adapter`, `facts.json` and `tokenizer`; `merged` is written, and
            removed.
    """
    merged = scratch / "merged"
    paths = ["--checkpoint", scratch / "base", "--adapter", scratch / "adapter"]
    paths += ["--merged", merged]
    if contestant in ("original", "dequantized"):
        command = [sys.executable, "-m", "workflow_scripts.merge.merge_adapter", *paths]
        command += ["--merge-base", contestant, "--tokenizer", scratch / "tokenizer"]
        command += ["--facts", scratch / "facts.json"]
    else:
        command = [sys.executable, "-m", "tests.benchmarks.merge_contestants", *paths]
        command += ["--contestant", contestant]
    for shard in shards:
        put_in_cache(shard) if cache == "warm" else drop_from_cache(shard)
    try:
        return dataclasses.asdict(
            measured_command.measure(
                command,
                folder=REPOSITORY,
                environment={"OMP_NUM_THREADS": str(n_threads)},
                log_file=scratch / f"{contestant}.log",
            )
        )
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def put_in_cache(path: Path) -> None:
    with path.open("rb") as stream:
        while stream.read(2**24):
            pass


def drop_from_cache(path: Path) -> None:
    """Its pages; they are on disk, as the file was synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
