"""The result of `merge` as the Markdown that stands in the README."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = "seconds | MB/s | × copy | CPU seconds | peak memory, MB | of it anonymous, MB"
HEADER = [f"| | {COLUMNS} |", "|---" + "|---:" * 6 + "|"]


def table(result: Mapping[str, Any]) -> str:
    """The machine, and the contestants by state of the cache."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"{result['date'][:10]}, commit {result['commit']}, {machine['processor']}, "
        f"{machine['n_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, load "
        f"{machine['load_average_1_minute']:.1f} before, Python {versions['python']}, torch "
        f"{versions['torch']}, PEFT {versions['peft']}; {result['n_layers']} layers of Mistral 7B, "
        f"{result['size_bytes'] / 1e9:.1f} GB of bfloat16 in files of up to "
        f"{result['shard_bytes'] / 1e9:.0f} GB, rank {result['rank']}, {result['n_threads']} "
        "threads."
    ]
    for cache, contestants in result["caches"].items():
        state = (
            "The base in the page cache"
            if cache == "warm"
            else "The base read from disk (its pages dropped before each run)"
        )
        n_repetitions = len(contestants["copy"])
        lines += ["", f"{state}; median of {n_repetitions} interleaved repetitions (range).", ""]
        lines += HEADER
        for name, runs in contestants.items():
            lines.append(_row(name, runs, contestants["copy"], result["size_bytes"]))
    return "\n".join(lines)


def _row(
    name: str,
    runs: Sequence[Mapping[str, Any]],
    copies: Sequence[Mapping[str, Any]],
    size_bytes: int,
) -> str:
    seconds = [run["duration_seconds"] for run in runs]
    # Each against the copy of its own repetition: the disk's pace drifts.
    speeds = [
        copied["duration_seconds"] / run["duration_seconds"]
        for run, copied in zip(runs, copies, strict=True)
    ]
    cells = [
        spread(seconds, ".1f"),
        f"{size_bytes / 1e6 / statistics.median(seconds):,.0f}",
        spread(speeds, ".2f"),
        f"{statistics.median(run['processor_seconds'] for run in runs):,.1f}",
        f"{max(run['peak_memory_bytes'] for run in runs) / 1e6:,.0f}",
        f"{max(run['peak_anonymous_memory_bytes'] for run in runs) / 1e6:,.0f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def spread(values: Sequence[float], form: str) -> str:
    """Median and range: `12.6 (11.6–14.2)`."""
    median = f"{statistics.median(values):,{form}}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):,{form}}–{max(values):,{form}})"
