from __future__ import annotations

import json

import numpy as np
import pytest

from workflow_scripts import files
from workflow_scripts.data import pack_sequences
from workflow_scripts.data.documents import Documents
from workflow_scripts.data.plan import read_plan

STAGE = "workflow_scripts.data.pack_sequences"


@pytest.fixture
def pack(prepared, tmp_path):
    def run(*, window=64, context_tokens=4096, **settings):
        facts = {"sliding_window": window, "context_tokens": context_tokens}
        files.write_json(tmp_path / "facts.json", facts)
        pack_sequences.main(arguments(prepared, tmp_path, settings))
        return read_plan(tmp_path / "plan.parquet"), files.read_json(tmp_path / "report.json")

    return run


def arguments(prepared, folder, settings):
    return [
        *("--tokens", str(prepared.tokens / "train.arrow"), "--facts", str(folder / "facts.json")),
        *("--settings", json.dumps(settings), "--plan", str(folder / "plan.parquet")),
        *("--report", str(folder / "report.json")),
    ]


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--plan" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


@pytest.mark.parametrize("strategy", ["best_fit", "concatenate"])
@pytest.mark.parametrize("window", [None, 64])
def test_the_report_counts_what_the_plan_holds(pack, prepared, strategy, window):
    plan, report = pack(strategy=strategy, row_tokens=128, seed=4, window=window)
    documents = Documents(prepared.tokens / "train.arrow")
    lengths = [len(document.input_ids) for document in documents]
    assert plan.row_tokens == 128
    assert plan.crosses_documents == (strategy == "concatenate")
    assert report["n_documents"] == len(lengths)
    assert report["n_rows"] == len(plan.rows)
    assert report["n_tokens"] == sum(lengths)
    assert report["fill_fraction"] == sum(lengths) / (128 * len(plan.rows))
    assert 0 < report["fill_fraction"] <= 1
    assert report["n_supervised_tokens"] == sum(
        document.is_supervised.sum() for document in documents
    )
    beyond = [length for length in lengths if window and length > window]
    assert report["n_documents_beyond_window"] == len(beyond)
    whole = {piece for row in plan.rows for piece in row if piece.start == 0}
    n_cut = sum(piece.length < lengths[piece.document] for piece in whole)
    assert report["n_documents_cut"] == n_cut > 0


def test_supervised_tokens_of_a_row_are_those_of_its_pieces(pack, prepared, tmp_path):
    plan, _ = pack(strategy="concatenate", row_tokens=128)
    documents = Documents(prepared.tokens / "train.arrow")
    masks = [document.is_supervised for document in documents]
    expected = [
        int(np.concatenate([masks[p.document][p.start :][: p.length] for p in row]).sum())
        for row in plan.rows
    ]
    counted = files.read_parquet(tmp_path / "plan.parquet")["n_supervised_tokens"].to_pylist()
    assert counted == expected
    assert any(expected)


def test_a_window_makes_rows_cheaper(pack):
    _, windowed = pack(row_tokens=1024, window=64)
    _, full = pack(row_tokens=1024, window=None)
    assert windowed["attention_pairs"] < full["attention_pairs"]
    assert windowed["n_rows"] == full["n_rows"]


def test_the_stage_runs_as_a_rule_starts_it(run_stage, prepared, tmp_path):
    files.write_json(tmp_path / "facts.json", {"sliding_window": 64, "context_tokens": 4096})
    done = run_stage(STAGE, *arguments(prepared, tmp_path, {"row_tokens": 256}))
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
        ({"row_token": 64}, ["row_token: unknown key", "did you mean 'row_tokens'?"]),
    ],
)
def test_settings_that_do_not_fit_stop_the_stage(run_stage, prepared, tmp_path, settings, parts):
    files.write_json(tmp_path / "facts.json", {"sliding_window": None, "context_tokens": 128})
    done = run_stage(STAGE, *arguments(prepared, tmp_path, settings))
    assert done.returncode == 1
    for part in ("pack_sequences: ", *parts):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "plan.parquet").exists()
