"""Python and its packages, compared with the lock file. Needs the standard library only."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from workflow_scripts.doctor.finding import Finding, ask

OLDEST_PYTHON = (3, 11)
N_NAMED = 8
PIN = re.compile(r"^([\w.-]+)==([^\s;#]+)", re.MULTILINE)
CHECK_SECONDS = 60


def findings(lock: Path) -> Iterator[Finding]:
    """Findings about Python and the installed packages.

    Args:
        lock: one `name==version` per line.
    """
    yield Finding(
        "Python",
        "missing" if sys.version_info < OLDEST_PYTHON else "ok",
        f"{sys.version.split()[0]}, {sys.executable}",
        ".".join(map(str, OLDEST_PYTHON)) + " or newer",
        "install it; PYTHON=… make run",
    )
    pins = locked(lock)
    installed = {name: installed_version(name) for name in pins}
    lacking = [name for name, version in installed.items() if version is None]
    others = [
        f"{name} {version} ({pins[name]})"
        for name, version in installed.items()
        if version not in (None, pins[name])
    ]
    to_fix = f"python -m pip install -r {lock.name}"
    if lacking:
        yield Finding(
            "packages",
            "missing",
            f"{len(lacking)} of {len(pins)} are not installed: {_named(lacking)}",
            f"those of {lock.name}",
            f"{to_fix}   (or: make run)",
        )
    elif not others:
        yield Finding("packages", "ok", f"{len(pins)}, as {lock.name} pins them")
    if others:
        expected = f"the tested versions, in brackets, of {lock.name}"
        yield Finding("versions", "warning", _named(others), expected, to_fix)
        # The lock's own versions fit each other; whether these do is a question for pip.
        checked = ask([sys.executable, "-m", "pip", "check"], seconds=CHECK_SECONDS)
        found = (checked.stdout or checked.stderr).strip().splitlines()
        yield Finding(
            "pip check",
            "warning" if checked.returncode else "ok",
            _named(found),
            "no broken requirements",
            to_fix,
        )


def harness_finding(names: Sequence[str], lock: Path, *, is_needed: bool) -> Finding:
    """lm-evaluation-harness, for a config that names tasks of it.

    Args:
        names: `evaluation.tasks.names`.
        lock: of the environment for tasks.
        is_needed: plain `snakemake` scores the tasks, not only `snakemake tasks`.
    """
    found, tested = installed_version("lm_eval"), locked(lock)["lm_eval"]
    if found is None:
        return Finding(
            "lm_eval",
            "missing" if is_needed else "warning",
            f"not installed, for {_named(names)}",
            f"lm_eval {tested}, in a separate environment",
            "make tasks, or --sdm conda; see docs/evaluation.md",
        )
    return Finding(
        "lm_eval",
        "ok" if found == tested else "warning",
        f"{found}, for {_named(names)}",
        f"{tested}, the tested version",
        "make tasks",
    )


def locked(lock: Path) -> dict[str, str]:
    """Package → version of a lock file."""
    return dict(PIN.findall(lock.read_text(encoding="utf-8")))


def installed_version(package: str) -> str | None:
    """The version without its build tag (torch 2.13.0+cpu and +cu130 are both 2.13.0), or None."""
    installed = metadata.distributions(name=package)
    return next((found.version.partition("+")[0] for found in installed), None)


def _named(names: Sequence[str]) -> str:
    rest = f" and {len(names) - N_NAMED} more" if len(names) > N_NAMED else ""
    return ", ".join(names[:N_NAMED]) + rest
