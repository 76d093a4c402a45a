"""Logging and exit codes of the stage programs.

A log line is time, level, stage, past-tense verb, `key=value`. It goes to stderr, which the rule
redirects to its log file. Exit codes: 0 done; 1 a `StageError` (a message, no traceback); 2 wrong
usage. Any other exception keeps its traceback, because it is a bug of ours.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 30.0
# Appended to a remedy when the machine may lack something.
DOCTOR = "`python -m workflow_scripts.doctor` lists what else this machine lacks"


class StageError(Exception):
    """An error for the user: what went wrong, where, found, expected, and the remedy.

    Args:
        what: one line that names the problem in the user's terms.
        where: file, line or key.
        found: the offending value.
        expected: a valid value.
        to_fix: what the user can do.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        to_fix: str | None = None,
    ) -> None:
        parts = {"where": where, "found": found, "expected": expected, "to fix": to_fix}
        self.what = what
        self.parts = {key: value for key, value in parts.items() if value is not None}
        lines = [f"  {key + ':':<10}{value}" for key, value in self.parts.items()]
        super().__init__("\n".join([what, *lines]))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Prints a stage's docstring, with its usage example, as it is written."""


def stage_logger(stage: str) -> logging.Logger:
    """Return the logger of one stage program; it writes to stderr."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        stream=sys.stderr,
    )
    for chatty in ("httpx", "httpx2", "huggingface_hub", "matplotlib", "mistral_common", "gguf"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return logging.getLogger(stage)


def run_stage(main: Callable[[], None]) -> int:
    """Run a stage's `main`; print a `StageError` as its message and return exit code 1."""
    try:
        main()
    except StageError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return 1
    return 0


def fields(values: Mapping[str, object]) -> str:  # untyped: a log line may show anything
    """Format values as `key=value` for a log line; nested tables and lists are left out."""
    return " ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
        if not isinstance(value, (dict, list))
    )


def versions(*packages: str) -> str:
    """Format `name=version` of the packages a result depends on, for a stage's first log line."""
    return " ".join(f"{package}={metadata.version(package)}" for package in packages)


def progress(
    items: Iterable[Item],
    logger: logging.Logger,
    *,
    total: int | None,
    unit: str,
    size: Callable[[Item], int] = lambda _: 1,
) -> Iterator[Item]:
    """Report progress: a bar on a terminal; in a log file one line every 30 s at most.

    Args:
        total: units of all items; None if that is not known in advance.
        size: units of one item, if an item is a batch.
    """
    started = reported = time.monotonic()
    n_done = 0
    with tqdm(total=total, unit=f" {unit}", disable=None) as bar:
        for item in items:
            yield item
            n_units = size(item)
            n_done += n_units
            bar.update(n_units)
            now = time.monotonic()
            if now - reported > SECONDS_BETWEEN_LINES and not sys.stderr.isatty():
                logger.info("passed %s", progress_line(n_done, total, unit, now - started))
                reported = now


def progress_line(n_done: int, total: int | None, unit: str, elapsed_seconds: float) -> str:
    """Format units done, rate, and the remaining time at that rate."""
    rate = n_done / elapsed_seconds
    share = f"n={n_done} {unit}" if total is None else f"n={n_done} of={total} {unit}"
    parts = [share, f"per_second={rate:.3g}", f"elapsed_seconds={elapsed_seconds:.0f}"]
    if total is not None and rate:
        parts.append(f"left_seconds={max(total - n_done, 0) / rate:.0f}")
    return " ".join(parts)
