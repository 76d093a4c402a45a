"""Python, and the installed packages against the lock file. The standard library is enough here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from workflow_scripts.doctor.finding import Finding

OLDEST_PYTHON = (3, 11)
N_NAMED = 8


def findings(lock: Path) -> Iterator[Finding]:
    """
    Args:
        lock: `name==version` a line.
    """
    found = f"{sys.version.split()[0]}, {sys.executable}"
    expected = ".".join(map(str, OLDEST_PYTHON)) + " or newer"
    is_old = sys.version_info < OLDEST_PYTHON
    yield Finding(
        "Python", "missing" if is_old else "ok", found, expected, "install it; PYTHON=… make run"
    )
    wanted = locked(lock)
    installed = {name: installed_version(name) for name in wanted}
    lacking = [name for name, version in installed.items() if version is None]
    others = [
        f"{name} {version} ({wanted[name]})"
        for name, version in installed.items()
        if version is not None and version != wanted[name]
    ]
    if lacking:
        yield Finding(
            "packages",
            "missing",
            f"{len(lacking)} of {len(wanted)} are not installed: {_named(lacking)}",
            f"those of {lock.name}",
            f"python -m pip install -r {lock.name}   (or: make run)",
        )
    elif not others:
        yield Finding("packages", "ok", f"{len(wanted)}, as {lock.name} pins them")
    if others:
        yield Finding(
            "versions",
            "warning",
            _named(others),
            f"those of {lock.name}, in brackets, which were tested",
            f"python -m pip install -r {lock.name}",
        )


def harness_finding(names: Sequence[str], lock: Path, *, is_needed: bool) -> Finding:
    """lm-evaluation-harness, for a config that names tasks of it.

    Args:
        names: `evaluation.tasks.names`.
        lock: of its environment.
        is_needed: `snakemake` alone scores them, not `snakemake tasks` only.
    """
    found, wanted = installed_version("lm_eval"), locked(lock)["lm_eval"]
    if found is None:
        return Finding(
            "lm_eval",
            "missing" if is_needed else "warning",
            f"not installed, for {_named(list(names))}",
            f"lm_eval {wanted}, in an environment of its own",
            "make tasks, or --sdm conda; workflow_scripts/evaluate/README.md tells how",
        )
    if found != wanted:
        to_fix = "make tasks"
        return Finding("lm_eval", "warning", found, f"{wanted}, which was tested", to_fix)
    return Finding("lm_eval", "ok", f"{found}, for {_named(list(names))}")


def locked(lock: Path) -> dict[str, str]:
    """Package → version of a lock file."""
    lines = (line.partition("#")[0] for line in lock.read_text(encoding="utf-8").splitlines())
    pins = (line.partition(";")[0].strip().partition("==") for line in lines)
    return {name: version for name, separator, version in pins if separator}


def installed_version(package: str) -> str | None:
    """Without the tag of a build: torch 2.13.0+cpu and +cu130 are 2.13.0."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _named(names: list[str]) -> str:
    rest = f" and {len(names) - N_NAMED} more" if len(names) > N_NAMED else ""
    return ", ".join(names[:N_NAMED]) + rest
