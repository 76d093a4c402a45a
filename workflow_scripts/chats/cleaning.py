"""Cleaning of one chunk of records, which needs no view of the rest of the dataset.

Each record becomes a conversation or a rejection with its reason. Decisions that need the whole
dataset (duplicates, overlap with held-out text) are made later, from the small arrays that come
back. The texts wait in scratch files, so that memory does not grow with the dataset.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa

from workflow_scripts import files
from workflow_scripts.chats import (
    conversations,
    duplicates,
    languages,
    personal_data,
    records,
    shingles,
    splits,
    tables,
    text_repair,
)
from workflow_scripts.chats.chunks import Chunk
from workflow_scripts.chats.conversations import Conversation
from workflow_scripts.chats.messages import SPLITS, Message
from workflow_scripts.chats.rejections import Rejected, RejectedRow
from workflow_scripts.settings import CleanDatasetSettings, CleaningSettings, ReadingSettings

UNICODE_REPAIRED = "Unicode repaired"
LEFT_OUT = "left out by its source's weight"
POSITION = pa.field("position", pa.int32())
"""Position of a row in its chunk, from 0; only in scratch files."""


class Shard(NamedTuple):
    """Paths of the scratch files of one chunk; the stage removes them when it ends."""

    kept: Path
    """Kept conversations: `clean_schema` and POSITION."""
    raw: Path
    """The kept conversations as they were read, in case one is dropped later."""
    words: Path
    """Hashes of the words of the kept conversations, as plain uint64."""
    rejected: Path
    """Rejected records: `rejected_schema` and POSITION."""

    @classmethod
    def of(cls, scratch: Path, number: int) -> Shard:
        names = ("kept.arrow", "raw.arrow", "words", "rejected.arrow")
        return cls(*(scratch / f"{number:07d}.{name}" for name in names))


class Task(NamedTuple):
    """One chunk of a source, and the scratch files it is cleaned into."""

    source: str
    chunk: Chunk
    shard: Shard


@dataclass(frozen=True)
class CleanedChunk:
    """Summary of a cleaned chunk; arrays have one row per kept conversation."""

    shard: Shard
    source: str
    source_file: str
    n_read: int
    n_bytes: int
    """Size of the records as read."""
    source_lines: np.ndarray
    """int64, lines of `source_file`."""
    splits: np.ndarray
    """uint8, indices in SPLITS."""
    digests: np.ndarray
    """(kept, 2) uint64; equal for conversations with equal content."""
    band_keys: np.ndarray
    """(kept, bands) uint64; no columns if near duplicates are kept."""
    word_offsets: np.ndarray
    """(kept + 1,) int64, where the words of each conversation begin in `shard.words`."""
    n_characters: np.ndarray
    """int64, characters of all messages."""
    personal_data: Counter[str]
    """Findings in kept conversations, by kind."""


class KeptRow(TypedDict):
    """A row of `clean_schema` and POSITION, as Arrow takes it."""

    id: str
    messages: list[Message]
    tools: str | None
    references: list[str] | None
    n_copies: int
    corrections: list[str]
    source: str
    source_file: str
    source_line: int
    position: int


@dataclass(frozen=True)
class Kept:
    """One conversation that cleaning kept, before it is compared with the rest of the dataset."""

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
        """Keep or reject each record of a chunk, and write them to its scratch files."""
        kept: list[Kept] = []
        raw: list[str] = []
        rejected: list[dict[str, Any]] = []
        n_bytes = 0
        for position, record in enumerate(records.parse_chunk(task.chunk)):
            n_bytes += len(record.raw.encode()) + 1
            try:
                kept.append(self._conversation(record, task.source, position))
                raw.append(record.raw)
            except Rejected as rejection:
                place = (task.source, record.source_file, record.source_line)
                row = RejectedRow(*place, rejection.reason, rejection.detail, record.raw)
                rejected.append({**row._asdict(), POSITION.name: position})
        words, offsets = self._words(kept)
        words.tofile(task.shard.words)
        rows = [one.row for one in kept]
        for path, content, schema in (
            (task.shard.kept, rows, tables.clean_schema().append(POSITION)),
            (task.shard.raw, [{"raw": text} for text in raw], pa.schema([("raw", pa.string())])),
            (task.shard.rejected, rejected, tables.rejected_schema().append(POSITION)),
        ):
            files.write_arrow(path, pa.Table.from_pylist(content, schema=schema), "lz4")
        return CleanedChunk(
            shard=task.shard,
            source=task.source,
            source_file=task.chunk.source_file,
            n_read=len(kept) + len(rejected),
            n_bytes=n_bytes,
            source_lines=np.array([row["source_line"] for row in rows], dtype=np.int64),
            splits=np.array([SPLITS.index(one.split) for one in kept], dtype=np.uint8),
            digests=np.frombuffer(b"".join(one.digest for one in kept), np.uint64).reshape(-1, 2),
            band_keys=self._band_keys(words, offsets),
            word_offsets=offsets,
            n_characters=np.array([one.n_characters for one in kept], dtype=np.int64),
            personal_data=sum((one.personal_data for one in kept), Counter()),
        )

    def _conversation(self, record: records.Record, source: str, position: int) -> Kept:
        """Return one record as a conversation.

        Raises:
            Rejected: with the reason.
        """
        if record.rejection is not None:
            raise record.rejection
        settings = self._settings
        reading = self._reading.get(source, ReadingSettings())
        repair = TextRepair(settings)
        conversation = conversations.parse(record.content, reading, repair)
        found = self._personal_data(conversation)
        messages = conversation.messages
        text = "\n".join(message.get("content") or "" for message in messages)
        self._check_text(text)
        conversation_id = splits.conversation_id(messages, conversation.tools)
        split = splits.choose_split(
            splits.split_key(conversation, settings.split_by),
            validation_fraction=settings.validation_fraction,
            test_fraction=settings.test_fraction,
        )
        n_copies = splits.n_copies(conversation_id, reading.weight) if split == "train" else 1
        if not n_copies:
            raise Rejected(LEFT_OUT, f"weight {reading.weight:g}")
        references = conversation.references
        if references is not None and settings.personal_data == "redact":
            references = [personal_data.redact(reference)[0] for reference in references]
        row: KeptRow = {
            "id": conversation_id,
            "messages": messages,
            "tools": conversation.tools,
            "references": references,
            "n_copies": n_copies,
            "corrections": [*conversation.corrections, *repair.corrections],
            "source": source,
            "source_file": record.source_file,
            "source_line": record.source_line,
            "position": position,
        }
        digest = duplicates.normalized_digest(messages, conversation.tools)
        return Kept(row, split, digest, len(text), found)

    def _personal_data(self, conversation: Conversation) -> Counter[str]:
        """Count personal data, and replace it in the conversation if the settings say so."""
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

    def _check_text(self, text: str) -> None:
        """
        Raises:
            Rejected: the length or the language is not accepted.
        """
        settings = self._settings
        if len(text) < settings.min_characters:
            raise Rejected("too short", f"{len(text)} characters")
        if settings.max_characters is not None and len(text) > settings.max_characters:
            raise Rejected("too long", f"{len(text)} characters")
        if settings.languages is not None:
            language, probability = languages.identify(text)
            if language not in settings.languages:
                raise Rejected("another language", f"{language} ({probability:.0%})")

    def _words(self, kept: list[Kept]) -> tuple[np.ndarray, np.ndarray]:
        """Return hashes of all words, and where those of each conversation begin."""
        if self._settings.near_duplicates is None and self._settings.decontamination is None:
            return np.empty(0, np.uint64), np.zeros(len(kept) + 1, np.int64)  # not needed
        return shingles.word_hashes_by_row(
            [shingles.comparable_text(one.row["messages"]) for one in kept]
        )

    def _band_keys(self, words: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        settings = self._settings.near_duplicates
        if settings is None:
            return np.zeros((len(offsets) - 1, 0), dtype=np.uint64)
        hashes, offsets = shingles.ngram_hashes_by_row(words, offsets, settings.shingle_words)
        return duplicates.band_keys(hashes, offsets, threshold=settings.threshold)


class TextRepair:
    """Repairs the texts of one conversation by the settings, and records its corrections."""

    def __init__(self, settings: CleaningSettings) -> None:
        self._settings = settings
        self.corrections: list[str] = []

    def __call__(self, text: str) -> str:
        if self._settings.unicode == "repair":
            repaired = text_repair.repair_unicode(text)
            if repaired != text:
                self.corrections = [UNICODE_REPAIRED]
            text = repaired
        return text_repair.normalize_whitespace(text, self._settings.whitespace)


def in_json(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to every string in a JSON text; an unchanged text keeps its spelling."""

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
