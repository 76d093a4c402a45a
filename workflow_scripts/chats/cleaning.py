"""Cleaning one chunk of records: what a worker of `clean_dataset` does, with no view of the rest.

Each record becomes a conversation or a rejection with its reason. What needs the whole dataset
(duplicates, overlap with held-out text) is decided later from the small arrays that come back; the
texts wait in scratch files meanwhile, so that memory does not grow with the dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from workflow_scripts import files
from workflow_scripts.chats import (
    conversations,
    duplicates,
    languages,
    personal_data,
    shingles,
    sources,
    text_repair,
)
from workflow_scripts.chats.conversations import Conversation
from workflow_scripts.chats.messages import SPLITS, Message
from workflow_scripts.chats.rejections import Rejected
from workflow_scripts.settings import CleanDatasetSettings, CleaningSettings, ReadingSettings

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Shard:
    """The scratch files of one chunk, gone when the stage ends."""

    scratch: Path
    number: int

    @property
    def kept(self) -> Path:
        """`clean_schema` and `position` in the chunk."""
        return self.scratch / f"{self.number:07d}.kept.arrow"

    @property
    def raw(self) -> Path:
        """The kept conversations as they were read, in case one is dropped later."""
        return self.scratch / f"{self.number:07d}.raw.arrow"

    @property
    def words(self) -> Path:
        """The words of the kept conversations as hashes, plain uint64 one after the other."""
        return self.scratch / f"{self.number:07d}.words"

    @property
    def rejected(self) -> Path:
        """`rejected_schema` and `position`."""
        return self.scratch / f"{self.number:07d}.rejected.arrow"


@dataclass(frozen=True)
class Task:
    """One chunk of a source, and where its scratch files go."""

    source: str
    chunk: sources.Chunk
    shard: Shard


@dataclass(frozen=True)
class CleanedChunk:
    """What the whole needs to know of a chunk; arrays have a row a kept conversation."""

    shard: Shard
    source: str
    source_file: str
    n_read: int
    n_bytes: int
    """Of the records as they were read."""
    source_lines: np.ndarray
    """int64, of `source_file`."""
    splits: np.ndarray
    """uint8, index in SPLITS."""
    digests: np.ndarray
    """(kept, 2) uint64: equal where conversations say the same."""
    band_keys: np.ndarray
    """(kept, bands) uint64; no columns where near duplicates are kept."""
    word_offsets: np.ndarray
    """(kept + 1,) int64, where each one's words begin in the shard's."""
    n_characters: np.ndarray
    """int64, of all messages."""
    personal_data: Counter[str]
    """By kind, in what was kept."""


class Place(TypedDict):
    """Where a record was read."""

    source: str
    source_file: str
    source_line: int
    position: int
    """In its chunk, from 0."""


class KeptRow(Place):
    """A row of `clean_schema`, as Arrow takes it, and its `position`."""

    id: str
    messages: list[Message]
    tools: str | None
    references: list[str] | None
    n_copies: int
    corrections: list[str]


class RejectedRecord(Place):
    """A row of `rejected_schema`, as Arrow takes it, and its `position`."""

    reason: str
    detail: str
    raw: str


@dataclass(frozen=True)
class Kept:
    """One conversation that passed, before the whole dataset is looked at."""

    row: KeptRow
    split: str
    digest: bytes
    n_characters: int
    personal_data: Counter[str]


class Cleaner:
    """Cleans chunks with one dataset's settings."""

    def __init__(self, settings: CleanDatasetSettings) -> None:
        self._settings = settings.cleaning
        self._reading = settings.sources

    def clean(self, task: Task) -> CleanedChunk:
        """Judge a chunk's records, and leave them in its scratch files."""
        import numpy as np

        reading = self._reading.get(task.source, ReadingSettings())
        kept: list[Kept] = []
        raw: list[str] = []
        rejected: list[RejectedRecord] = []
        n_read = n_bytes = 0
        for position, record in enumerate(sources.records(task.chunk)):
            n_read += 1
            n_bytes += len(record.raw.encode()) + 1
            place: Place = {
                "source": task.source,
                "source_file": record.source_file,
                "source_line": record.source_line,
                "position": position,
            }
            try:
                kept.append(self._judge(record, reading, place))
                raw.append(record.raw)
            except Rejected as rejection:
                rejected.append(
                    {
                        **place,
                        "reason": rejection.reason,
                        "detail": rejection.detail,
                        "raw": record.raw,
                    }
                )
        words, offsets = self._words(kept)
        self._write(task.shard, kept, raw, rejected)
        words.tofile(task.shard.words)
        return CleanedChunk(
            shard=task.shard,
            source=task.source,
            source_file=task.chunk.source_file,
            n_read=n_read,
            n_bytes=n_bytes,
            source_lines=np.array([one.row["source_line"] for one in kept], dtype=np.int64),
            splits=np.array([SPLITS.index(one.split) for one in kept], dtype=np.uint8),
            digests=np.frombuffer(b"".join(one.digest for one in kept), np.uint64).reshape(-1, 2),
            band_keys=self._band_keys(words, offsets),
            word_offsets=offsets,
            n_characters=np.array([one.n_characters for one in kept], dtype=np.int64),
            personal_data=sum((one.personal_data for one in kept), Counter()),
        )

    def _judge(self, record: sources.Record, reading: ReadingSettings, place: Place) -> Kept:
        """One record as a conversation.

        Raises:
            Rejected: with the reason.
        """
        if record.rejection is not None:
            raise record.rejection
        mended = Mending(self._settings)
        conversation = conversations.parse(record.content, reading, mended)
        found = self._personal_data(conversation)
        messages = conversation.messages
        text = "\n".join(message.get("content") or "" for message in messages)
        self._check_length(text)
        self._check_language(text)
        conversation_id = conversations.conversation_id(messages, conversation.tools)
        key = split_key(conversation, self._settings.split_by)
        split = conversations.choose_split(
            key,
            validation_fraction=self._settings.validation_fraction,
            test_fraction=self._settings.test_fraction,
        )
        n_copies = 1
        if split == "train":
            n_copies = copies(conversation_id, reading.weight)
            if not n_copies:
                raise Rejected(LEFT_OUT, f"weight {reading.weight:g}")
        row: KeptRow = {
            "id": conversation_id,
            "messages": messages,
            "tools": conversation.tools,
            "references": self._without_personal_data(conversation.references),
            "n_copies": n_copies,
            "corrections": [*conversation.corrections, *mended.corrections],
            **place,
        }
        return Kept(
            row=row,
            split=split,
            digest=duplicates.normalized_digest(messages, conversation.tools),
            n_characters=len(text),
            personal_data=found,
        )

    def _personal_data(self, conversation: Conversation) -> Counter[str]:
        """What was found; where the settings say so, it is replaced in the conversation."""
        found: Counter[str] = Counter()
        if self._settings.personal_data == "off":
            return found
        is_replaced = self._settings.personal_data == "redact"

        def look(text: str) -> str:
            redacted, kinds = personal_data.redact(text)
            found.update(kinds)
            return redacted if is_replaced else text

        for message in conversation.messages:
            if content := message.get("content"):
                message["content"] = look(content)
            for call in message.get("tool_calls") or ():
                call["function"]["arguments"] = in_json(call["function"]["arguments"], look)
        return found

    def _without_personal_data(self, references: list[str] | None) -> list[str] | None:
        """Answers as the conversation itself would have them; what is found in them counts as
        found there."""
        if references is None or self._settings.personal_data != "redact":
            return references
        return [personal_data.redact(reference)[0] for reference in references]

    def _check_length(self, text: str) -> None:
        if len(text) < self._settings.min_characters:
            raise Rejected("too short", f"{len(text)} characters")
        limit = self._settings.max_characters
        if limit is not None and len(text) > limit:
            raise Rejected("too long", f"{len(text)} characters")

    def _check_language(self, text: str) -> None:
        if self._settings.languages is None:
            return
        language, probability = languages.identify(text)
        if language not in self._settings.languages:
            raise Rejected("another language", f"{language} ({probability:.0%})")

    def _words(self, kept: list[Kept]) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the words of all, and where each conversation's begin."""
        import numpy as np

        if self._settings.near_duplicates is None and self._settings.decontamination is None:
            return np.empty(0, np.uint64), np.zeros(len(kept) + 1, np.int64)  # nobody asks
        return shingles.word_hashes_by_row(
            [shingles.comparable_text(one.row["messages"]) for one in kept]
        )

    def _band_keys(self, words: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        import numpy as np

        settings = self._settings.near_duplicates
        if settings is None:
            return np.zeros((len(offsets) - 1, 0), dtype=np.uint64)
        hashes, offsets = shingles.ngram_hashes_by_row(words, offsets, settings.shingle_words)
        return duplicates.band_keys(hashes, offsets, threshold=settings.threshold)

    def _write(
        self, shard: Shard, kept: list[Kept], raw: list[str], rejected: list[RejectedRecord]
    ) -> None:
        import pyarrow as pa

        position = pa.field("position", pa.int32())
        rows = pa.Table.from_pylist(
            [one.row for one in kept], schema=conversations.clean_schema().append(position)
        )
        files.write_arrow(shard.kept, rows, compression="lz4")
        files.write_arrow(shard.raw, pa.table({"raw": pa.array(raw, pa.string())}), "lz4")
        files.write_arrow(
            shard.rejected,
            pa.Table.from_pylist(rejected, schema=conversations.rejected_schema().append(position)),
            "lz4",
        )


class Mending:
    """Repairs the texts of one conversation, and remembers what it did.

    Args:
        settings: its policies for Unicode and white space.
    """

    def __init__(self, settings: CleaningSettings) -> None:
        self._settings = settings
        self.corrections: list[str] = []

    def __call__(self, text: str) -> str:
        if self._settings.unicode == "repair":
            repaired = text_repair.repair_unicode(text)
            if repaired != text and UNICODE_REPAIRED not in self.corrections:
                self.corrections.append(UNICODE_REPAIRED)
            text = repaired
        return text_repair.mend_whitespace(text, self._settings.whitespace)


UNICODE_REPAIRED = "Unicode repaired"
LEFT_OUT = "left out by its source's weight"


def in_json(text: str, change: Callable[[str], str]) -> str:
    """A JSON text with every string in it changed; the text itself where nothing changes."""

    def changed(value: Any) -> Any:
        match value:
            case str():
                return change(value)
            case dict():
                return {key: changed(item) for key, item in value.items()}
            case list():
                return [changed(item) for item in value]
        return value

    before = json.loads(text)
    after = changed(before)
    return text if after == before else json.dumps(after, ensure_ascii=False)


def copies(conversation_id: str, weight: float) -> int:
    """How often a training conversation is seen: the weight, its fraction decided by the id's hash.

    So a weight of 0.3 keeps the same three in ten however the dataset grows.
    """
    digest = hashlib.sha256(f"copies {conversation_id}".encode()).digest()
    return int(weight) + (int.from_bytes(digest[:8], "big") / 2**64 < weight % 1)


def split_key(conversation: Conversation, split_by: str) -> str:
    """What is hashed to choose a conversation's split.

    Case and white space of a first user turn do not count, so that the same question lies in the
    same split.

    Raises:
        Rejected: the split is by a field that the record has not.
    """
    if split_by != "first_user_turn":
        value = conversation.fields.get(split_by)
        if value is None:
            raise Rejected("no field to split by", split_by)
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    messages = conversation.messages
    first = next((one for one in messages if one["role"] == "user"), messages[0])
    return " ".join((first["content"] or "").casefold().split())
