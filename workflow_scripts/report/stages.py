"""Which stages made some files, from which others: as Snakemake recorded it when it ran them, and
as a figure.

Read are the records below `.snakemake/metadata`, a file an output, with the rule, its inputs, its
command and its times (format 6, snakemake/persistence/file.py). They are no input of any rule: a
page that shows them is made anew when its figures are, not whenever a stage ran.
"""

from __future__ import annotations

import itertools
import json
import re
from base64 import urlsafe_b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from workflow_scripts import pages
from workflow_scripts.report import layers
from workflow_scripts.report.figures import COLORS

# The program of a stage; `take_gpus`, which starts it, lies in no room.
PROGRAM = re.compile(r"\bworkflow_scripts\.(\w+)\.(\w+)\b")
JobName = tuple[str, tuple[str, ...]]


class Stage(NamedTuple):
    """A program, and all that it was run for."""

    room: str
    name: str
    n_jobs: int
    seconds: float
    """Of all jobs, from start to last file, also of those that ran side by side."""


@dataclass
class Job:
    """What Snakemake records of a job."""

    command: str
    start: float
    """Seconds since 1970, as is `end`."""
    end: float = 0.0


@dataclass(frozen=True)
class Stages:
    """What was run, and what went into what."""

    stages: list[Stage]
    follows: frozenset[tuple[int, int]]
    """(earlier, later): places in `stages`; a file of the one went into the other."""
    n_unrecorded: int
    """Files asked for of which there is no record."""


def stages_of(wanted: Iterable[str], records: Path) -> Stages:
    """The stages behind some files, however far back.

    Args:
        wanted: paths as Snakemake has them, from its working directory.
        records: `.snakemake/metadata`.
    """
    paths = recorded(records)
    jobs: dict[JobName, Job] = {}
    pairs: set[tuple[JobName, JobName]] = set()
    of_file: dict[str, JobName | None] = {}
    waiting: list[tuple[str, JobName | None]] = [(file, None) for file in wanted]
    n_unrecorded = 0
    while waiting:
        file, later = waiting.pop()
        if file not in of_file:
            record = read(file, paths)
            of_file[file] = None
            if record is not None:
                job = of_file[file] = record["rule"], tuple(record["log"])
                if job not in jobs:
                    waiting += [(name, job) for name in record["input"]]
                keep(jobs, job, record)
            n_unrecorded += record is None and later is None
        if (earlier := of_file[file]) is not None and later is not None:
            pairs.add((earlier, later))
    return gathered(jobs, pairs, n_unrecorded)


def recorded(records: Path) -> dict[str, Path]:
    """File → its record; names too long for the disk are cut into folders that begin with `@`."""
    found = {}
    for path in sorted(path for path in records.rglob("*") if path.is_file()):
        name = "".join(part.removeprefix("@") for part in path.relative_to(records).parts)
        found[urlsafe_b64decode(name).decode("utf-8")] = path
    return found


def read(
    file: str, paths: Mapping[str, Path]
) -> dict[str, Any] | None:  # untyped: a record of Snakemake's
    """The record of a file, or of the folder that was made with it; None where there is none, or
    only what a job has begun to write."""
    for name in (file, *map(str, Path(file).parents)):
        if name in paths:
            try:
                record: dict[str, Any] = json.loads(paths[name].read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                return None
            return record if record.get("rule") and not record.get("incomplete") else None
    return None


def keep(
    jobs: dict[JobName, Job],
    name: JobName,
    record: Mapping[str, Any],  # untyped: a record of Snakemake's
) -> None:
    """Each output of a job has a record of its own: the last file written ends the job."""
    job = jobs.setdefault(name, Job(record["shellcmd"] or "", record["starttime"]))
    job.end = max(job.end, record["endtime"])


def gathered(
    jobs: Mapping[JobName, Job],
    pairs: Iterable[tuple[JobName, JobName]],
    n_unrecorded: int,
) -> Stages:
    """Jobs by the program that they ran."""
    of_job = {name: program(name[0], job.command) for name, job in jobs.items()}
    names = sorted(set(of_job.values()))
    stages = []
    for room, name in names:
        ran = [job for job_name, job in jobs.items() if of_job[job_name] == (room, name)]
        # A file may be older than its job: one that kept the time of what it was copied from.
        seconds = sum(max(0.0, job.end - job.start) for job in ran)
        stages.append(Stage(room, name, len(ran), seconds))
    places = {name: place for place, name in enumerate(names)}
    follows = {(places[of_job[one]], places[of_job[other]]) for one, other in pairs}
    return Stages(stages, frozenset((a, b) for a, b in follows if a != b), n_unrecorded)


def program(rule: str, command: str) -> tuple[str, str]:
    """(room, name) of what a command runs; the rule's name where that is none of ours."""
    found = PROGRAM.search(command)
    return (found[1], found[2]) if found else ("", rule)


def figure(found: Stages, caption: str) -> str:
    """HTML of the stages as boxes, each below what it follows; a line that a way through other
    boxes implies is left out.

    Raises:
        graphlib.CycleError: stages follow each other in a circle.
    """
    edges = layers.without_detours(len(found.stages), found.follows)
    drawing = layers.lay_out(len(found.stages), edges)
    rooms = sorted({stage.room for stage in found.stages})
    colors = dict(zip(rooms, itertools.cycle(COLORS), strict=False))
    lines = "".join(f'<path d="{path}" marker-end="url(#follows)"/>' for path in drawing.paths)
    boxes = "".join(
        _box(stage, place, colors[stage.room])
        for stage, place in zip(found.stages, drawing.places, strict=True)
    )
    label = pages.visible(caption)
    return (
        '<figure class="stages"><div class="wide">'
        f'<svg width="{drawing.width:g}" height="{drawing.height:g}"'
        f' viewBox="0 0 {drawing.width:g} {drawing.height:g}" role="img" aria-label="{label}">'
        '<defs><marker id="follows" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6"'
        ' markerHeight="6" orient="auto"><path d="M0 0L6 3L0 6Z"/></marker></defs>'
        f"{lines}{boxes}</svg></div><figcaption>{label}</figcaption></figure>"
    )


def _box(stage: Stage, place: layers.Place, color: str) -> str:
    left, top = place.x - layers.BOX_WIDTH / 2, place.y
    about = [stage.room, pages.counted(stage.n_jobs, "job"), took(stage.seconds)]
    return (
        f'<g><rect x="{left:g}" y="{top:g}" width="{layers.BOX_WIDTH}"'
        f' height="{layers.BOX_HEIGHT}"/>'
        f'<path class="room" d="M{left:g} {top:g}v{layers.BOX_HEIGHT}" stroke="{color}"/>'
        f'<text class="name" x="{left + 10:g}" y="{top + 17:g}">{pages.visible(stage.name)}</text>'
        f'<text x="{left + 10:g}" y="{top + 32:g}">'
        f"{pages.visible(' · '.join(part for part in about if part))}</text></g>"
    )


def took(seconds: float) -> str:
    """`31 s`, `12 min` or `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3_600:.1f} h"
