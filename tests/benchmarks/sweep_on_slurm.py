"""How busy a sweep keeps a cluster: Snakemake and Slurm for real, jobs that only sleep.

Slurm of two nodes on this machine has as many CPUs as the cluster has slots, one a job, and
Snakemake runs a sweep on it with `profiles/slurm`. Between the two stands an `sbatch` of this
program's: it hands each job on to the real one as a sleep and a touch of the rule's outputs. So
what is measured is what keeps slots empty: how fast jobs are submitted, how late it is seen that
one ended, and how many may wait in Slurm's own queue (`jobs` of the profile).

python -m tests.benchmarks.sweep_on_slurm --runs 200 --slots 100 --jobs 100 500 --scratch /tmp
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.machine import REPOSITORY, circumstances, versions
from tests.slurm.conftest import HERE as SLURM, SYSTEM, free_port
from tests.workflow.conftest import DEMO, TINY, copy_workflow
from workflow_scripts import files

RESULT = REPOSITORY / "tests" / "benchmarks" / "results" / "sweep_on_slurm.json"
PACKAGES = (
    "snakemake",
    "snakemake-executor-plugin-slurm",
    "snakemake-executor-plugin-slurm-jobstep",
)
# Of a sweep on a cluster: the trainings are its work, what stands around them takes seconds.
RULES = ("plan_memory", "train_adapter", "evaluate_validation")

# The outputs of each rule, as the workflow itself knows them.
READ_OUTPUTS = r"""
import json, re, sys
from pathlib import Path
from snakemake.api import ConfigSettings, ResourceSettings, SnakemakeApi

def plain(pattern):  # without the names that a wildcard is limited to
    return re.sub(r"\{run,[^/]*\}", "{run}", str(pattern))

with SnakemakeApi() as api:
    workflow = api.workflow(
        resource_settings=ResourceSettings(cores=1),
        config_settings=ConfigSettings(configfiles=[Path(name) for name in sys.argv[1:]]),
        snakefile=Path("Snakefile"),
    )._workflow
    print(json.dumps({
        rule.name: [plain(file) for file in [*rule.output, rule.benchmark] if file]
        for rule in workflow.rules
    }))
