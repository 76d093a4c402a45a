"""The result of `packed_training` as the Markdown that stands in the README."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "tokens/s | supervised tokens/s | seconds a step | tokens a step | padding |"
    " memory of training, MB | loss, first → last | gradient norm"
)
HEADER = [f"| | {COLUMNS} |", "|---" + "|---:" * 8 + "|"]


def table(result: Mapping[str, Any]) -> str:
    """The machine, then a table for each length of row."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    runs = [run for rows in result["rows"] for runs in rows["contestants"].values() for run in runs]
    lines = [
        f"{result['date'][:10]}, commit {result['commit']}, {machine['processor']}, "
        f"{machine['n_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, device "
        f"{runs[0]['device']}, {versions}, trl {result['trl_version'] or '–'}. Shape "
        f"{result['shape']}, gradient checkpointing "
        f"{'on' if result['gradient_checkpointing'] else 'off'}."
    ]
    for rows in result["rows"]:
        lines += ["", _rows(rows), "", *HEADER]
        lines += [_row(name, runs) for name, runs in rows["contestants"].items()]
    return "\n".join(lines)


def _rows(rows: Mapping[str, Any]) -> str:
    documents = rows["documents"]
    n_repetitions = len(next(iter(rows["contestants"].values())))
    return (
        f"Micro-batches of {rows['rows_per_micro_batch']} rows of {rows['row_tokens']:,} tokens; "
        f"{documents['n_documents']:,} documents, {documents['mean_tokens']:,.0f} tokens on "
        f"average, {documents['supervised_fraction']:.0%} supervised. Median of {n_repetitions} "
        "interleaved repetitions (range)."
    )


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    whole = [run for run in runs if "failed" not in run]
    if len(whole) < len(runs):
        reasons = [run["failed"].partition(":")[0] for run in runs if "failed" in run]
        return f"| {name} | {reasons[0]} |" + " |" * 7

    def median(key: str) -> float:
        return statistics.median(run[key] for run in whole)

    speeds = [run["tokens_per_second"] for run in whole]
    spread = f" ({min(speeds):,.0f}–{max(speeds):,.0f})" if len(whole) > 1 else ""
    cells = [
        f"{median('tokens_per_second'):,.0f}{spread}",
        f"{median('supervised_tokens_per_second'):,.0f}",
        f"{median('step_median_seconds'):,.2f}",
        f"{median('step_mean_tokens'):,.0f}",
        f"{median('padding_fraction'):.1%}",
        f"{median('training_memory_bytes') / 1e6:,.0f}",
        f"{median('first_loss_nats_per_token'):.3f} → {median('final_loss_nats_per_token'):.3f}",
        f"{median('median_gradient_norm'):.2g}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"
