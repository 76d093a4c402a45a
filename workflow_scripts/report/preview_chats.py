"""Write a page of conversations as the model will see them: tokens, supervision, ends of rows.

python -m workflow_scripts.report.preview_chats --tokens tokens/train.arrow
    --clean clean/train.parquet --tokenizer tokenizer/ --plan plan.parquet
    --settings '{"n_conversations": 20}' --preview preview.html
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pyarrow import parquet

from workflow_scripts import files, log, pages
from workflow_scripts.models.tokenizer_files import (
    find_tokenizer,
    load_mistral_tokenizer,
    tokenizer_version,
)
from workflow_scripts.packing.plan import Plan, read_plan
from workflow_scripts.settings import PreviewSettings, settings_from_json
from workflow_scripts.tokens.documents import Document, Documents
from workflow_scripts.tokens.token_texts import TokenText, token_texts

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.base import Tokenizer

OUTPUT_VERSION = 2
# White space is shown as a sign. Where the text itself contains that sign, its code point is shown.
WHITE_SPACE = {" ": "␣", "\n": "⏎", "\t": "⇥"}
MARKS = {**WHITE_SPACE, **{sign: pages.named(sign) for sign in WHITE_SPACE.values()}}
logger = log.stage_logger("preview_chats")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="documents of render_chats")
    parser.add_argument(
        "--clean", type=Path, required=True, help="the same split, by clean_dataset"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--plan", type=Path, required=True, help="plan of pack_sequences")
    parser.add_argument("--settings", required=True, help="JSON of `datasets.<name>.preview`")
    parser.add_argument("--preview", type=Path, required=True, help="to write: HTML")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(PreviewSettings, arguments.settings)

    documents = Documents(arguments.tokens)
    shown = [documents[index] for index in range(min(settings.n_conversations, len(documents)))]
    origins = read_origins(arguments.clean, {document.id for document in shown})
    plan = read_plan(arguments.plan)
    placements = placed(plan, n_documents=len(shown))
    official = load_mistral_tokenizer(arguments.tokenizer, for_training=True)
    tokenizer = official.instruct_tokenizer.tokenizer
    page = pages.render(
        "preview.html.j2",
        split=arguments.tokens.stem,
        facts=page_facts(
            arguments.tokens,
            documents,
            plan,
            tokenizer_version(find_tokenizer(arguments.tokenizer)),
        ),
        conversations=[
            Shown(
                index,
                document,
                origins[document.id],
                int(documents.n_copies[index]),
                placements[index],
            )
            for index, document in enumerate(shown)
        ],
        tokenizer=tokenizer,
        max_tokens=settings.max_tokens,
        marks=MARKS,
    )
    files.write_text(arguments.preview, page)
    logger.info("wrote n_conversations=%d path=%s", len(shown), arguments.preview)


class Origin(NamedTuple):
    """Origin of a conversation, and its corrections."""

    source_file: str
    source_line: int
    corrections: list[str]


def read_origins(path: Path, ids: Collection[str]) -> dict[str, Origin]:
    """Origins of conversations, by id.

    Raises:
        StageError: a conversation is not in the file.
    """
    columns = ["id", "source_file", "source_line", "corrections"]
    origins: dict[str, Origin] = {}
    with parquet.ParquetFile(path, pre_buffer=False) as table:
        for rows in table.iter_batches(1000, columns=columns):
            if len(origins) == len(ids):
                break
            origins |= {
                conversation_id: Origin(**row)
                for row in rows.to_pylist()
                if (conversation_id := row.pop("id")) in ids
            }
    missing = sorted(set(ids) - origins.keys())
    if missing:
        raise log.StageError(
            "the tokens belong to other conversations",
            where=path,
            found=f"no conversation {missing[0]}",
            to_fix="pass the file of clean_dataset from which the tokens were made",
        )
    return origins


class Placed(NamedTuple):
    """A piece of a document in the plan."""

    row: int
    """Row number, from 0."""
    begins: int
    """First token that no earlier piece contains."""
    n_context: int
    """Tokens before that, repeated from the previous piece."""


def placed(plan: Plan, *, n_documents: int) -> list[list[Placed]]:
    """The pieces of each of the first documents, in order of their first token."""
    of_document: list[list[Placed]] = [[] for _ in range(n_documents)]
    pieces = plan.rows.pieces
    for at in np.flatnonzero(pieces.document < n_documents).tolist():
        n_context = int(pieces.n_context[at])
        piece = Placed(
            int(plan.rows.row_of_piece[at]), int(pieces.start[at]) + n_context, n_context
        )
        of_document[pieces.document[at]].append(piece)
    for of_one in of_document:
        of_one.sort(key=lambda piece: (piece.begins, piece.row))
    return of_document


@dataclass(frozen=True)
class Shown:
    """A conversation of the page."""

    index: int
    document: Document
    origin: Origin
    n_copies: int
    pieces: Sequence[Placed]

    def cuts(self) -> dict[int, str]:
        """Remarks on the ends of rows inside the document, by the token that follows."""
        n_placed = sum(piece.begins == 0 for piece in self.pieces)
        if n_placed > 1:  # copies, which may be cut in different places
            cuts = Counter((piece.begins, piece.n_context) for piece in self.pieces if piece.begins)
            return {
                at: f"A row ends here in {n} of {n_placed} copies; the next piece"
                f" {self._sight(at, n_context)}"
                for (at, n_context), n in cuts.items()
            }
        pairs = zip(self.pieces, self.pieces[1:], strict=False)
        return {
            piece.begins: f"Row {before.row + 1:,} ends here; piece {number} of"
            f" {len(self.pieces)} begins in row {piece.row + 1:,} and"
            f" {self._sight(piece.begins, piece.n_context)}"
            for number, (before, piece) in enumerate(pairs, start=2)
        }

    def _sight(self, position: int, n_context: int) -> str:
        """Words for what a later piece sees of the previous one.

        Without context, nothing predicts its first token.
        """
        if n_context:
            return f"sees the last {pages.counted(n_context, 'token')} of the above"
        lost = self.document.is_supervised[position]
        return "sees nothing of the above" + (", so its first token is not learned" if lost else "")

    def spans(self, tokenizer: Tokenizer, max_tokens: int) -> list[Span]:
        """The first tokens of the conversation, in spans."""
        token_ids = self.document.input_ids[:max_tokens].tolist()
        is_supervised = self.document.is_supervised[:max_tokens].tolist()
        return spans(token_ids, token_texts(tokenizer, token_ids), is_supervised, cuts=self.cuts())

    def facts(self) -> dict[str, str]:
        n_tokens = len(self.document.input_ids)
        n_supervised = int(self.document.is_supervised.sum())
        facts = {
            "from": f"{self.origin.source_file}:{self.origin.source_line}",
            "tokens": f"{n_tokens:,}",
            "supervised": f"{n_supervised:,} ({pages.share(n_supervised, n_tokens)})",
        }
        if self.n_copies != 1:
            facts["copies per epoch"] = f"{self.n_copies:,}"
        if self.pieces:
            facts["packed into"] = rows_text(sorted({piece.row for piece in self.pieces}))
        if self.origin.corrections:
            facts["corrected"] = ", ".join(self.origin.corrections)
        return facts


def rows_text(rows: Sequence[int]) -> str:
    """`row 3`, `rows 3, 8`, `12 rows`; counted from 1."""
    if len(rows) > 6:
        return f"{len(rows):,} rows"
    numbers = ", ".join(f"{row + 1:,}" for row in rows)
    return f"row {numbers}" if len(rows) == 1 else f"rows {numbers}"


def page_facts(path: Path, documents: Documents, plan: Plan, version: str) -> dict[str, str]:
    """Facts of the split, its tokenizer and its plan."""
    n_tokens, n_supervised = int(documents.lengths.sum()), int(documents.n_supervised.sum())
    return {
        "tokens from": str(path),
        "tokenizer": version,
        "conversations": f"{len(documents):,}",
        "tokens": f"{n_tokens:,}",
        "supervised": pages.share(n_supervised, n_tokens),
        "rows of training": f"{len(plan.rows):,} of at most {plan.row_tokens:,} tokens",
        "attention": "over the whole row" if plan.crosses_documents else "within a conversation",
    }


class Span(NamedTuple):
    """Neighbouring tokens that are supervised alike, with no cut between them."""

    note: str
    """Remark on the cut before the span; empty where there is none."""
    is_supervised: bool
    tokens: list[tuple[int, TokenText]]


def spans(
    token_ids: Iterable[int],
    texts: Iterable[TokenText],
    is_supervised: Iterable[bool],
    *,
    cuts: Mapping[int, str],
) -> list[Span]:
    """Tokens in spans, with a new span at each token in `cuts`."""
    found: list[Span] = []
    tokens = zip(token_ids, texts, is_supervised, strict=True)
    for position, (token_id, text, supervised) in enumerate(tokens):
        if position in cuts or not found or found[-1].is_supervised != supervised:
            found.append(Span(cuts.get(position, ""), supervised, []))
        found[-1].tokens.append((token_id, text))
    return found


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
