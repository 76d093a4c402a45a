from __future__ import annotations

import itertools
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from workflow_scripts import files
from workflow_scripts.chats.tables import clean_schema
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.packing.long_documents import fit
from workflow_scripts.packing.packing import STRATEGIES, Piece, Pieces
from workflow_scripts.packing.plan import Plan, write_plan
from workflow_scripts.report import preview_chats
from workflow_scripts.settings import PackingSettings
from workflow_scripts.tokens.documents import Documents, documents_schema
from workflow_scripts.tokens.rendering import Renderer
from workflow_scripts.tokens.token_texts import TokenText

STAGE = "workflow_scripts.report.preview_chats"
HOSTILE = "</div><script>alert('1')</script> \"x\" \u202egpj.exe\u202c \x07 שלום"
CHATS = [
    [("user", "What does len do?"), ("assistant", "It counts:\n\tlen([1]) ␣")],
    [("user", HOSTILE), ("assistant", f"{HOSTILE} 👩‍💻"), ("user", "And?"), ("assistant", "No.")],
    [("user", "Count."), ("assistant", ", ".join(map(str, range(60))))],
]
SOURCE = "data/<b>my chats\u202e.jsonl"


class Preview(HTMLParser):
    """The tokens of each conversation, and the notes between them, as a reader sees them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tokens: list[list[tuple[int, bool, bool]]] = []
        """Id, is_control and is_supervised of each token."""
        self.texts: list[list[str]] = []
        self.notes: list[list[tuple[int, str]]] = []
        """Number of tokens before each note, and its text."""
        self.facts: list[dict[str, str]] = [{}]
        self.tags: set[str] = set()
        self._open: list[str] = []
        self._target = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("meta", "br"):
            return
        self._open.append(tag)
        if tag == "details":
            for table in (self.tokens, self.texts, self.notes):
                table.append([])
            self.facts.append({})
        elif tag in ("i", "b") and "data-id" in dict(attrs):
            self.tokens[-1].append((int(dict(attrs)["data-id"]), tag == "b", "mark" in self._open))
            self.texts[-1].append("")
            self._target = "token"
        elif tag == "p" and ("class", "cut") in attrs:
            self.notes[-1].append((len(self.tokens[-1]), ""))
            self._target = "note"
        elif tag in ("dt", "dd"):
            self._target = tag
            if tag == "dt":
                self.facts[-1][""] = ""

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "dd":
            self.facts[-1].pop("")
        if tag not in ("s", "html"):
            self._target = ""

    def handle_data(self, data):
        match self._target:
            case "token":
                self.texts[-1][-1] += data
            case "note":
                at, text = self.notes[-1][-1]
                self.notes[-1][-1] = (at, text + data)
            case "dt":
                self.facts[-1][""] += data
            case "dd":
                name = self.facts[-1][""]
                self.facts[-1][name] = self.facts[-1].get(name, "") + data


@pytest.fixture(scope="module")
def tokenizer_folder(official_tokenizer, tmp_path_factory):
    def make(version: str) -> Path:
        folder = tmp_path_factory.mktemp(version)
        name = "tekken.json" if version == "tekken" else f"tokenizer.model.{version}"
        shutil.copyfile(official_tokenizer(version), folder / name)
        return folder

    return make


@pytest.fixture
def preview(tokenizer_folder, plan_of, tmp_path):
    """`preview(version, plan=…, **settings)`: the page and its documents."""

    def make(
        version="v3", *, plan: Plan | None = None, n_copies=1, **settings
    ) -> tuple[Preview, Documents]:
        tokenizer = tokenizer_folder(version)
        renderer = Renderer(load_mistral_tokenizer(tokenizer, for_training=True))
        chats, rows = [], []
        for number, turns in enumerate(CHATS):
            messages = [{"role": role, "content": content} for role, content in turns]
            rendering = renderer.render(messages)
            at = {"id": f"chat/{number}", "n_copies": n_copies}
            origin = {"source_file": SOURCE, "source_line": number + 1}
            corrections = ["Unicode repaired", "role 'human' read"] if number == 1 else []
            chats.append({**at, **origin, "messages": messages, "corrections": corrections})
            rows.append(
                {
                    **at,
                    "input_ids": rendering.input_ids,
                    "supervised_spans": list(itertools.chain(*rendering.supervised_spans)),
                    "n_tokens": len(rendering.input_ids),
                    "n_supervised_tokens": rendering.n_supervised_tokens,
                }
            )
        # A conversation that could not be rendered has no tokens.
        chats.insert(1, {**chats[0], "id": "rejected"})
        files.write_parquet(tmp_path / "c.parquet", pa.Table.from_pylist(chats, clean_schema()))
        files.write_arrow(tmp_path / "t.arrow", pa.Table.from_pylist(rows, documents_schema()))
        documents = Documents(tmp_path / "t.arrow")
        plan = plan or plan_of([[Piece(0, 0, 8)]])
        write_plan(tmp_path / "plan.parquet", plan)
        preview_chats.main(
            ["--tokens", str(tmp_path / "t.arrow"), "--clean", str(tmp_path / "c.parquet")]
            + ["--tokenizer", str(tokenizer), "--plan", str(tmp_path / "plan.parquet")]
            + ["--settings", json.dumps(settings), "--preview", str(tmp_path / "preview.html")]
        )
        return Preview(tmp_path / "preview.html"), documents

    return make


def test_help_works_without_torch_or_mistral_common(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0 and "--preview" in done.stdout
    assert imported.isdisjoint({"torch", "transformers", "mistral_common"})


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7", "tekken"])
def test_every_token_has_a_box_with_its_id_and_its_supervision(preview, version):
    page, documents = preview(version)
    assert len(page.tokens) == len(CHATS)
    for boxes, document in zip(page.tokens, documents, strict=True):
        assert [token_id for token_id, *_ in boxes] == document.input_ids.tolist()
        assert [supervised for *_, supervised in boxes] == document.is_supervised.tolist()
        # `[INST]` is text in v1.
        assert [control for _, control, _ in boxes][:2] == [True, version != "v1"]
        assert boxes[-1][1:] == (True, True)  # the closing EOS


def test_the_boxes_read_as_the_conversation(preview):
    page, _ = preview("tekken")
    assert "".join(page.texts[0]) == (
        "<s>[INST]What␣does␣len␣do?[/INST]It␣counts:⏎⇥len([1])␣E290A3U+2423</s>"
    )
    assert "שלום" in "".join(page.texts[1])


def test_hostile_text_is_shown_and_is_no_markup(preview, tmp_path):
    page, _ = preview("v3")
    assert page.tags.isdisjoint({"script", "a", "img"})
    text = "".join(page.texts[1])
    shown = "</div><script>alert('1')</script>␣\"x\"␣" + "E2" + "80" + "AEU+202E" + "gpj.exe"
    assert shown in text and "U+0007" in text
    written = (tmp_path / "preview.html").read_text(encoding="utf-8")
    assert not set("\u202e\u202c\x07") & set(written)
    assert page.facts[2]["from"] == "data/<b>my chatsU+202E.jsonl:2"


def test_facts_of_the_page_and_of_each_conversation(preview):
    page, documents = preview("v3", n_copies=3)
    header, *conversations = page.facts
    assert header["tokenizer"] == "v3"
    assert header["tokens"] == f"{documents.lengths.sum():,}"
    for number, facts in enumerate(conversations):
        n_tokens, n_supervised = documents.lengths[number], documents.n_supervised[number]
        assert facts["tokens"] == f"{n_tokens:,}"
        assert facts["supervised"] == f"{n_supervised:,} ({n_supervised / n_tokens:.1%})"
        assert facts["copies per epoch"] == "3"
    corrected = [facts.get("corrected") for facts in conversations]
    assert corrected == [None, "Unicode repaired, role 'human' read", None]


@pytest.mark.parametrize("strategy", ["best_fit", "concatenate"])
def test_a_note_marks_every_end_of_a_row_inside_a_conversation(preview, plan_of, strategy):
    _, documents = preview()
    pieces, _ = fit(documents, PackingSettings(row_tokens=64, overlap_tokens=4))
    if strategy == "concatenate":
        pieces = Pieces.whole(documents.lengths)
    rows = STRATEGIES[strategy](pieces, row_tokens=64, seed=1)
    page, _ = preview(plan=plan_of(rows, row_tokens=64, strategy=strategy))
    for document, notes in enumerate(page.notes):
        pieces = sorted(
            (piece.start + piece.n_context, number, piece.n_context)
            for number, row in enumerate(rows)
            for piece in row
            if piece.document == document
        )
        assert [at for at, _ in notes] == [begins for begins, _, _ in pieces[1:]]
        for piece, (_, text) in enumerate(notes, start=2):
            before, after = pieces[piece - 2][1] + 1, pieces[piece - 1][1] + 1
            assert f"Row {before} ends here; piece {piece} of {len(pieces)}" in text
            assert f"begins in row {after} " in text
            n_context = pieces[piece - 1][2]
            sight = f"the last {n_context} tokens" if n_context else "nothing"
            assert f"sees {sight} of the above" in text
    assert sum(map(len, page.notes)) >= 2


def test_a_note_says_where_the_first_token_of_a_piece_is_not_learned(preview, plan_of):
    _, documents = preview()
    supervised = documents[2].is_supervised.tolist()
    first = supervised.index(True)
    n_tokens = len(supervised)
    plan = plan_of(
        [
            [Piece(2, 0, first - 1)],
            [Piece(2, first - 1, 2), Piece(0, 0, 5)],
            [Piece(2, first + 1, n_tokens - first - 1)],
        ],
        strategy="concatenate",
    )
    page, _ = preview(plan=plan)
    assert ["not learned" in text for _, text in page.notes[2]] == [False, True]


def test_a_note_says_how_many_copies_are_cut_at_a_place(preview, plan_of):
    plan = plan_of(
        [
            [Piece(0, 0, 10)],
            [Piece(0, 10, 5), Piece(0, 0, 6)],
            [Piece(0, 6, 9), Piece(0, 0, 10)],
            [Piece(0, 10, 5)],
        ],
        strategy="concatenate",
    )
    page, _ = preview(plan=plan, n_copies=3)
    assert [(at, text.partition(";")[0]) for at, text in page.notes[0]] == [
        (6, "A row ends here in 1 of 3 copies"),
        (10, "A row ends here in 2 of 3 copies"),
    ]


def test_a_conversation_in_no_row_and_omitted_tokens_are_reported(preview):
    page, documents = preview(max_tokens=7)
    assert [len(boxes) for boxes in page.tokens] == [7, 7, 7]
    for number, notes in enumerate(page.notes):
        expected = [(7, f"{documents.lengths[number] - 7:,} more tokens not shown")]
        if number:
            expected.insert(
                0, (0, "No row of the plan holds this conversation: it is not trained on")
            )
        assert notes == expected


def test_only_the_first_conversations_are_shown(preview):
    page, documents = preview(n_conversations=2)
    assert len(page.tokens) == 2
    assert page.facts[0]["conversations"] == f"{len(documents)}"


def test_the_same_files_give_the_same_page(preview, tmp_path):
    pages = []
    for _ in range(2):
        preview("v3")
        pages.append((tmp_path / "preview.html").read_bytes())
    assert pages[0] == pages[1]


def test_tokens_of_other_conversations_stop_the_stage(preview, tmp_path, ends_with_message):
    preview()
    files.write_parquet(tmp_path / "c.parquet", clean_schema().empty_table())
    arguments = ["--tokens", tmp_path / "t.arrow", "--clean", tmp_path / "c.parquet"]
    arguments += ["--tokenizer", tmp_path, "--plan", tmp_path / "plan.parquet"]
    arguments += ["--settings", "{}", "--preview", tmp_path / "out.html"]
    message = ends_with_message(preview_chats.main, arguments)
    for part in ("belong to other conversations", str(tmp_path / "c.parquet"), "chat/0", "to fix:"):
        assert part in message
    assert not (tmp_path / "out.html").exists()


@given(
    supervised=st.lists(st.booleans(), max_size=30),
    cuts=st.sets(st.integers(0, 29)),
)
def test_spans_hold_every_token_and_begin_at_every_cut_and_change(supervised, cuts):
    texts = [TokenText(False, "a")] * len(supervised)
    notes = {at: f"cut {at}" for at in cuts}
    spans = preview_chats.spans(range(len(supervised)), texts, supervised, cuts=notes)
    assert [token for span in spans for token, _ in span.tokens] == list(range(len(supervised)))
    found = [span.is_supervised for span in spans for _ in span.tokens]
    assert found == supervised
    assert {span.tokens[0][0]: span.note for span in spans if span.note} == {
        at: note for at, note in notes.items() if at < len(supervised)
    }
    for before, after in itertools.pairwise(spans):
        assert after.note or after.is_supervised != before.is_supervised
