"""How long Snakemake takes to find that nothing is to be done, for many finished runs.

The files of a build are made empty and recorded by `snakemake --touch` as if their jobs had run;
then `snakemake` is timed. Nothing else is left out: config, rules, input functions, the records of
every file, times of change. Beside it the same build with its runs frozen, and a workflow of a few
lines with as many jobs of one file each, without a record: the least that Snakemake takes for them.

python -m tests.benchmarks.nothing_to_do --runs 20 200 --scratch /tmp
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.machine import REPOSITORY, circumstances, versions
from tests.benchmarks.measured_command import measure
from tests.workflow.conftest import copy_workflow
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.settings import sweeps

RESULT = REPOSITORY / "tests" / "benchmarks" / "results" / "nothing_to_do.json"
QUANTIZATIONS = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M"),
    *("Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q2_K"),
)
FOLDERS = {"checkpoint", "tokenizer", "merged", "awq", "release"}
# `snakemake` of all runs to their releases, and a sweep: trained, scored and ranked.
TARGETS = ("all", "sweep")
PLAIN = """
rule all:
    input: expand("{{n}}.txt", n=range({n_jobs}))

rule one:
    output: "{{n}}.txt"
    shell: "touch {{output}}"
"""
# `--touch` sleeps for a tenth of a second at every job, for file systems that count in seconds.
TOUCH = (
    "import sys; from snakemake.executors import touch; from snakemake.cli import main;"
    " touch.Executor.SLEEPING_TIME = 0.002; sys.argv[0] = 'snakemake'; main()"
)


def overlay(n_runs: int) -> dict[str, Any]:
    """Runs that differ in their learning rate, by a list: each of them built, too."""
    rates = [float(f"{1e-4 * 1.02**number:.4e}") for number in range(n_runs)]
    recipe = {"sweep": True, "rank": 8, "alpha": 16, "learning_rate": rates, "max_steps": 2}
    run = {"model": "demo", "dataset": "stdlib-help", "packing": "swa-aware-demo"}
    config = {"recipes": {"rates": recipe}, "runs": {"rates": run | {"recipe": "rates"}}}
    return config | {
        "build": sweeps.expand(config).runs["rates"],
        "gguf": {"quantizations": list(QUANTIZATIONS)},
        "evaluation": {"context": {"use": False}},
    }


def finish(folder: Path, arguments: Sequence[str]) -> dict[str, int]:
    """A build as if it had run.

    Returns:
        how many jobs and files it has.
    """
    summary = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments, "--cores", "1", "--summary"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    outputs = [Path(folder, line.split("\t")[0]) for line in summary.splitlines()[1:]]
    for path in outputs:
        if path.name in FOLDERS:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"files": {}}' if path.name == "facts.json" else "{}")
    # So many cores, that no job waits for another's.
    touched = subprocess.run(
        [sys.executable, "-c", TOUCH, *arguments, "--touch", "--forceall", "--quiet", "rules"]
        + ["--cores", "2000", "--scheduler", "greedy", "--max-jobs-per-timespan", "100000/1s"],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ).stdout
    (n_jobs,) = re.findall(r"^total +(\d+)$", touched, re.MULTILINE)[:1]
    return {"jobs": int(n_jobs), "files": len(outputs)}


def time_snakemake(folder: Path, arguments: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Seconds, of the wall and of the processor, and memory of `snakemake` in a finished build."""
    command = [sys.executable, "-m", "snakemake", *arguments, "--cores", "2"]
    output = folder / "output.txt"
    measurements = []
    for _ in range(repetitions):
        measurements.append(measure(command, folder=folder, log_file=output))
        if "Nothing to be done" not in output.read_text():
            raise StageError("something was to be done", where=output, found=output.read_text())
    return {
        "median_seconds": statistics.median(one.duration_seconds for one in measurements),
        "measurements": [dataclasses.asdict(one) for one in measurements],
    }


def time_target(scratch: Path, target: str, n_runs: int, repetitions: int) -> dict[str, Any]:
    """A build of so many runs."""
    folder = scratch / f"{target}-{n_runs}"
    folder.mkdir()
    copy_workflow(folder)
    config = folder / "overlay.yaml"
    config.write_text(yaml.safe_dump(overlay(n_runs)))
    n_quantizations = len(QUANTIZATIONS) if target == "all" else 0
    arguments = [target, "--configfile", "config/demo.yaml", str(config)]
    found = {"target": target, "runs": n_runs, "quantizations": n_quantizations}
    found |= finish(folder, arguments) | time_snakemake(folder, arguments, repetitions)
    return found | {
        "frozen": time_snakemake(folder, [*arguments, "--config", "frozen=['*']"], repetitions)
    }


def time_plain(scratch: Path, n_jobs: int, repetitions: int) -> dict[str, Any]:
    """As many jobs that have one file each, and nothing else."""
    folder = scratch / f"plain-{n_jobs}"
    folder.mkdir()
    (folder / "Snakefile").write_text(PLAIN.format(n_jobs=n_jobs - 1))
    for number in range(n_jobs - 1):
        (folder / f"{number}.txt").touch()
    return time_snakemake(folder, [], repetitions)


def seconds(timed: dict[str, Any]) -> str:
    return f"{timed['median_seconds']:.1f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for the builds")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    found: dict[str, Any] = circumstances() | {
        "versions": versions(sys.executable, ("snakemake",)),
        "builds": [],
    }
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="nothing-") as scratch:
        for target in options.targets:
            for n_runs in options.runs:
                timed = time_target(Path(scratch), target, n_runs, options.repetitions)
                plain = time_plain(Path(scratch), timed["jobs"], options.repetitions)
                found["builds"].append(timed | {"plain": plain})
                print(
                    f"{target}, {n_runs} runs, {timed['jobs']} jobs: {seconds(timed)};"
                    f" frozen {seconds(timed['frozen'])}; as many plain jobs {seconds(plain)}",
                    flush=True,
                )
                files.write_json(options.result, found)


if __name__ == "__main__":
    main()
