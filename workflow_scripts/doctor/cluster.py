"""Snakemake's executors, and Slurm, as far as it answers."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.doctor.finding import Answer, Finding, ask
from workflow_scripts.doctor.packages import locked

SECONDS = 5
PLUGIN = "snakemake_executor_plugin_"
LOCK = Path(__file__).resolve().parents[2] / "requirements-cluster.lock"


@dataclass(frozen=True)
class Partition:
    """As sinfo lists it: one line for nodes of a kind."""

    name: str
    state: str
    gpus: str
    """`gpu:a100:4`; empty where there are none."""
    n_nodes: int


def partitions() -> tuple[list[Partition], Answer]:
    answer = ask(["sinfo", "--noheader", "--format=%P|%a|%G|%D"], seconds=SECONDS)
    rows = [line.split("|") for line in answer.output.splitlines() if line.count("|") == 3]
    found = [
        Partition(name.rstrip("*"), state, _gpus(gres), int(nodes))
        for name, state, gres, nodes in rows
    ]
    return found, answer


def _gpus(gres: str) -> str:
    """Of `gpu:a100:4(S:0-1),license:2` the GPUs."""
    entries = (entry.partition("(")[0] for entry in gres.split(","))
    return ", ".join(entry for entry in entries if entry.startswith("gpu"))


def offered_gpus(found: list[Partition]) -> list[str]:
    return [f"{one.gpus} in {one.name}" for one in found if one.gpus and one.state.startswith("up")]


def findings(profile: Path | None, found: list[Partition], answer: Answer) -> Iterator[Finding]:
    """
    Args:
        profile: folder given as `--workflow-profile`; None is this machine alone.
        found: of `partitions`, with `answer`.
    """
    names = {module.name for module in pkgutil.iter_modules() if module.name.startswith(PLUGIN)}
    plugins = sorted(name.removeprefix(PLUGIN).replace("_", "-") for name in names)
    settings = _settings(profile) if profile else {}
    executor = settings.get("executor")
    if isinstance(settings.get("error"), str):
        yield Finding("profile", "missing", settings["error"], None, "--workflow-profile FOLDER")
        return
    is_there = executor in (None, "local", *plugins)
    yield Finding(
        "executors",
        "ok" if is_there else "missing",
        ", ".join(["local", *plugins]),
        f"{executor}, which {profile} names",
        how_to_install(f"snakemake-executor-plugin-{executor}"),
    )
    if executor == "slurm" or (executor is None and answer.code == 0):
        yield from _slurm(profile, settings, found, answer)
    elif executor is None:
        yield Finding("Slurm", "ok", f"none here ({_reason(answer)}); not asked for")


def how_to_install(plugin: str) -> str:
    """By the lock, where it has the plugin: with its dependencies pip would change numpy."""
    if plugin in locked(LOCK):
        return f"python -m pip install --no-deps -r {LOCK.name}"
    return f"pip install {plugin}"


def _settings(profile: Path) -> dict[str, Any]:  # untyped: a profile of Snakemake's
    import yaml

    try:
        text = (profile / "config.yaml").read_text(encoding="utf-8")
        return yaml.safe_load(text) or {}
    except (OSError, yaml.YAMLError) as error:
        return {"error": f"{profile}: {error}".splitlines()[0]}


def _slurm(
    profile: Path | None,
    settings: dict[str, Any],  # untyped: a profile of Snakemake's
    found: list[Partition],
    answer: Answer,
) -> Iterator[Finding]:
    if answer.code != 0:
        yield Finding(
            "Slurm",
            "missing",
            _reason(answer),
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
    if wanted and wanted not in {one.name for one in found}:
        yield Finding(
            "Slurm's partition",
            "missing",
            f"{wanted} ({profile})",
            ", ".join(one.name for one in found),
            "set default-resources.slurm_partition to one of these",
        )
    asked = settings.get("slurm-status-command", "sacct" if profile else None)
    commands = {
        "sacct": ["sacct", "--noheader", "--allocations", "--starttime=now"],
        "squeue": ["squeue", "--noheader", "--me"],
    }
    for name, command in commands.items():
        told = ask(command, seconds=SECONDS)
        if told.code == 0:
            continue
        needed = name == asked
        yield Finding(
            name,
            "missing" if needed else "warning",
            _reason(told),
            "an answer: the state of jobs is read from it" if needed else None,
            "slurm-status-command: squeue in the profile" if name == "sacct" else "ask its admin",
        )


def _reason(answer: Answer) -> str:
    return answer.error.splitlines()[0] if answer.error else f"exit code {answer.code}"
