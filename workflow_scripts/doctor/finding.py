"""One check of the doctor: what it found, what it expected, how to fix it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from workflow_scripts.log import StageError

Status = Literal["ok", "warning", "missing"]
# Exit codes of a shell.
NOT_INSTALLED, TIMED_OUT = 127, 124


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    status: Status
    """`missing`: the config cannot be built; `warning`: it can, but slower, or this is untested."""
    found: str
    expected: str | None = None
    to_fix: str | None = None


def of_error(name: str, error: StageError) -> Finding:
    """The error of a stage as a finding."""
    from workflow_scripts.log import DOCTOR  # needs tqdm, which may be missing

    parts = {key: str(value) for key, value in error.parts.items()}
    where = f" ({parts['where']})" if "where" in parts else ""
    found = f": {parts['found']}" if "found" in parts else ""
    expected, to_fix = (
        parts[key].splitlines()[0].removesuffix(f"; {DOCTOR}") if key in parts else None
        for key in ("expected", "to fix")
    )
    return Finding(name, "missing", f"{error.what}{where}{found}", expected, to_fix)


def table(findings: Sequence[Finding]) -> str:
    """Text for a terminal: one line per finding; where something is wrong, the remedy below it."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.name:<{width}}  {finding.found}")
        if finding.status != "ok":
            for label, text in (("expected", finding.expected), ("to fix", finding.to_fix)):
                if text:
                    lines.append(f"{'':<9}  {label}: {text}")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps(
        {
            "is_complete": is_complete(findings),
            "findings": [asdict(finding) for finding in findings],
        },
        indent=2,
    )


def is_complete(findings: Sequence[Finding]) -> bool:
    """True if nothing that the config needs is missing."""
    return all(finding.status != "missing" for finding in findings)


def ask(command: Sequence[str], *, seconds: float) -> CompletedProcess[str]:
    """Run a command that may be missing, hang or fail.

    Returns:
        Exit code, stdout and stderr. `NOT_INSTALLED` and `TIMED_OUT` have the reason in stderr.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError:
        return CompletedProcess(command, NOT_INSTALLED, "", "not installed")
    except subprocess.TimeoutExpired:
        return CompletedProcess(command, TIMED_OUT, "", f"no answer in {seconds:g} s")
    except OSError as error:
        return CompletedProcess(command, NOT_INSTALLED, "", str(error))


def reason(done: CompletedProcess[str]) -> str:
    """Why a command failed: the first line that it wrote to stderr, else its exit code."""
    return next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
