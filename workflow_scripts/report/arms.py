"""Arms of an experiment: runs that differ in one thing, each repeated with several seeds.

What differs is found, not declared: an arm is a run's settings without its seeds, a replicate its
seeds. A difference between two arms is taken seed by seed, so that what a seed does to both drops
out; its interval is Student's, over seeds.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from workflow_scripts.log import StageError

# Student's t, 97.5 %, by degrees of freedom from 1 (Fisher & Yates, Statistical Tables, table III);
# with more seeds than these the last is a little too wide.
STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip

Seeds = tuple[tuple[str, Any], ...]
Tables = Mapping[str, Any]  # untyped: any settings, compared key by key


@dataclass(frozen=True)
class Arm:
    """Runs of one setting."""

    name: str
    """What its runs' names begin with: `best-fit` of `best-fit-0` and `best-fit-1`."""
    values: Mapping[str, str]
    """Of the settings that differ, by their paths: `{packing.strategy: best_fit}`."""
    runs: Mapping[Seeds, str]
    """Names of the runs, by their seeds."""


class Difference(NamedTuple):
    """An arm minus the first one."""

    mean: float
    half_width: float | None
    """Of the 95 % interval over seeds; None for a single seed."""

    @property
    def is_shown(self) -> bool:
        """The interval is on one side of zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def find_arms(runs: Mapping[str, Tables]) -> tuple[list[str], list[Arm]]:
    """What the runs differ in, and the arms, in the order of their first runs.

    Args:
        runs: by name, nested tables of settings; a key `seed` in any of them makes replicates.
    Returns:
        Paths of the settings that differ (`packing.strategy`), and the arms.
    Raises:
        StageError: there are not two arms, or the arms' seeds are not the same.
    """
    settings = {name: dict(_flat(tables)) for name, tables in runs.items()}
    keys = dict.fromkeys(key for one in settings.values() for key in one)
    factors = [
        key
        for key in keys
        if not _is_seed(key) and len({repr(one.get(key)) for one in settings.values()}) > 1
    ]
    by_arm: dict[tuple[str, ...], dict[Seeds, str]] = {}
    for name, one in settings.items():
        values = tuple(str(one.get(key)) for key in factors)
        seeds = tuple((key, value) for key, value in one.items() if _is_seed(key))
        replicates = by_arm.setdefault(values, {})
        if seeds in replicates:
            raise StageError(
                "two runs of an experiment are the same", where=f"{replicates[seeds]}, {name}"
            )
        replicates[seeds] = name
    names = _names([list(replicates.values()) for replicates in by_arm.values()])
    arms = [
        Arm(name, dict(zip(factors, values, strict=True)), replicates)
        for name, (values, replicates) in zip(names, by_arm.items(), strict=True)
    ]
    if len(arms) < 2:
        raise StageError(
            "an experiment compares runs that differ in something",
            where="build",
            found=f"{len(runs)} runs that differ in their seeds alone",
            to_fix="build the overlay of an experiment: --configfile config/experiments/…",
        )
    for arm in arms[1:]:
        if arm.runs.keys() != arms[0].runs.keys():
            raise StageError(
                "the arms of an experiment have different seeds, so that they cannot be paired",
                where=f"{factors}: {arms[0].name} and {arm.name}",
                found=" / ".join(", ".join(one.runs.values()) for one in (arms[0], arm)),
                expected="a run of each arm for each pair of packing and recipe seed",
            )
    return factors, arms


def difference(arm: Mapping[Seeds, float], first: Mapping[Seeds, float]) -> Difference:
    """Paired by seed.

    Args:
        arm, first: a figure of each arm's runs, by the same seeds.
    """
    pairs = [arm[seeds] - first[seeds] for seeds in first]
    if len(pairs) < 2:
        return Difference(pairs[0], None)
    student = STUDENT_T[min(len(pairs) - 1, len(STUDENT_T)) - 1]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.mean(pairs), student * error)


def _names(runs: Sequence[Sequence[str]]) -> list[str]:
    """What the names of each arm's runs have in common; their first run's where that is nothing, or
    another arm's too."""
    common = [os.path.commonprefix(names).rstrip("-_") for names in runs]
    return [
        name if name and common.count(name) == 1 else first
        for name, (first, *_) in zip(common, runs, strict=True)
    ]


def _flat(tables: Tables, path: str = "") -> Sequence[tuple[str, Any]]:
    """Settings by their path."""
    found: list[tuple[str, Any]] = []
    for key, value in tables.items():
        if isinstance(value, Mapping):
            found.extend(_flat(value, f"{path}{key}."))
        else:
            found.append((f"{path}{key}", value))
    return found


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"
