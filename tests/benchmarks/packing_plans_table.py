"""The result of `packing_plans` as the Markdown that stands in the README."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLUMNS = "rows | fill | call, seconds | process, seconds | its CPU seconds | its peak memory, MB"
HEADER = [f"| | {COLUMNS} |", "|---" + "|---:" * 6 + "|"]


def table(result: Mapping[str, Any]) -> str:
    """The machine, the contestants by case, and the balance."""
    machine = result["machine"]
    lines = [
        f"{result['date'][:10]}, commit {result['commit']}, {machine['processor']}, "
        f"{machine['n_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, Python "
        f"{result['versions']['python']}, NumPy {result['versions']['numpy']}, TRL "
        f"{result['trl_version'] or '–'}."
    ]
    for case in result["cases"]:
        lines += ["", _case(case), "", *HEADER]
        lines += [_row(name, runs) for name, runs in case["contestants"].items()]
    if "balance" in result:
        lines += ["", *_balance(result["balance"])]
    return "\n".join(lines)


def _case(case: Mapping[str, Any]) -> str:
    lengths = case["lengths"]
    n_repetitions = len(next(iter(case["contestants"].values())))
    return (
        f"{lengths['n_documents']:,} documents in rows of {case['row_tokens']:,} tokens; "
        f"{case['n_documents_cut_to_a_row']:,} of them are longer and cut. Median of "
        f"{n_repetitions} interleaved repetitions (range)."
    )


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    processes = [run["process"] for run in runs]
    cells = [
        f"{runs[0]['n_rows']:,}",
        f"{runs[0]['fill_fraction']:.3%}",
        _spread([run["call_duration_seconds"] for run in runs]),
        _spread([process["duration_seconds"] for process in processes]),
        f"{statistics.median(process['processor_seconds'] for process in processes):,.2f}",
        f"{max(run['peak_memory_bytes'] for run in runs) / 1e6:,.0f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _spread(values: Sequence[float]) -> str:
    median = f"{statistics.median(values):,.2f}"
    return median if len(values) == 1 else f"{median} ({min(values):,.2f}–{max(values):,.2f})"


def _balance(balance: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Balance: {balance['lengths']['n_documents']:,} documents in {balance['n_rows']:,} rows "
        f"of {balance['row_tokens']:,} tokens, {balance['shape']}, {balance['n_ranks']} ranks, a "
        "row each a step."
    )
    yield ""
    yield (
        "| window | order | slowest rank ÷ mean, mean over steps | largest | Spearman of document "
        "length with step |"
    )
    yield "|---|---|---:|---:|---:|"
    for found in balance["windows"]:
        for order in ("random", "balanced"):
            yield (
                f"| {found['sliding_window'] or 'none'} | {order} | "
                f"{found[order]['mean_step_imbalance']:.4f} | "
                f"{found[order]['largest_step_imbalance']:.2f} | "
                f"{found[order]['spearman_document_length_with_step']:+.3f} |"
            )
