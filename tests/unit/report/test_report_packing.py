from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from tests.facts import MISTRAL_7B
from workflow_scripts import files
from workflow_scripts.packing import pack_sequences
from workflow_scripts.packing.plan import Plan, read_plan
from workflow_scripts.report import packing_page, report_packing
from workflow_scripts.tokens.documents import Documents, documents_schema

STRATEGIES = ["best_fit", "concatenate", "none"]
HOSTILE = "</title></svg><script>alert('1')</script> \"x\" \u202egpj.exe\x07"
FACTS = MISTRAL_7B.changed(
    context_tokens=1024,
    sliding_window=48,
    layer_windows=(48, 48),
    hidden_size=64,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    n_layers=2,
    vocabulary_size=300,
)
LENGTHS = [5, 9, 17, 31, 40, 47, 48, 49, 64, 100, 127, 128, 129, 200, 400, 3, 12, 25, 60, 75] * 3


class Packed(NamedTuple):
    folder: Path
    documents: Documents
    plan: Plan
    report: dict


class Page(HTMLParser):
    """Facts, bars, drawings, captions and texts of the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.facts: dict[str, str] = {}
        self.captions: list[str] = []
        self.titles: list[str] = []
        self.rows: list[list[str]] = []
        """Label, empty cell, count and share of each bar."""
        self.text = ""
        self.tags: set[str] = set()
        self.kinds: set[str] = set()
        self._name = self._target = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "polygon":
            self.kinds.add(dict(attrs)["class"])
        if tag in ("dt", "dd", "figcaption", "title", "th", "td"):
            self._target = tag
        if tag == "dt":
            self._name = ""
        elif tag == "figcaption":
            self.captions.append("")
        elif tag == "title":
            self.titles.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag != "s":
            self._target = ""

    def handle_data(self, data):
        self.text += data
        match self._target:
            case "dt":
                self._name += data
            case "dd":
                self.facts[self._name] = self.facts.get(self._name, "") + data
            case "figcaption":
                self.captions[-1] += data
            case "title":
                self.titles[-1] += data
            case "th" | "td":
                self.rows[-1][-1] += data


@pytest.fixture
def pack(tokenizer_v3, tmp_path):
    """`pack(strategy, lengths=…, window=…, **settings)`: the files of pack_sequences."""

    def run(strategy: str, *, lengths=LENGTHS, facts=FACTS, **settings) -> Packed:
        generator = np.random.default_rng(0)
        rows = []
        for number, length in enumerate(lengths):
            # Turns of ten tokens: five of the user, five of the answer.
            input_ids = generator.integers(3, 300, size=length)
            input_ids[0], input_ids[9::10] = 1, 2
            spans = [(start + 5, min(start + 10, length)) for start in range(0, length - 5, 10)]
            rows.append(
                {
                    "id": HOSTILE if number % 3 else f"chat/{number}",
                    "input_ids": input_ids.tolist(),
                    "supervised_spans": list(itertools.chain(*spans)),
                    "n_tokens": length,
                    "n_supervised_tokens": sum(end - start for start, end in spans),
                    "n_copies": 1,
                }
            )
        table = pa.Table.from_pylist(rows, schema=documents_schema())
        files.write_arrow(tmp_path / "t.arrow", table)
        facts.write(tmp_path / "facts.json")
        settings = {"strategy": strategy, "row_tokens": 128, **settings}
        pack_sequences.main(
            ["--tokens", str(tmp_path / "t.arrow"), "--tokenizer", str(tokenizer_v3)]
            + ["--facts", str(tmp_path / "facts.json"), "--settings", json.dumps(settings)]
            + ["--plan", str(tmp_path / "p.parquet"), "--report", str(tmp_path / "report.json")]
        )
        return Packed(
            tmp_path,
            Documents(tmp_path / "t.arrow"),
            read_plan(tmp_path / "p.parquet"),
            files.read_json(tmp_path / "report.json"),
        )

    return run


def arguments(folder: Path) -> list[str]:
    return [
        *("--plan", str(folder / "p.parquet"), "--report", str(folder / "report.json")),
        *("--tokens", str(folder / "t.arrow"), "--facts", str(folder / "facts.json")),
        *("--page", str(folder / "page.html")),
    ]


def make_page(folder: Path) -> Page:
    report_packing.main(arguments(folder))
    return Page(folder / "page.html")


def test_help_works_without_torch_or_arrow(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_packing")
    assert done.returncode == 0 and "--plan" in done.stdout
    assert imported.isdisjoint({"torch", "transformers", "pyarrow", "matplotlib"})


def test_the_page_shows_the_numbers_of_the_report(pack):
    packed = pack("best_fit")
    facts, report = make_page(packed.folder).facts, packed.report
    assert report["n_documents_split"] and report["n_context_tokens"]
    n_empty = report["n_rows"] * 128 - report["n_tokens"]
    expected = {
        "strategy": "best_fit",
        "rows": f"{report['n_rows']} of at most 128 tokens",
        "fill": f"{report['fill_fraction']:.3%} ({n_empty:,} tokens empty)",
        "documents": f"{len(LENGTHS)}",
        "placed, copies counted": f"{len(LENGTHS)}",
        "in several pieces": f"{report['n_documents_cut']}",
        "pieces": f"{report['n_pieces']}",
        "tokens": f"{report['n_tokens']:,}",
        "supervised": f"{report['n_supervised_tokens']:,}"
        f" ({report['n_supervised_tokens'] / report['n_tokens']:.1%})",
        "repeated as context": f"{report['n_context_tokens']:,}"
        f" ({report['n_context_tokens'] / report['n_tokens']:.1%})",
        "documents longer than the window of 48": f"{sum(length > 48 for length in LENGTHS)}",
        "split": f"{sum(length > 128 for length in LENGTHS)}",
        "cut at a turn, a sentence, elsewhere": ", ".join(
            str(report[f"n_cuts_at_{kind}"]) for kind in ("turn", "sentence", "token")
        ),
        "truncated": "0",
        "dropped": "0",
        "tokens left out": f"{report['n_tokens_left_out']}",
        "pieces left out, no supervised token": f"{report['n_pieces_without_supervision']}",
        "operations per epoch": f"{report['training_flops']:.3g} FLOP",
        "of these in attention": f"{report['attention_flops_fraction']:.1%}",
        "padding without packing, micro-batches of 8": f"{report['none_padding_fraction']:.1%}"
        f" grouped by length, {report['none_random_order_padding_fraction']:.1%} in random order",
        "cost of the slowest of 8 processes ÷ mean": f"{report['step_imbalance_8_ranks']:.3f}"
        f" balanced, {report['step_imbalance_8_ranks_random_order']:.3f} in random order",
    }
    assert facts == expected


def test_every_number_of_the_report_changes_the_page(pack):
    packed = pack("best_fit")
    make_page(packed.folder)
    before = (packed.folder / "page.html").read_bytes()
    not_shown = {"n_rows", "n_documents"}  # the stage compares these with the files
    not_shown |= {"strategy", "sliding_window", "attention_pairs"}
    for name in packed.report.keys() - not_shown:
        files.write_json(
            packed.folder / "report.json", packed.report | {name: 2 * packed.report[name] + 1}
        )
        make_page(packed.folder)
        assert (packed.folder / "page.html").read_bytes() != before, name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_drawn_rows_match_the_plan(pack, strategy):
    packed = pack(strategy)
    page = make_page(packed.folder)
    n_pieces = [len(row) for row in packed.plan.rows]
    longest = max(piece.length for row in packed.plan.rows for piece in row)
    median = np.median(packed.plan.attention_pairs)
    reasons = set()
    for caption in page.captions:
        number, _, rest = caption.removeprefix("Row ").partition(", ")
        why, _, counts = rest.partition(": ")
        row, at = packed.plan.rows[int(number) - 1], int(number) - 1
        n_tokens = sum(piece.length for piece in row)
        supervised = packed.plan.n_supervised[at] / n_tokens
        noun = "piece" if len(row) == 1 else "pieces"
        assert counts == f"{len(row)} {noun}, {n_tokens} of 128 tokens, {supervised:.1%} supervised"
        for reason in why.split(", "):
            reasons.add(reason)
            if reason == "most pieces":
                assert len(row) == max(n_pieces)
            elif reason == "longest piece":
                assert max(piece.length for piece in row) == longest
            else:
                distances = np.abs(packed.plan.attention_pairs - median)
                assert reason == "median cost of attention" and distances[at] == distances.min()
        for piece in row:
            document = packed.documents[piece.document].id
            name = "chat/" if document.startswith("chat/") else "</title></svg><script>"
            end = f", tokens {piece.start} to {piece.start + piece.length - 1}"
            assert any(title.startswith(name) and title.endswith(end) for title in page.titles)
    assert reasons >= {"median cost of attention", "longest piece"}
    assert ("most pieces" in reasons) == (strategy != "none")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_supervised_tokens_of_every_row_match_the_plan(pack, strategy):
    packed = pack(strategy)
    assert any(piece.n_context for row in packed.plan.rows for piece in row) == (
        strategy != "concatenate"
    )
    found = [
        int(
            packing_page.learned_tokens(
                row, packed.documents, crosses_documents=packed.plan.crosses_documents
            ).sum()
        )
        for row in packed.plan.rows
    ]
    assert found == packed.plan.n_supervised.tolist()


def test_attention_across_documents_is_drawn_only_if_the_strategy_allows_it(pack):
    drawn = {strategy: make_page(pack(strategy).folder) for strategy in STRATEGIES}
    for strategy, page in drawn.items():
        crosses = strategy == "concatenate"
        assert ("across" in page.kinds) == crosses == ("another document" in page.text)
        assert ("truncated" in page.facts) == (not crosses)
        assert "one" in page.kinds and "beyond" in page.kinds
    assert "tokens empty" in drawn["best_fit"].facts["fill"]
    # Rows of one document are not filled to the length of a row.
    assert drawn["none"].facts["fill"].endswith("%")


def test_the_window_is_drawn_only_for_models_that_have_one(pack):
    without = FACTS.changed(sliding_window=None, layer_windows=(None, None))
    page = make_page(pack("best_fit", facts=without).folder)
    assert "beyond" not in page.kinds and "the window" not in page.text
    interleaved = FACTS.changed(n_layers=3, layer_windows=(48, None, 48))
    page = make_page(pack("best_fit", facts=interleaved).folder)
    assert "the window of 2 of 3 layers" in page.text
    assert "beyond" in page.kinds
    assert "layers" not in make_page(pack("best_fit").folder).text


def test_bars_count_every_document_and_every_row(pack):
    packed = pack("best_fit")
    rows = make_page(packed.folder).rows

    def counted(pattern: str) -> list[tuple[int, int, int]]:
        """First and last value of each bar, and its count."""
        found = []
        for label, _, n, _ in rows:
            if match := re.fullmatch(pattern, label):
                found.append((int(match[1]), int(match[2]), int(n)))
        return found

    by_length = counted(r"(\d+) – (\d+)(?:, longer than .*)?")
    for start, end, n in by_length:
        assert n == sum(start <= length <= end for length in LENGTHS)
    assert sum(n for *_, n in by_length) == len(LENGTHS)
    by_fill = counted(r"(\d+) – (\d+) % full")
    for start, end, n in by_fill:
        fills = packed.plan.rows.n_tokens / 1.28
        assert n == ((start <= fills) & ((fills < end) | (end == 100))).sum()
    assert sum(n for *_, n in by_fill) == len(packed.plan.rows)


def test_documents_longer_than_the_window_or_a_row_are_marked(pack):
    for label, *_ in make_page(pack("best_fit").folder).rows:
        if "full" not in label:
            start, _, remark = label.partition(", ")
            first = int(start.split()[0])
            expected = "longer than a row" if first > 128 else "longer than the window"
            assert remark == (expected if first > 48 else "")


@given(
    lengths=st.lists(st.integers(1, 10**6), min_size=1, max_size=20),
    limits=st.lists(st.integers(1, 10**6), max_size=2),
)
def test_ranges_of_lengths_cover_every_length_and_end_at_the_limits(lengths, limits):
    edges = packing_page.length_edges(min(lengths), max(lengths), limits)
    assert edges[0] <= min(lengths) < edges[1] and edges[-2] <= max(lengths) < edges[-1]
    assert all(after > before for before, after in itertools.pairwise(edges))
    ends = {*limits, *(2**power for power in range(25))}
    assert {end + 1 for end in ends if edges[0] <= end + 1 <= edges[-1]} <= set(edges)


def test_hostile_text_is_shown_and_is_no_markup(pack):
    packed = pack("best_fit")
    page = make_page(packed.folder)
    assert page.tags.isdisjoint({"script", "a", "img", "b"})
    shown = "</title></svg><script>alert('1')</script> \"x\" U+202Egpj.exeU+0007, tokens "
    assert any(title.startswith(shown) for title in page.titles)
    written = (packed.folder / "page.html").read_text(encoding="utf-8")
    assert not {"\u202e", "\x07"} & set(written)


def test_one_short_document_has_a_page(pack):
    page = make_page(pack("best_fit", lengths=[12]).folder)
    (caption,) = page.captions
    assert caption.startswith("Row 1, median cost of attention, longest piece: 1 piece, 12 of 128")
    assert (
        page.facts["cost of the slowest of 8 processes ÷ mean"] == "– balanced, – in random order"
    )


def test_the_same_files_give_the_same_page(pack):
    packed = pack("concatenate")
    pages = []
    for _ in range(2):
        make_page(packed.folder)
        pages.append((packed.folder / "page.html").read_bytes())
    assert pages[0] == pages[1]


def test_a_missing_report_is_named(pack, ends_with_message):
    packed = pack("best_fit")
    (packed.folder / "report.json").unlink()
    message = ends_with_message(report_packing.main, arguments(packed.folder))
    assert "a file is missing" in message and str(packed.folder / "report.json") in message


@pytest.mark.parametrize(("name", "path"), [("n_rows", "p.parquet"), ("n_documents", "t.arrow")])
def test_files_of_another_packing_stop_the_stage(pack, ends_with_message, name, path):
    packed = pack("best_fit")
    files.write_json(packed.folder / "report.json", packed.report | {name: 12_345})
    message = ends_with_message(report_packing.main, arguments(packed.folder))
    for part in ("another packing", f"{name}: 12345", str(packed.report[name]), path, "to fix:"):
        assert part in message
    assert not (packed.folder / "page.html").exists()
