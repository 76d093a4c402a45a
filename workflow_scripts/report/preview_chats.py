"""Show conversations as the model will see them: their tokens, what is supervised, where rows end.

python -m workflow_scripts.report.preview_chats --tokens tokens/train.arrow
    --clean clean/train.parquet --tokenizer tokenizer/ --plan plan.parquet
    --settings '{"n_conversations": 20}' --preview preview.html
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

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
# White space as a sign, and where the text itself has that sign, its code point.
WHITE_SPACE = {" ": "␣", "\n": "⏎", "\t": "⇥"}
MARKS = {**WHITE_SPACE, **{sign: pages.named(sign) for sign in WHITE_SPACE.values()}}
LEGEND = """<ul class="legend">
<li><i>text</i> a token that is seen, not learned</li>
<li><mark><i>text</i></mark> supervised: the loss counts its prediction</li>
<li><b>[INST]</b> <mark><b>&lt;/s&gt;</b></mark> control tokens</li>
<li><i>␣</i> space, <i>⏎</i> end of line, <i>⇥</i> tab</li>
<li><i><s>F0 9F</s></i><i><s>98 80</s>😀</i> a character in several tokens: its bytes, and at the \
last of them itself</li>
<li><i><s>U+200B</s></i> a character that has no shape</li>
<li>Point at a token for its id, its position from 0, and whether it is supervised</li>
</ul>"""
logger = log.stage_logger("preview_chats")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="documents of render_chats")
    parser.add_argument("--clean", type=Path, required=True, help="the same split, cleaned")
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
    sections = [
        conversation_html(
            Shown(index, document, int(documents.n_copies[index]), placements[index]),
            origins[document.id],
            tokenizer=tokenizer,
            max_tokens=settings.max_tokens,
        )
        for index, document in enumerate(shown)
    ]
    version = tokenizer_version(find_tokenizer(arguments.tokenizer))
    header = header_html(arguments.tokens, documents, plan, version, n_shown=len(shown))
    files.write_text(
        arguments.preview, pages.page("Conversations as tokens", "\n".join([header, *sections]))
    )
    logger.info("wrote n_conversations=%d path=%s", len(shown), arguments.preview)


class Origin(NamedTuple):
    """Where a conversation came from, and what was mended."""

    source_file: str
    source_line: int
    corrections: list[str]


def read_origins(path: Path, ids: Collection[str]) -> dict[str, Origin]:
    """Where each of these conversations came from, and what was mended.

    Raises:
        StageError: one of them is not in the file.
    """
    from pyarrow import parquet

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
            "the tokens are of other conversations",
            where=path,
            found=f"no conversation {missing[0]}",
            to_fix="give the split's own file of clean_dataset, from which its tokens were made",
        )
    return origins


class Placed(NamedTuple):
    """A piece of a document in the plan."""

    row: int
    """From 0."""
    begins: int
    """Its first token that no piece before it holds."""
    n_context: int
    """Tokens before that, carried over."""


def placed(plan: Plan, *, n_documents: int) -> list[list[Placed]]:
    """Of each of the first documents, its pieces by where they begin."""
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
    """One conversation of the page."""

    index: int
    document: Document
    n_copies: int
    pieces: Sequence[Placed]

    def cuts(self) -> dict[int, str]:
        """What to say where a row ends within the document, by the token that comes after."""
        n_placed = sum(piece.begins == 0 for piece in self.pieces)
        if n_placed > 1:  # copies, which may be cut in different places
            cuts = Counter((piece.begins, piece.n_context) for piece in self.pieces if piece.begins)
            return {
                at: f"A row ends here in {n} of {n_placed} copies; what follows"
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
        """What a later piece sees of the above; without context, its first token cannot be
        predicted."""
        if n_context:
            return f"sees the last {pages.counted(n_context, 'token')} of the above"
        lost = self.document.is_supervised[position]
        return "sees nothing of the above" + (", so its first token is not learned" if lost else "")

    def facts(self, origin: Origin) -> dict[str, str]:
        n_tokens = len(self.document.input_ids)
        n_supervised = int(self.document.is_supervised.sum())
        facts = {
            "from": f"{origin.source_file}:{origin.source_line}",
            "tokens": f"{n_tokens:,}",
            "supervised": f"{n_supervised:,} ({pages.share(n_supervised, n_tokens)})",
        }
        if self.n_copies != 1:
            facts["copies an epoch"] = f"{self.n_copies:,}"
        if self.pieces:
            facts["packed into"] = rows_text(sorted({piece.row for piece in self.pieces}))
        if origin.corrections:
            facts["corrected"] = ", ".join(origin.corrections)
        return facts


def rows_text(rows: Sequence[int]) -> str:
    """`row 3`, `rows 3, 8`, `12 rows`; counted from 1."""
    if len(rows) > 6:
        return f"{len(rows):,} rows"
    numbers = ", ".join(f"{row + 1:,}" for row in rows)
    return f"row {numbers}" if len(rows) == 1 else f"rows {numbers}"


def header_html(path: Path, documents: Documents, plan: Plan, version: str, *, n_shown: int) -> str:
    """What the page is of, and how to read it."""
    n_tokens, n_supervised = int(documents.lengths.sum()), int(documents.n_supervised.sum())
    attention = "over all of a row" if plan.crosses_documents else "within a conversation"
    totals = pages.facts(
        {
            "tokens of": str(path),
            "tokenizer": version,
            "conversations": f"{len(documents):,}",
            "tokens": f"{n_tokens:,}",
            "supervised": pages.share(n_supervised, n_tokens),
            "rows of training": f"{len(plan.rows):,} of at most {plan.row_tokens:,} tokens",
            "attention": attention,
        }
    )
    title = f"The first {pages.counted(n_shown, 'conversation')} of {path.stem}"
    return f"<p>{pages.visible(title)}, as the model will see them.</p>{totals}{LEGEND}"


def conversation_html(
    shown: Shown, origin: Origin, *, tokenizer: Tokenizer, max_tokens: int
) -> str:
    """One conversation: where it is from, and its tokens."""
    document = shown.document
    token_ids = document.input_ids[:max_tokens].tolist()
    texts = token_texts(tokenizer, token_ids)
    is_supervised = document.is_supervised[:max_tokens].tolist()
    tokens = "".join(tokens_html(token_ids, texts, is_supervised, cuts=shown.cuts()))
    unplaced = "No row of the plan holds this conversation: it is not trained on"
    n_more = len(document.input_ids) - len(token_ids)
    return (
        f"<details open><summary>{shown.index + 1:,} <code>{pages.visible(document.id)}</code>"
        f"</summary>\n{pages.facts(shown.facts(origin))}\n"
        f"{'' if shown.pieces else note_html(unplaced)}"
        f'<div class="tokens">{tokens}</div>\n'
        f"{note_html(pages.counted(n_more, 'more token') + ' not shown') if n_more else ''}"
        "</details>"
    )


def tokens_html(
    token_ids: Iterable[int],
    texts: Iterable[TokenText],
    is_supervised: Iterable[bool],
    *,
    cuts: Mapping[int, str],
) -> Iterator[str]:
    """Each token in a box, the supervised spans marked, and a line before each token in `cuts`."""
    in_span = False
    tokens = zip(token_ids, texts, is_supervised, strict=True)
    for position, (token_id, text, supervised) in enumerate(tokens):
        if in_span and (position in cuts or not supervised):
            yield "</mark>"
            in_span = False
        if position in cuts:
            yield note_html(cuts[position])
        if supervised and not in_span:
            yield "<mark>"
            in_span = True
        tag = "b" if text.is_control else "i"
        # A page holds tens of thousands of these: position and span come from where it stands.
        yield f"<{tag} data-id={token_id}>{text_html(text)}</{tag}>"
        if "\n" in text.text:
            yield "<br>"
    if in_span:
        yield "</mark>"


@cache
def text_html(text: TokenText) -> str:
    return (
        bytes_html(text.first_bytes) + pages.visible(text.text, MARKS) + bytes_html(text.last_bytes)
    )


def bytes_html(encoded: bytes) -> str:
    return f"<s>{encoded.hex(' ').upper()}</s>" if encoded else ""


def note_html(text: str) -> str:
    return f'<p class="cut">{pages.visible(text)}</p>'


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
