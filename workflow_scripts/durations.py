"""Durations of steps, read from the files that Snakemake's `benchmark:` writes."""

from __future__ import annotations

import csv
from pathlib import Path


def durations(benchmarks: Path) -> dict[str, float]:
    """Return the seconds of every step with a file in the folder: `quantize_gguf/Q8_0` → 12.3."""
    seconds = {}
    for path in sorted(benchmarks.rglob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        step = path.relative_to(benchmarks).with_suffix("").as_posix()
        seconds[step] = float(rows[-1]["s"])
    return seconds
