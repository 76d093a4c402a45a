"""Every figure that was measured of a run, in one file (`collect_metrics`)."""

from __future__ import annotations

from typing import Literal

from workflow_scripts.handover.record import Record
from workflow_scripts.settings import RunSettings


class Metric(Record):
    """One number."""

    value: int | float
    unit: str
    """Empty where the number has none."""
    error: int | float | None
    error_is: Literal["standard error", "standard deviation"] | None
    """None where there is no error."""
    n: int | None
    """How many values the number is a mean of; None if it is not a mean."""
    file: str
    """Path of the file that holds the number, below the folder of results."""
    key: str
    """Place of the number in that file: `scores.0.low` is `low` of the first of `scores`."""


class RunMetrics(Record):
    """`metrics.json`: all figures of a run, with the files that they were read from."""

    run: str
    settings: RunSettings
    """`runs.<name>` of the config."""
    links: dict[str, dict[str, Metric]]
    """Link → name of a figure → the figure; figures of the whole run are under `run`."""
    files: dict[str, str]
    """Path below the folder of results → SHA-256."""
