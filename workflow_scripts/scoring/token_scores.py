"""The loss of every scored token of a split under one link, as a table that is kept.

Every figure about a link's loss is a sum over these rows, and two links are compared token by
token. The table takes about 6 bytes per token on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from workflow_scripts import files
from workflow_scripts.handover.scores import Loss, LossAtPositions, LossOfSource, LossOfTurn
from workflow_scripts.scoring.ratio import Ratio, loss_metrics, ratio
from workflow_scripts.tokens.documents import Document

FIRST_BUCKET_TOKENS = 256  # then 256–511, 512–1023, 1024–2047 …


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One row per scored token, in the order of conversations and positions."""

    ids: list[str]
    """Ids of the conversations that have a scored token."""
    sources: list[str | None]
    """Name of the dataset's source of each of these conversations; None where it is unknown."""
    conversation: np.ndarray
    """(n,) int32 indices into `ids`."""
    turn: np.ndarray
    """(n,) int32: number of the supervised answer in the conversation, from 1."""
    position: np.ndarray
    """(n,) int32: position in the whole conversation; 0 is its first token."""
    token: np.ndarray
    """(n,) int32 token ids."""
    nats: np.ndarray
    """(n,) float32, the precision of the logits: loss in pieces that every link scores alike."""
    whole_nats: np.ndarray | None = None
    """(n,) float32: loss in the whole conversation, for links that honour the window."""

    @classmethod
    def of(
        cls,
        documents: Sequence[Document],
        nats: Mapping[int, np.ndarray],
        *,
        positions: Mapping[int, np.ndarray] | None = None,
        whole_nats: Mapping[int, np.ndarray] | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> TokenScores:
        """Build the table from the result of `likelihood.score_documents`.

        Args:
            documents: those whose indices are the keys of `nats`.
            nats: by document; documents without a scored token are left out.
            positions: of the scored tokens in each document; None means every supervised token
                except the document's first, which has no context.
            whole_nats: of the same tokens.
            sources: by conversation.
        """
        numbers = sorted(nats)
        scored = {
            number: positions[number]
            if positions
            else np.flatnonzero(documents[number].is_supervised[1:]) + 1
            for number in numbers
        }
        ids = [documents[number].id for number in numbers]

        def column(parts: Mapping[int, np.ndarray], dtype: str) -> np.ndarray:
            found = [np.asarray(parts[number]) for number in numbers]
            assert [len(part) for part in found] == [len(scored[number]) for number in numbers]
            return np.concatenate(found).astype(dtype) if found else np.zeros(0, dtype)

        return cls(
            ids,
            [(sources or {}).get(name) for name in ids],
            np.repeat(
                np.arange(len(numbers), dtype=np.int32), [len(scored[one]) for one in numbers]
            ),
            column({one: turns(documents[one])[scored[one]] for one in numbers}, "int32"),
            column(scored, "int32"),
            column({one: documents[one].input_ids[scored[one]] for one in numbers}, "int32"),
            column(nats, "float32"),
            None if whole_nats is None else column(whole_nats, "float32"),
        )

    @classmethod
    def read(cls, path: Path) -> TokenScores:
        table = files.read_parquet(path).unify_dictionaries().combine_chunks()

        def values(name: str) -> np.ndarray:
            return table.column(name).to_numpy()

        names = table.column("conversation").combine_chunks()
        conversation = names.indices.to_numpy()
        # Each conversation has one source: that of its first row.
        _, first_rows = np.unique(conversation, return_index=True)
        return cls(
            ids=names.dictionary.to_pylist(),
            sources=table.column("source").take(pa.array(first_rows)).to_pylist(),
            conversation=conversation,
            turn=values("turn"),
            position=values("position"),
            token=values("token"),
            nats=values("nats"),
            whole_nats=values("whole_nats") if "whole_nats" in table.column_names else None,
        )

    def write(self, path: Path) -> None:
        names = sorted({source for source in self.sources if source is not None})
        number = {name: at for at, name in enumerate(names)}
        source = pa.array(
            [None if one is None else number[one] for one in self.sources], pa.int32()
        )
        ids = pa.array(self.ids, pa.string())
        columns: dict[str, Any] = {
            "conversation": pa.DictionaryArray.from_arrays(self.conversation, ids),
            "turn": self.turn,
            "position": self.position,
            "token": self.token,
            "nats": self.nats,
            "source": pa.DictionaryArray.from_arrays(
                source.take(pa.array(self.conversation)), pa.array(names, pa.string())
            ),
        }
        if self.whole_nats is not None:
            columns["whole_nats"] = self.whole_nats
        files.write_parquet(path, pa.table(columns))

    def metrics(self, nats: np.ndarray | None = None) -> Loss:
        """Mean loss over all tokens, its standard error, and perplexity.

        Args:
            nats: other losses of the same tokens; None means `self.nats`.
        """
        return loss_metrics(*self._sums(self.nats if nats is None else nats))

    def by_position(self) -> tuple[LossAtPositions, ...]:
        """Metrics of each bucket of positions that has a token; each bucket is twice as wide as the
        one before."""
        n_doublings = int(self.position.max(initial=1)).bit_length()
        ends = FIRST_BUCKET_TOKENS * 2 ** np.arange(n_doublings)
        bucket = np.searchsorted(ends, self.position, side="right")
        firsts = [0, *ends.tolist()]
        return tuple(
            LossAtPositions(
                first_position=firsts[at], last_position=firsts[at + 1] - 1, **dict(loss)
            )
            for at, loss in self._by(bucket)
        )

    def by_turn(self) -> tuple[LossOfTurn, ...]:
        """Metrics of each turn."""
        return tuple(LossOfTurn(turn=turn, **dict(loss)) for turn, loss in self._by(self.turn))

    def by_source(self) -> tuple[LossOfSource, ...]:
        """Metrics of each source; None means an unknown source."""
        names = list(dict.fromkeys(self.sources))
        number = np.array([names.index(source) for source in self.sources], dtype=np.int32)
        return tuple(
            LossOfSource(source=names[at], **dict(loss))
            for at, loss in self._by(number[self.conversation])
        )

    def scores_the_same(self, other: TokenScores) -> bool:
        """True if both score the same tokens of the same conversations."""
        return self.ids == other.ids and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("conversation", "position", "token")
        )

    def difference(self, other: TokenScores) -> Ratio:
        """Mean loss minus the other's, nats per token; pairing by token cancels text difficulty.

        Args:
            other: scores of the same tokens.
        """
        assert self.scores_the_same(other)
        changes = self.nats.astype(np.float64) - other.nats
        return ratio(*self._sums(changes))

    def _by(self, group: np.ndarray) -> list[tuple[int, Loss]]:
        """Metrics of each group, in ascending order.

        Args:
            group: (n,) integer.
        """
        return [
            (int(one), loss_metrics(*self._sums(self.nats, group == one)))
            for one in np.unique(group)
        ]

    def _sums(
        self, values: np.ndarray, keep: np.ndarray | slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sum and number of the values of each conversation that has any.

        Args:
            values: (n,) one per token.
            keep: (n,) bool, True for the tokens that count.
        """
        conversation = self.conversation[keep]
        sums = np.bincount(conversation, weights=values[keep])  # in float64
        counts = np.bincount(conversation)
        has_any = counts > 0
        return sums[has_any], counts[has_any]


def turns(document: Document) -> np.ndarray:
    """(n_tokens,) number of the supervised run that a token is in, or of the last one before it."""
    is_supervised = document.is_supervised
    begins = is_supervised & ~np.concatenate([[False], is_supervised[:-1]])
    return np.cumsum(begins)
