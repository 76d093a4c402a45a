"""Counts for the cleaning report, taken from the tables while they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from workflow_scripts.chats import languages
from workflow_scripts.chats.cleaning import CleanedChunk
from workflow_scripts.handover.cleaning import CleaningReport, Histogram, SourceCounts

# Characters of a conversation: below 16, then every doubling to a million, then more.
CHARACTER_EDGES = (0, *(2**power for power in range(4, 21)))
# Identifying a conversation takes about a millisecond; this sample gives shares to a few per cent.
N_LANGUAGE_SAMPLE = 1000
LANGUAGE_SAMPLE_CHARACTERS = 2000


class CleaningCounts:
    """Counts of one dataset, updated chunk by chunk.

    Args:
        weights: weight of each source.
        n_kept: conversations that will be counted; the language sample is spread over them.
    """

    def __init__(self, weights: Mapping[str, float], *, n_kept: int) -> None:
        self._weights = dict(weights)
        self._n_read: Counter[str] = Counter({name: 0 for name in weights})
        self._n_kept: Counter[str] = Counter()
        self._n_by_split: Counter[str] = Counter()
        self._n_train_weighted = 0
        self._n_corrected = 0
        self._n_with_reference = 0
        self._reasons: Counter[str] = Counter()
        self._corrections: Counter[str] = Counter()
        self._roles: Counter[str] = Counter()
        self._n_messages: Counter[int] = Counter()
        self._characters = np.zeros(len(CHARACTER_EDGES), dtype=np.int64)
        self._languages: Counter[str] = Counter()
        self._personal_data: Counter[str] = Counter()
        self._sample_every = max(1, n_kept // N_LANGUAGE_SAMPLE)
        self._n_counted = 0

    def count_chunk(
        self, chunk: CleanedChunk, n_characters: np.ndarray, rejected: pa.Table
    ) -> None:
        """Count what was read and rejected of one chunk.

        Args:
            n_characters: (conversations kept after the selection,) characters of all messages.
            rejected: `rejected_schema`, dropped conversations included.
        """
        self._n_read[chunk.source] += chunk.n_read
        bins = np.searchsorted(CHARACTER_EDGES, n_characters, side="right") - 1
        self._characters += np.bincount(bins, minlength=len(CHARACTER_EDGES))
        self._personal_data.update(chunk.personal_data)
        self._reasons.update(_counts(rejected["reason"]))

    def count_kept(self, split: str, rows: pa.Table) -> None:
        """Count conversations of one split (`clean_schema`)."""
        self._n_by_split[split] += len(rows)
        self._n_kept.update(_counts(rows["source"]))
        if split == "train":
            self._n_train_weighted += pc.sum(rows["n_copies"]).as_py() or 0
        self._n_with_reference += len(rows) - rows["references"].null_count
        self._n_corrected += int(np.count_nonzero(pc.list_value_length(rows["corrections"])))
        self._corrections.update(_counts(pc.list_flatten(rows["corrections"])))
        self._roles.update(_counts(pc.struct_field(pc.list_flatten(rows["messages"]), "role")))
        self._n_messages.update(_counts(pc.list_value_length(rows["messages"])))
        first = -self._n_counted % self._sample_every
        self._n_counted += len(rows)
        for row in range(first, len(rows), self._sample_every):
            messages = rows["messages"][row].as_py()
            text = "\n".join(message["content"] or "" for message in messages)
            self._languages[languages.identify(text[:LANGUAGE_SAMPLE_CHARACTERS])[0]] += 1

    def report(self, held_out_fractions: Mapping[str, float]) -> CleaningReport:
        """Return the counts as a report.

        Args:
            held_out_fractions: shares of `validation` and `test` in the config.
        """
        n_read = sum(self._n_read.values())
        n_rejected = sum(self._reasons.values())
        report = CleaningReport(
            n_read=n_read,
            n_corrected=self._n_corrected,
            n_train=self._n_by_split["train"],
            n_validation=self._n_by_split["validation"],
            n_test=self._n_by_split["test"],
            n_train_weighted=self._n_train_weighted,
            n_with_reference=self._n_with_reference,
            n_rejected=n_rejected,
            rejected_by_reason=dict(self._reasons.most_common()),
            corrections=dict(self._corrections.most_common()),
            by_source={
                name: SourceCounts(
                    n_read=self._n_read[name],
                    n_kept=self._n_kept[name],
                    n_rejected=self._n_read[name] - self._n_kept[name],
                    weight=weight,
                )
                for name, weight in self._weights.items()
            },
            roles=dict(self._roles.most_common()),
            n_messages=dict(sorted(self._n_messages.items())),
            characters_histogram=Histogram(
                edges=CHARACTER_EDGES, counts=tuple(self._characters.tolist())
            ),
            languages=dict(self._languages.most_common()),
            n_language_sample=sum(self._languages.values()),
            personal_data=dict(self._personal_data.most_common()),
            held_out_fractions=dict(held_out_fractions),
        )
        assert n_read == report.n_kept + n_rejected, report  # nothing disappears
        return report


def _counts(values: pa.Array | pa.ChunkedArray) -> dict[Any, int]:
    return {count["values"]: count["counts"] for count in pc.value_counts(values).to_pylist()}
