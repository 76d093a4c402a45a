"""What cleaning did, as parts of a page: every reason, and samples of what was rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from workflow_scripts import pages
from workflow_scripts.chats.rejections import RejectedRow
from workflow_scripts.handover.cleaning import CleaningReport, SourceCounts

N_SAMPLES = 10  # of each reason


SAMPLE_CHARACTERS = 600


N_BARS = 20


class Bar(NamedTuple):
    """One line of a drawing."""

    label: str
    n: int
    start: int = 0
    """Where the bar begins, in what it counts."""
    kind: str = ""
    """How it is drawn: `whole`, `lost`, `kept`, `part` of what stands above."""


def bars_html(bars: Sequence[Bar], whole: int) -> str:
    """Labels, bars, counts, and shares of `whole`; the longest bar fills its column."""
    longest = max((bar.n for bar in bars), default=0)
    rows = "".join(bar_html(bar, whole, longest) for bar in bars)
    return f'<table class="bars">{rows}</table>'


def bar_html(bar: Bar, whole: int, longest: int) -> str:
    drawn = ""
    if bar.n:
        left, width = 100 * bar.start / longest, 100 * bar.n / longest
        drawn = f'<span style="margin-left:{left:.2f}%;width:{width:.2f}%"></span>'
    return (
        f'<tr class="{bar.kind}"><th scope="row">{pages.visible(bar.label)}</th>'
        f'<td class="bar">{drawn}</td><td>{bar.n:,}</td><td>{pages.share(bar.n, whole)}</td></tr>'
    )


def funnel_html(report: CleaningReport) -> str:
    """Each loss begins where the one before it ended; what is kept is what they leave."""
    n_read = report.n_read
    n_kept = report.n_kept
    bars = [Bar("read", n_read, kind="whole")]
    left = n_read
    for reason, n in report.rejected_by_reason.items():
        left -= n
        bars.append(Bar(reason, n, start=left, kind="lost"))
    bars.append(Bar("kept", n_kept, kind="kept"))
    bars.append(Bar("of these corrected", report.n_corrected, kind="part"))
    start = 0
    for split, n in report.n_by_split.items():
        bars.append(Bar(split, n, start=start, kind="part"))
        start += n
    weighted = report.n_train_weighted
    note = (
        f"Weighted by source, an epoch sees {pages.counted(weighted, 'training conversation')}."
        if weighted != report.n_train
        else ""
    )
    return f"<p>Shares are of all conversations read. {note}</p>{bars_html(bars, n_read)}"


def corrections_html(report: CleaningReport) -> str:
    corrections = report.corrections
    if not corrections:
        return "<p>No kept conversation had to be corrected.</p>"
    n_kept = report.n_kept
    bars = [Bar(phrase, n) for phrase, n in corrections.items()]
    return (
        f"<p>{pages.counted(report.n_corrected, 'kept conversation')}"
        f" ({pages.share(report.n_corrected, n_kept)} of them) corrected, some in several ways;"
        f" shares are of the kept.</p>{bars_html(bars, n_kept)}"
    )


def sources_html(by_source: Mapping[str, SourceCounts]) -> str:
    header = "".join(
        f'<th scope="col">{name}</th>' for name in ("Source", "Read", "Kept", "Rejected", "Weight")
    )
    rows = []
    for name, counts in by_source.items():
        cells = (
            f"{counts.n_read:,}",
            f"{counts.n_kept:,}",
            f"{counts.n_rejected:,} ({pages.share(counts.n_rejected, counts.n_read)})",
            f"{counts.weight:g}",
        )
        inner = "".join(f"<td>{pages.visible(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{pages.visible(name)}</th>{inner}</tr>')
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def kept_html(report: CleaningReport) -> str:
    """Lengths, roles and languages of what was kept."""
    n_kept = report.n_kept
    histogram = report.characters_histogram
    messages = [Bar(str(number), n) for number, n in report.n_messages.items()]
    roles = [Bar(role, n) for role, n in report.roles.items()]
    languages = [Bar(language, n) for language, n in report.languages.items()]
    n_sample = report.n_language_sample
    parts = [
        "<p>Characters of all messages of a conversation:</p>",
        bars_html(length_bars(histogram.edges, histogram.counts), n_kept),
        "<p>Messages of a conversation:</p>",
        bars_html(first_bars(messages, rest="more"), n_kept),
        "<p>Messages by role; <code>text</code> is a plain text, without turns:</p>",
        bars_html(roles, sum(bar.n for bar in roles)),
    ]
    if languages:
        sample = pages.counted(n_sample, "conversation")
        parts += [
            f"<p>Languages, identified on a sample of {sample}, spread over all kept:</p>",
            bars_html(first_bars(languages, rest="others"), n_sample),
        ]
    return "".join(parts)


def length_bars(edges: Sequence[int], counts: Sequence[int]) -> list[Bar]:
    """A bar for each range of lengths, from the first to the last that has any.

    Args:
        edges: where each range begins; the last has no end.
    """
    used = [at for at, n in enumerate(counts) if n]
    if not used:
        return []
    bars = []
    for at in range(used[0], used[-1] + 1):
        is_open = at + 1 == len(edges)
        label = f"{edges[at]:,} or more" if is_open else f"{edges[at]:,} – {edges[at + 1] - 1:,}"
        bars.append(Bar(label, counts[at]))
    return bars


def first_bars(bars: Sequence[Bar], *, rest: str) -> list[Bar]:
    """The first of them, and the others in one that is called `rest`."""
    if len(bars) <= N_BARS:
        return list(bars)
    n_rest = sum(bar.n for bar in bars[N_BARS - 1 :])
    return [*bars[: N_BARS - 1], Bar(rest, n_rest)]


def personal_data_html(found: Mapping[str, int]) -> str:
    if not found:
        return "<p>None was counted: there is none, or <code>personal_data</code> is off.</p>"
    counts = pages.facts({kind: f"{n:,}" for kind, n in found.items()})
    return f"<p>Found in usable conversations, duplicates included.</p>{counts}"


def read_samples(path: Path) -> dict[str, list[RejectedRow]]:
    """Of each reason up to ten rejected conversations, spread evenly over the file."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    samples: dict[str, list[RejectedRow]] = {}
    with parquet.ParquetFile(path, pre_buffer=False) as table:
        reasons = table.read(columns=["reason"])["reason"].combine_chunks().dictionary_encode()
        codes = reasons.indices.to_numpy()
        chosen = np.zeros(len(codes), dtype=bool)
        for code in range(len(reasons.dictionary)):
            places = np.flatnonzero(codes == code)
            n_samples = min(N_SAMPLES, len(places))
            chosen[places[np.arange(n_samples) * len(places) // n_samples]] = True
        start = 0
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            here = np.flatnonzero(chosen[start : start + n_rows])
            start += n_rows
            if len(here):  # the others' texts are never read
                rows = table.read_row_group(group).take(pa.array(here))
                for row in rows.to_pylist():
                    samples.setdefault(row["reason"], []).append(RejectedRow(**row))
    return samples


def rejected_html(report: CleaningReport, samples: Mapping[str, Sequence[RejectedRow]]) -> str:
    if not report.rejected_by_reason:
        return "<p>Nothing was rejected.</p>"
    sections = "".join(
        reason_html(reason, n, report.n_read, samples.get(reason, ()))
        for reason, n in report.rejected_by_reason.items()
    )
    return f"<p>Samples of each reason, spread evenly over the file of all of them.</p>{sections}"


def reason_html(reason: str, n: int, n_read: int, samples: Sequence[RejectedRow]) -> str:
    items = "".join(sample_html(row) for row in samples)
    return (
        f"<details><summary>{pages.visible(reason)} <span>{n:,} ({pages.share(n, n_read)}),"
        f" {pages.counted(len(samples), 'sample')}</span></summary>\n{items}</details>\n"
    )


def sample_html(row: RejectedRow) -> str:
    raw = row.raw or ""
    n_more = len(raw) - SAMPLE_CHARACTERS
    more = f'<p class="quiet">{pages.counted(n_more, "more character")}</p>' if n_more > 0 else ""
    detail = f" {pages.visible(row.detail)}" if row.detail else ""
    place = pages.visible(f"{row.source_file}:{row.source_line}")
    return (
        f"<p><code>{place}</code>{detail}</p>"
        f"<pre>{pages.visible(raw[:SAMPLE_CHARACTERS])}</pre>{more}"
    )
