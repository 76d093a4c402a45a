"""The result of `training_throughput` as the Markdown that stands in the README."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "tokens/s | supervised tokens/s | seconds a step | layers checkpointed | padding |"
    " peak memory, GB | reserved, GB | share of the limit | with attention |"
    " loss, first → last | gradient norm | attention"
)
N_COLUMNS = COLUMNS.count("|") + 1
HEADER = [f"| | {COLUMNS} |", "|---" + "|---:" * (N_COLUMNS - 1) + "|---|"]


def table(result: Mapping[str, Any]) -> str:
    """The machine, the documents, a line for each contestant, and how the first one compares."""
    machine, documents = result["machine"], result["documents"]
    contestants: Mapping[str, Sequence[Mapping[str, Any]]] = result["contestants"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rate = matrix_rate(result)
    devices = {run["device"] for runs in contestants.values() for run in runs} - {None}
    lines = [
        f"{result['date'][:10]}, commit {result['commit']}, {machine['processor']}, "
        f"{machine['n_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, device "
        f"{', '.join(sorted(devices)) or '–'}, {versions}, trl {result['trl_version'] or '–'}, "
        f"liger {result['liger_version'] or '–'}. Load average before: "
        f"{machine['load_average_1_minute']:.2f}.",
        "",
        f"Shape {result['shape']}, a step of {result['rows_per_micro_batch']} rows of "
        f"{result['row_tokens']:,} tokens, or of {result['batches_per_step']} × "
        f"{result['documents_per_batch']} padded documents; {documents['n_documents']:,} "
        f"documents, {documents['mean_tokens']:,.0f} tokens on average, "
        f"{documents['supervised_fraction']:.0%} supervised. Matrix products of "
        f"{result['matrix_rates'][0]['size']:,}³ in {result['matrix_rates'][0]['dtype']}: "
        f"{rate / 1e12:,.4g} TFLOP/s. Median of {len(result['matrix_rates'])} interleaved "
        "repetitions (range).",
        "",
        *HEADER,
    ]
    lines += [_row(name, runs, rate) for name, runs in contestants.items()]
    return "\n".join([*lines, "", *_ratios(contestants)]).rstrip()


def matrix_rate(result: Mapping[str, Any]) -> float:
    """Median over the repetitions, operations a second."""
    return statistics.median(rate["flops_per_second"] for rate in result["matrix_rates"])


def _row(name: str, runs: Sequence[Mapping[str, Any]], rate: float) -> str:
    whole = [run for run in runs if "failed" not in run]
    if len(whole) < len(runs) or not runs:
        reasons = [run["failed"] for run in runs if "failed" in run]
        return f"| {name} | {_escaped(reasons[0]) if reasons else 'not run'} |" + " |" * (
            N_COLUMNS - 1
        )

    def median(key: str) -> float:
        return statistics.median(run[key] for run in whole)

    speeds = [run["tokens_per_second"] for run in whole]
    spread = f" ({min(speeds):,.0f}–{max(speeds):,.0f})" if len(whole) > 1 else ""
    arithmetic = median("linear_flops_per_second") + median("recomputed_linear_flops_per_second")
    reserved = [run["peak_reserved_bytes"] for run in whole]
    cells = [
        f"{median('tokens_per_second'):,.0f}{spread}",
        f"{median('supervised_tokens_per_second'):,.0f}",
        f"{median('step_median_seconds'):,.2f}",
        f"{median('n_checkpointed_layers'):.0f}",
        f"{median('padding_fraction'):.1%}",
        f"{median('peak_memory_bytes') / 1e9:,.2f}",
        "–" if None in reserved else f"{statistics.median(reserved) / 1e9:,.2f}",
        f"{arithmetic / rate:.1%}",
        f"{(arithmetic + median('attention_flops_per_second')) / rate:.1%}",
        f"{median('first_loss_nats_per_token'):.3f} → {median('final_loss_nats_per_token'):.3f}",
        f"{median('median_gradient_norm'):.2g}",
        whole[0]["attention"],
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _ratios(contestants: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """How many times as fast the first contestant is, repetition by repetition, and where others
    pad, as what that alone explains."""
    first, *others = contestants
    lines = []
    for other in others:
        pairs = [
            (one["tokens_per_second"] / two["tokens_per_second"], two["padding_fraction"])
            for one, two in zip(contestants[first], contestants[other], strict=False)
            if "failed" not in one and "failed" not in two
        ]
        if not pairs:
            continue
        ratios = [ratio for ratio, _ in pairs]
        line = f"- {first} is {statistics.median(ratios):.2f} times as fast as {other}"
        line += f" ({min(ratios):.2f}–{max(ratios):.2f})"
        padding = statistics.median(padding for _, padding in pairs)
        if padding > 0:
            line += f"; padding alone is {1 / (1 - padding):.2f} times the tokens"
        lines.append(line + ".")
    return lines
