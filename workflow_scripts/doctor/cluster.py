"""Snakemake's executors and, where it answers, Slurm."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from workflow_scripts.doctor.finding import Finding, ask, reason
from workflow_scripts.doctor.packages import locked

SECONDS = 5
PLUGIN = "snakemake_executor_plugin_"
LOCK = Path(__file__).resolve().parents[2] / "requirements-cluster.lock"
# Programs that the Slurm executor reads the state of jobs from.
STATUS_COMMANDS = {
    "sacct": ["sacct", "--noheader", "--allocations", "--starttime=now"],
    "squeue": ["squeue", "--noheader", "--me"],
}
# A profile of Snakemake's.
Profile = dict[str, Any]  # untyped: any option of Snakemake's


@dataclass(frozen=True)
class Partition:
    """One line of sinfo: the nodes of one kind."""

    name: str
    state: str
    gpus: str
    """`gpu:a100:4`; empty if there are none."""
    n_nodes: int


def partitions() -> tuple[list[Partition], CompletedProcess[str]]:
    """Slurm's partitions, and what sinfo answered."""
    answer = ask(["sinfo", "--noheader", "--format=%P|%a|%G|%D"], seconds=SECONDS)
    rows = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 3]
    found = [
        Partition(name.rstrip("*"), state, _gpus(gres), int(nodes))
        for name, state, gres, nodes in rows
    ]
    return found, answer


def _gpus(gres: str) -> str:
    """The GPUs in `gpu:a100:4(S:0-1),license:2`."""
    entries = (entry.partition("(")[0] for entry in gres.split(","))
    return ", ".join(entry for entry in entries if entry.startswith("gpu"))


def offered_gpus(found: list[Partition]) -> list[str]:
    return [f"{one.gpus} in {one.name}" for one in found if one.gpus and one.state.startswith("up")]


def findings(
    profile: Path | None, found: list[Partition], answer: CompletedProcess[str]
) -> Iterator[Finding]:
    """Findings about the profile's executor and, if it is used here, Slurm.

    Args:
        profile: folder given as `--workflow-profile`; None means this machine only.
        found: result of `partitions`, as is `answer`.
    """
    settings: Profile = {}
    try:
        if profile:
            import yaml  # may be missing: the doctor starts without any package

            text = (profile / "config.yaml").read_text(encoding="utf-8")
            settings = yaml.safe_load(text) or {}
    except (OSError, yaml.YAMLError) as error:
        message = f"{profile}: {error}".splitlines()[0]
        yield Finding("profile", "missing", message, None, "--workflow-profile FOLDER")
        return
    names = [one.name for one in pkgutil.iter_modules() if one.name.startswith(PLUGIN)]
    plugins = ["local", *sorted(name.removeprefix(PLUGIN).replace("_", "-") for name in names)]
    executor = settings.get("executor")
    yield Finding(
        "executors",
        "ok" if executor in (None, *plugins) else "missing",
        ", ".join(plugins),
        f"{executor}, which {profile} names",
        how_to_install(f"snakemake-executor-plugin-{executor}"),
    )
    if executor == "slurm" or (executor is None and answer.returncode == 0):
        yield from _slurm(profile, settings, found, answer)
    elif executor is None:
        yield Finding("Slurm", "ok", f"none here ({reason(answer)}); not needed")


def how_to_install(plugin: str) -> str:
    """The command that installs a plugin. Plugins in the lock file are installed without their
    dependencies, which would change numpy."""
    if plugin in locked(LOCK):
        return f"python -m pip install --no-deps -r {LOCK.name}"
    return f"pip install {plugin}"


def _slurm(
    profile: Path | None,
    settings: Profile,
    found: list[Partition],
    answer: CompletedProcess[str],
) -> Iterator[Finding]:
    if answer.returncode != 0:
        yield Finding(
            "Slurm",
            "missing",
            reason(answer),
            "an answer of slurmctld",
            "start on a login node of the cluster; SLURM_CONF names its configuration",
        )
        return
    described = [
        f"{one.name} {one.state} {one.n_nodes} node(s) {one.gpus}".rstrip() for one in found
    ]
    yield Finding("Slurm", "ok", "; ".join(described) or "no partition is shown to you")
    resources = settings.get("default-resources") or {}
    wanted = resources.get("slurm_partition") if isinstance(resources, dict) else None
    names = [one.name for one in found]
    if wanted and wanted not in names:
        yield Finding(
            "Slurm's partition",
            "missing",
            f"{wanted} ({profile})",
            ", ".join(names),
            "set default-resources.slurm_partition to one of these",
        )
    status_command = settings.get("slurm-status-command", "sacct" if profile else None)
    for name, command in STATUS_COMMANDS.items():
        done = ask(command, seconds=SECONDS)
        if done.returncode != 0:
            is_needed = name == status_command
            yield Finding(
                name,
                "missing" if is_needed else "warning",
                reason(done),
                "an answer: the state of jobs is read from it" if is_needed else None,
                "slurm-status-command: squeue in the profile"
                if name == "sacct"
                else "ask its administrator",
            )
