"""The result of `data_stages` as the Markdown that stands in the README."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLUMNS = "seconds | conversations/s | tokens/s | CPU seconds | peak memory, MB | anonymous, MB"
HEADER = [f"| | {COLUMNS} |", "|---" + "|---:" * 6 + "|"]


def table(result: Mapping[str, Any]) -> str:
    """The machine, Tramontane alone by stage, the comparison and its ratios."""
    lines = [_circumstances(result)]
    if "alone" in result:
        alone = result["alone"]
        lines += ["", _chats(alone["chats"]), "", *HEADER]
        lines += [_row(name, [{**alone, **stage}]) for name, stage in alone["stages"].items()]
        lines.append(_row("**together**", [alone]))
    if "comparison" in result:
        contestants = result["comparison"]["contestants"]
        n_repetitions = len(contestants["datasets_map"]["repetitions"])
        median = f"Median of {n_repetitions} interleaved repetitions (range of the seconds)."
        lines += ["", f"{_chats(result['comparison']['chats'])} {median}", "", *HEADER]
        for name, contestant in contestants.items():
            repetitions = contestant["repetitions"]
            lines.append(_row(f"**{name}**", repetitions))
            if len(repetitions[0]["stages"]) > 1:
                lines += [
                    _row(f"of it {stage}", [{**run, **run["stages"][stage]} for run in repetitions])
                    for stage in repetitions[0]["stages"]
                ]
        lines += ["", *_ratios(contestants)]
    return "\n".join(lines)


def _circumstances(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    tokenizer_bytes = result["tokenizer_process"]["peak_memory_bytes"]
    return (
        f"{result['date'][:10]}, commit {result['commit']}, {machine['processor']}, "
        f"{machine['n_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, Python "
        f"{result['versions']['python']}, {result['n_processes']} worker processes. "
        f"A process with only the tokenizer loaded takes {tokenizer_bytes / 1e6:,.0f} MB."
    )


def _chats(chats: Mapping[str, Any]) -> str:
    end = chats["growth"][-1]
    return (
        f"{chats['n_conversations']:,} conversations, {end['n_bytes'] / 1e6:,.0f} MB, "
        f"{end['n_words']:,} words, {end['n_distinct_words']:,} of them distinct."
    )


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Medians over the repetitions of a contestant, or of one stage of it."""
    seconds = [run["duration_seconds"] for run in runs]
    duration = statistics.median(seconds)
    spread = f" ({min(seconds):,.1f}–{max(seconds):,.1f})" if len(runs) > 1 else ""

    def median(key: str) -> float:
        return statistics.median(run[key] for run in runs)

    cells = [
        f"{duration:,.1f}{spread}",
        f"{median('n_conversations') / duration:,.0f}",
        f"{median('n_tokens') / duration:,.0f}",
        f"{median('processor_seconds'):,.1f}",
        f"{median('peak_memory_bytes') / 1e6:,.0f}",
        f"{median('peak_anonymous_memory_bytes') / 1e6:,.0f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _ratios(contestants: Mapping[str, Any]) -> Iterator[str]:
    """Each of ours against each peer, the ratio taken within a repetition; then the token ids."""
    ours = [name for name in contestants if name.startswith("tramontane")]
    peers = [name for name in contestants if name not in ours]
    for name, peer in itertools.product(ours, peers):
        ratios = [
            theirs["duration_seconds"] / run["duration_seconds"]
            for run, theirs in zip(
                contestants[name]["repetitions"], contestants[peer]["repetitions"], strict=True
            )
        ]
        yield (
            f"- {name} is {statistics.median(ratios):.2f} times as fast as {peer} "
            f"({min(ratios):.2f}–{max(ratios):.2f})."
        )
    for name, contestant in contestants.items():
        fraction = contestant["as_mistral_common_fraction"]
        yield f"- {name}: {fraction:.2%} of its documents have token ids that datasets_map wrote."
