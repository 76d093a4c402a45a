"""The result of `text_perplexity` as the Markdown that stands in the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.merge_table import spread

COLUMNS = (
    "seconds, whole command | seconds, loading and scoring | × llama-perplexity |"
    " peak memory, MB | of it anonymous, MB | perplexity"
)
HEADER = [f"| | {COLUMNS} |", "|---" + "|---:" * 6 + "|"]


def table(result: Mapping[str, Any]) -> str:
    """The machine, and the contestants by file and context."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"{result['date'][:10]}, commit {result['commit']}, {machine['processor']}, "
        f"{machine['n_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, load "
        f"{machine['load_average_1_minute']:.1f} before, Python {versions['python']}, "
        f"llama-cpp-python {versions['llama_cpp_python']}, torch {versions['torch']}; shape "
        f"{result['shape']}, {result['n_layers']} layers, {result['n_chunks']} chunks, "
        f"{result['n_threads']} threads."
    ]
    for measured in result["runs"]:
        contestants = measured["contestants"]
        theirs = contestants["llama_perplexity"]
        lines += [
            "",
            f"{measured['type']} ({measured['size_bytes'] / 1e6:,.0f} MB), chunks of "
            f"{measured['context_tokens']:,} tokens; median of {len(theirs)} interleaved "
            "repetitions (range).",
            "",
            *HEADER,
            *(row(name, runs, theirs) for name, runs in contestants.items()),
        ]
    return "\n".join(lines)


def row(name: str, runs: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    # Each against llama-perplexity's of its own repetition, without the start of either.
    speeds = [
        other["scoring_seconds"] / run["scoring_seconds"]
        for run, other in zip(runs, theirs, strict=True)
    ]
    cells = [
        spread([run["duration_seconds"] for run in runs], ".1f"),
        spread([run["scoring_seconds"] for run in runs], ".1f"),
        spread(speeds, ".2f"),
        f"{max(run['peak_memory_bytes'] for run in runs) / 1e6:,.0f}",
        f"{max(run['peak_anonymous_memory_bytes'] for run in runs) / 1e6:,.0f}",
        f"{runs[0]['perplexity']:,.4f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"
