"""One thing looked at: what was found, what was expected, how to get it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from workflow_scripts.log import StageError

Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    status: Status
    """`missing`: the config cannot be built without it; `warning`: it can, worse or unproved."""
    found: str
    expected: str | None = None
    to_fix: str | None = None


def of_error(name: str, error: StageError, status: Status = "missing") -> Finding:
    """An error of a stage as a finding."""
    from workflow_scripts.log import DOCTOR

    parts = error.parts
    where = f" ({parts['where']})" if "where" in parts else ""
    found = f": {parts['found']}" if "found" in parts else ""
    texts = {
        key: str(parts[key]).splitlines()[0].removesuffix(f"; {DOCTOR}")
        for key in ("expected", "to fix")
        if key in parts
    }
    return Finding(
        name,
        status,
        f"{error.what}{where}{found}",
        texts.get("expected"),
        texts.get("to fix"),
    )


def table(findings: Sequence[Finding]) -> str:
    """What a terminal shows: a line a finding, and what to do below it where something is wrong."""
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
    found = [asdict(finding) for finding in findings]
    return json.dumps({"is_complete": is_complete(findings), "findings": found}, indent=2)


def is_complete(findings: Sequence[Finding]) -> bool:
    """Whether nothing that the config needs is missing."""
    return all(finding.status != "missing" for finding in findings)


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int | None
    """None: it is not installed, or did not end in time."""
    output: str
    error: str


def ask(command: Sequence[str], *, seconds: float, stdin: str = "") -> Answer:
    """Run a command that may not be there, may not answer and may fail."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, input=stdin
        )
    except FileNotFoundError:
        return Answer(None, "", "not installed")
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"no answer in {seconds:g} s")
    except OSError as error:
        return Answer(None, "", str(error))
    return Answer(done.returncode, done.stdout, done.stderr.strip())
