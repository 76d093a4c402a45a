from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from tests.facts import MISTRAL_7B
from workflow_scripts import files
from workflow_scripts.packing import pack_sequences
from workflow_scripts.packing.pack_sequences import make_plan
from workflow_scripts.packing.plan import read_plan
from workflow_scripts.settings import PackingSettings
from workflow_scripts.tokens.documents import Documents

STAGE = "workflow_scripts.packing.pack_sequences"
ROW_TOKENS = 768  # a fifth of the chats is longer, and each of their pieces has an answer


@pytest.fixture
def pack(prepared, tokenizer_v3, tmp_path):
    def run(*, window=64, **settings):
        write_facts(tmp_path, window=window)
        pack_sequences.main(arguments(prepared, tokenizer_v3, tmp_path, settings))
        return read_plan(tmp_path / "plan.parquet"), files.read_json(tmp_path / "report.json")

    return run


def write_facts(folder, *, window=64, context_tokens=4096):
    facts = MISTRAL_7B.changed(
        n_layers=2,
        hidden_size=256,
        n_heads=8,
        n_kv_heads=2,
        head_dim=32,
        intermediate_size=1024,
        sliding_window=window,
        layer_windows=(window, window),
        context_tokens=context_tokens,
    )
    facts.write(folder / "facts.json")
    return facts


def arguments(prepared, tokenizer, folder, settings):
    return [
        *("--tokens", str(prepared.tokens / "train.arrow"), "--facts", str(folder / "facts.json")),
        *("--tokenizer", str(tokenizer), "--settings", json.dumps(settings)),
        *("--plan", str(folder / "plan.parquet"), "--report", str(folder / "report.json")),
    ]


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--plan" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


@pytest.mark.parametrize("strategy", ["best_fit", "concatenate", "none"])
@pytest.mark.parametrize("window", [None, 64])
def test_the_reports_counts_match_the_plan(pack, prepared, strategy, window):
    plan, report = pack(strategy=strategy, row_tokens=ROW_TOKENS, seed=4, window=window)
    documents = Documents(prepared.tokens / "train.arrow")
    lengths = documents.lengths.tolist()
    pieces = [piece for row in plan.rows for piece in row]
    assert (plan.row_tokens, plan.strategy) == (ROW_TOKENS, strategy)
    assert report["n_documents"] == report["n_documents_placed"] == len(lengths)
    assert report["n_rows"] == len(plan.rows)
    assert report["n_pieces"] == len(pieces)
    n_context = sum(piece.n_context for piece in pieces)
    assert report["n_context_tokens"] == n_context
    n_tokens = sum(piece.length for piece in pieces)
    assert report["n_tokens"] == n_tokens
    assert n_tokens - n_context + report["n_tokens_left_out"] == sum(lengths)
    assert report["fill_fraction"] == n_tokens / (ROW_TOKENS * len(plan.rows))
    assert 0 < report["fill_fraction"] <= 1
    assert report["n_supervised_tokens"] == plan.n_supervised.sum()
    beyond = [length for length in lengths if window and length > window]
    assert report["n_documents_beyond_window"] == len(beyond)
    n_long = sum(length > ROW_TOKENS for length in lengths)
    if strategy == "concatenate":
        assert report["n_documents_cut"] >= n_long
        assert report["n_documents_split"] == n_context == 0
    else:
        assert report["n_documents_split"] == n_long > 0
        assert 0 < report["n_documents_cut"] <= n_long
        assert n_context > 0
    assert report["attention_pairs"] == plan.attention_pairs.sum()
    assert 0 < report["attention_flops_fraction"] < 1


def test_padding_and_balance_match_micro_batches_and_ranks(pack):
    plan, report = pack(row_tokens=128)
    assert 0 < report["none_padding_fraction"] < report["none_random_order_padding_fraction"] < 1
    balanced = report["step_imbalance_8_ranks"]
    assert 1 <= balanced <= report["step_imbalance_8_ranks_random_order"]
    _, of_few = pack(row_tokens=4096)
    assert of_few["n_rows"] < 8
    assert of_few["step_imbalance_8_ranks"] is None


def test_a_weighted_document_is_placed_n_copies_times(prepared, tokenizer_v3, tmp_path):
    table = files.read_arrow(prepared.tokens / "train.arrow")
    n_copies = [at % 3 for at in range(len(table))]
    at = table.schema.get_field_index("n_copies")
    table = table.set_column(at, "n_copies", pa.array(n_copies, pa.int32()))
    files.write_arrow(tmp_path / "train.arrow", table)
    documents = Documents(tmp_path / "train.arrow")
    settings = PackingSettings(row_tokens=2048)
    plan, _ = make_plan(documents, write_facts(tmp_path), settings, tokenizer_v3)
    placed = np.bincount(plan.rows.pieces.document, minlength=len(documents))
    assert placed.tolist() == n_copies


def test_a_window_makes_rows_cheaper(pack):
    windowed, _ = pack(row_tokens=1024, window=64)
    full, _ = pack(row_tokens=1024, window=None)
    assert windowed.rows == full.rows
    assert windowed.attention_pairs.sum() < full.attention_pairs.sum()
    assert windowed.training_flops.sum() < full.training_flops.sum()


def test_the_stage_runs_as_a_rule_starts_it(run_stage, prepared, tokenizer_v3, tmp_path):
    write_facts(tmp_path)
    done = run_stage(STAGE, *arguments(prepared, tokenizer_v3, tmp_path, {"row_tokens": 256}))
    assert done.returncode == 0, done.stderr
    assert "INFO pack_sequences: packed strategy=best_fit row_tokens=256" in done.stderr
    assert read_plan(tmp_path / "plan.parquet").row_tokens == 256


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"row_tokens": 256},
            ["longer than the model's context", "row_tokens", "found:    256", "at most 128"],
        ),
        ({"strategy": "bestfit"}, ["strategy: found 'bestfit'", "did you mean 'best_fit'?"]),
        (
            {"row_tokens": 64, "overlap_tokens": 33},
            ["overlap_tokens: found 33", "at most half of row_tokens (32)"],
        ),
        (
            {"row_tokens": 16, "long_documents": "drop"},
            ["no documents are left to pack", "long_documents", "drop", "raise packings.<name>"],
        ),
        ({"row_token": 64}, ["row_token: unknown key", "did you mean 'row_tokens'?"]),
    ],
)
def test_settings_that_do_not_fit_stop_the_stage(
    run_stage, prepared, tokenizer_v3, tmp_path, settings, parts
):
    write_facts(tmp_path, context_tokens=128)
    done = run_stage(STAGE, *arguments(prepared, tokenizer_v3, tmp_path, settings))
    assert done.returncode == 1
    for part in ("pack_sequences: ", *parts):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "plan.parquet").exists()
