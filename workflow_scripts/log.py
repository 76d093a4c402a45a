"""How a stage speaks: one logger, one line shape, one way to end.

A line is time, level, stage, past-tense verb, `key=value`; it goes to stderr, which the rule sends
to its log file. Exit codes: 0 done; 1 a `StageError` (a message, no traceback); 2 usage; anything
else keeps its traceback, because it is our bug.
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
# In the remedy of what a machine lacks.
DOCTOR = "`python -m workflow_scripts.doctor` says what else this machine lacks"


class StageError(Exception):
    """What went wrong, where, what was found, what was expected, and the remedy.

    Args:
        what: one line, the damage in the user's terms.
        where: file, line or key.
        found: the value met.
        expected: the value that would be right.
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
    """Keeps the usage example of a stage's docstring as it is written."""


def stage_logger(stage: str) -> logging.Logger:
    """The logger of one stage program, writing to stderr."""
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
    """Run a stage's `main` and turn a `StageError` into its message and exit code 1."""
    try:
        main()
    except StageError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return 1
    return 0


def fields(values: Mapping[str, object]) -> str:  # untyped: a log line may show anything
    """`key=value` pairs for a log line; nested tables are left to the file they are written to."""
    return " ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
        if not isinstance(value, (dict, list))
    )


def versions(*packages: str) -> str:
    """`name=version` of the packages a result depends on, for a stage's first log line."""
    return " ".join(f"{package}={metadata.version(package)}" for package in packages)


def progress(
    items: Iterable[Item],
    logger: logging.Logger,
    *,
    total: int | None,
    unit: str,
    size: Callable[[Item], int] = lambda _: 1,
) -> Iterator[Item]:
    """A bar on a terminal; in a log file at most a line every 30 s, with the rate and what is left.

    Args:
        total: units of all items; None where that shows only at the end.
        size: units of one item, where it is a batch of them.
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
    """How far a loop is, how fast, and how long it will still take at that rate."""
    rate = n_done / elapsed_seconds
    share = f"n={n_done} {unit}" if total is None else f"n={n_done} of={total} {unit}"
    parts = [share, f"per_second={rate:.3g}", f"elapsed_seconds={elapsed_seconds:.0f}"]
    if total is not None and rate:
        parts.append(f"left_seconds={max(total - n_done, 0) / rate:.0f}")
    return " ".join(parts)
