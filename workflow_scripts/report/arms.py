"""Arms of an experiment: runs that differ in one setting, each repeated with several seeds.

The differences are found in the settings, not declared: runs with equal settings, apart from the
seeds, form an arm. A difference between two arms is the mean over pairs of runs with equal seeds,
which cancels the effect that a seed has on both. Its interval is Student's, over seeds.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from workflow_scripts.log import StageError

# Student's t, 97.5 %, by degrees of freedom from 1 (Fisher & Yates, Statistical Tables, table III).
STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip

Seeds = tuple[tuple[str, Any], ...]
Tables = Mapping[str, Any]  # untyped: settings of any table


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seeds."""

    name: str
    """Common beginning of the runs' names: `best-fit` for `best-fit-0` and `best-fit-1`."""
    values: Mapping[str, str]
    """Values of the settings in which the arms differ: `{packing.strategy: best_fit}`."""
    runs: Mapping[Seeds, str]
    """Names of the runs, by seeds."""


class Difference(NamedTuple):
    """A mean difference between two arms, or between two runs on the same conversations."""

    mean: float
    half_width: float | None
    """Half of the 95 % interval; None for a single seed or conversation."""

    @property
    def is_significant(self) -> bool:
        """True if the interval does not contain zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def find_arms(runs: Mapping[str, Tables]) -> tuple[list[str], list[Arm]]:
    """Group runs into arms, in the order of their first runs.

    Args:
        runs: nested tables of settings by name. Runs that differ only in `seed` are replicates.
    Returns:
        Paths of the settings that differ (`packing.strategy`), and the arms.
    Raises:
        StageError: there are fewer than two arms, or their seeds differ.
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
                "two runs of an experiment have the same settings",
                where=f"{replicates[seeds]}, {name}",
            )
        replicates[seeds] = name
    names = _names([list(replicates.values()) for replicates in by_arm.values()])
    arms = [
        Arm(name, dict(zip(factors, values, strict=True)), replicates)
        for name, (values, replicates) in zip(names, by_arm.items(), strict=True)
    ]
    if len(arms) < 2:
        raise StageError(
            "the runs of an experiment must differ in a setting other than the seeds",
            where="build",
            found=f"{len(runs)} runs that differ only in their seeds",
            to_fix="use the overlay of an experiment: --configfile config/experiments/…",
        )
    for arm in arms[1:]:
        if arm.runs.keys() != arms[0].runs.keys():
            raise StageError(
                "the arms of an experiment have different seeds, so they cannot be paired",
                where=f"{factors}: {arms[0].name} and {arm.name}",
                found=" / ".join(", ".join(one.runs.values()) for one in (arms[0], arm)),
                expected="one run per arm for each pair of packing seed and recipe seed",
            )
    return factors, arms


def difference(arm: Mapping[Seeds, float], first: Mapping[Seeds, float]) -> Difference:
    """Mean difference of an arm from the first one, paired by seed.

    Args:
        arm, first: a figure of each arm's runs, by the same seeds.
    """
    pairs = [arm[seeds] - first[seeds] for seeds in first]
    if len(pairs) < 2:
        return Difference(pairs[0], None)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.mean(pairs), student(len(pairs)) * error)


def student(n: int) -> float:
    """97.5 % quantile of Student's t for the mean of n values; slightly too wide above 21."""
    return STUDENT_T[min(n - 1, len(STUDENT_T)) - 1]


def _names(runs: Sequence[Sequence[str]]) -> list[str]:
    """The common beginning of the names of each arm's runs.

    An arm has the name of its first run instead if there is none, or if two arms share it.
    """
    common = [os.path.commonprefix(names).rstrip("-_") for names in runs]
    return [
        name if name and common.count(name) == 1 else first
        for name, (first, *_) in zip(common, runs, strict=True)
    ]


def _flat(tables: Tables, path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with their paths."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"