"""

SBATCH = """#!{python}
import json, os, re, shlex, sys
rules = json.load(open({rules!r}))
arguments = sys.argv[1:]
place = next(i for i, argument in enumerate(arguments) if argument.startswith("--wrap"))
comment = arguments[arguments.index("--comment") + 1]
name, run = re.fullmatch(r"rule_(\\w+?)_wildcards_(.+)", comment).groups()
outputs = [output.replace("{{run}}", run) for output in rules[name]["outputs"]]
made = " ".join(map(repr, outputs))
times = {times!r} + "/$SLURM_JOB_ID"
command = (
    f"echo {{name}} $(date +%s.%N) > {{times}}; sleep {{rules[name]['seconds']}};"
    f" mkdir -p $(dirname {{made}}); touch {{made}}; date +%s.%N >> {{times}}"
)
arguments[place:] = ["--wrap", command]
os.execv({sbatch!r}, ["sbatch", *arguments])
"""


def prepare(folder: Path, n_runs: int) -> list[Path]:
    """The workflow in a folder, its data made, and the config files of the sweep."""
    copy_workflow(folder)
    rates = [float(f"{1e-4 * 1.02**number:.4e}") for number in range(n_runs)]
    recipe = {"sweep": True, "rank": 8, "alpha": 16, "learning_rate": rates, "max_steps": 2}
    run = {"model": "demo", "dataset": "stdlib-help", "packing": "swa-aware-demo"}
    overlay = folder / "sweep.yaml"
    overlay.write_text(
        yaml.safe_dump({"recipes": {"rates": recipe}, "runs": {"rates": run | {"recipe": "rates"}}})
    )
    configs = [DEMO, TINY, overlay]
    subprocess.run([*snakemake("data", configs), "--cores", "2", "--quiet"], cwd=folder, check=True)
    return configs


def snakemake(target: str, configs: Sequence[Path]) -> list[str]:
    command = [sys.executable, "-m", "snakemake", target, "--nocolor", "--configfile"]
    return [*command, *map(str, configs)]


def measure(
    folder: Path, configs: Sequence[Path], environment: dict[str, str], slots: int, jobs: int
) -> dict[str, Any]:
    """One sweep from its plans to its scores.

    Returns:
        seconds from the first job's start to the last one's end, and the share of all slots'
        seconds in which a job ran: over the whole, and from the first training's start until no
        job waits to be started, while a perfect scheduler would leave none empty.
    """
    times = folder / "times"
    for file in times.glob("*"):
        file.unlink()
    subprocess.run(["rm", "-rf", *map(str, (folder / "results").glob("runs"))], check=True)
    with (folder / f"snakemake-{jobs}.log").open("w") as log:
        subprocess.run(
            [
                *snakemake("sweep", configs),
                *("--workflow-profile", "profiles/slurm", "--jobs", str(jobs)),
                *("--until", "evaluate_validation", "--max-threads", "1"),
            ],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    spans = []
    for file in times.iterdir():
        first, ended = file.read_text().splitlines()
        name, started = first.split()
        spans.append((name, float(started), float(ended)))
    begin, last_start = min(span[1] for span in spans), max(span[1] for span in spans)
    end = max(span[2] for span in spans)
    first_training = min(start for name, start, _ in spans if name == "train_adapter")

    def share(since: float, until: float) -> float:
        inside = (max(0, min(stop, until) - max(start, since)) for _, start, stop in spans)
        return sum(inside) / (slots * (until - since))

    return {
        "jobs": jobs,
        "n_jobs": {name: sum(span[0] == name for span in spans) for name in RULES},
        "seconds": end - begin,
        "busy": share(begin, end),
        "busy_while_jobs_wait": share(first_training, last_start),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--slots", type=int, default=100, help="an even number")
    parser.add_argument("--jobs", type=int, nargs="+", default=[100, 500], help="--jobs of each")
    parser.add_argument("--training-seconds", type=int, default=600)
    parser.add_argument("--other-seconds", type=int, default=20, help="of a plan, of a score")
    parser.add_argument("--scratch", type=Path, help="folder for everything")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args(arguments)

    found: dict[str, Any] = circumstances() | {
        "versions": versions(sys.executable, PACKAGES),
        **{name: getattr(options, name) for name in ("runs", "slots")},
        "training_seconds": options.training_seconds,
        "other_seconds": options.other_seconds,
        "sweeps": [],
    }
    # A short path: that of munge's socket may have 107 characters.
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="sweep-") as scratch:
        Path(scratch).chmod(0o755)  # munge's socket is for all
        folder, home = Path(scratch, "workflow"), Path(scratch, "slurm")
        folder.mkdir()
        configs = prepare(folder, options.runs)
        environment = os.environ | {
            "PATH": f"{home / 'sleeping'}:{home / 'bin'}:{os.environ['PATH']}:{SYSTEM}",
            "SLURM_CONF": str(home / "slurm.conf"),
            "SLURM_TEST_PORT": str(free_port()),
            "SLURM_TEST_CPUS": str(options.slots // 2),
        }
        subprocess.run([SLURM / "up", home], env=environment, check=True)
        try:
            write_sbatch(folder, home, configs, options)
            for jobs in options.jobs:
                sweep = measure(folder, configs, environment, options.slots, jobs)
                found["sweeps"].append(sweep)
                print(json.dumps(sweep), flush=True)
                files.write_json(options.result, found)
        finally:
            subprocess.run([SLURM / "down", home], env=environment, check=True)


def write_sbatch(
    folder: Path, home: Path, configs: Sequence[Path], options: argparse.Namespace
) -> None:
    """The `sbatch` whose jobs sleep; it goes before Slurm's own."""
    outputs = json.loads(
        subprocess.run(
            [sys.executable, "-c", READ_OUTPUTS, *map(str, configs)],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()[-1]
    )
    seconds = dict.fromkeys(RULES, options.other_seconds)
    seconds["train_adapter"] = options.training_seconds
    rules = {name: {"seconds": seconds[name], "outputs": outputs[name]} for name in RULES}
    files.write_json(home / "rules.json", rules)
    (folder / "times").mkdir()
    (home / "sleeping").mkdir()
    program = home / "sleeping" / "sbatch"
    program.write_text(
        SBATCH.format(
            python=sys.executable,
            rules=str(home / "rules.json"),
            times=shlex.quote(str(folder / "times")),
            sbatch=str(home / "bin" / "sbatch"),
        )
    )
    program.chmod(0o755)


if __name__ == "__main__":
    main()
