from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from workflow_scripts.packing.balance import NO_ROW
from workflow_scripts.packing.packing import STRATEGIES, Piece, Pieces, Rows
from workflow_scripts.train.batches import IGNORED, Collator, PlannedRows

LENGTHS = [12, 5, 1, 30, 7, 2, 16]


def planned(strategy, row_tokens, seed):
    return STRATEGIES[strategy](Pieces.whole(LENGTHS), row_tokens=row_tokens, seed=seed)


@pytest.fixture(scope="module")
def documents(random_documents, tmp_path_factory):
    return random_documents(tmp_path_factory.mktemp("tokens") / "train.arrow", LENGTHS)


@pytest.mark.parametrize("seed", range(4))
def test_whole_documents_make_the_batch_of_transformers_own_flattening_collator(documents, seed):
    from transformers import DataCollatorWithFlattening

    rows = list(planned("best_fit", 32, seed))[:2]
    examples = []
    for piece in (piece for row in rows for piece in row):
        document = documents[piece.document]
        ids = document.input_ids.tolist()
        labels = [
            token if supervised else IGNORED
            for token, supervised in zip(ids, document.is_supervised.tolist(), strict=True)
        ]
        examples.append({"input_ids": ids, "labels": labels})
    reference = DataCollatorWithFlattening(
        return_position_ids=True, return_flash_attn_kwargs=True, return_tensors="pt"
    )(examples)
    found = Collator(documents, crosses_documents=False)(rows)
    predicting = found.pop("predicting")
    assert (predicting + 1).tolist() == (found["labels"][0] != IGNORED).nonzero()[:, 0].tolist()
    assert found.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), key


@given(row_tokens=st.integers(30, 60), seed=st.integers(0, 1000), crosses=st.booleans())
def test_every_token_appears_once_with_the_label_of_its_span(documents, row_tokens, seed, crosses):
    rows = planned("concatenate" if crosses else "best_fit", row_tokens, seed)
    batch = Collator(documents, crosses_documents=crosses)(rows)
    starts = set(batch["cu_seq_lens_q"].tolist()[:-1])
    at = 0
    for piece in (piece for row in rows for piece in row):
        document = documents[piece.document]
        for offset in range(piece.start, piece.start + piece.length):
            token = int(document.input_ids[offset])
            is_counted = document.is_supervised[offset] and at not in starts
            assert batch["input_ids"][0, at] == token
            assert batch["labels"][0, at] == (token if is_counted else IGNORED)
            at += 1
    assert batch["input_ids"].shape == batch["labels"].shape == (1, at)
    assert batch["position_ids"].shape == (1, at) and at == sum(LENGTHS)


@pytest.mark.parametrize("crosses", [False, True], ids=["best_fit", "concatenate"])
def test_positions_restart_where_attention_does_and_nowhere_else(documents, crosses):
    rows = [[Piece(0, 0, 12), Piece(1, 0, 5)], [Piece(3, 8, 10)]]
    batch = Collator(documents, crosses_documents=crosses)(rows)
    bounds = [0, 17, 27] if crosses else [0, 12, 17, 27]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == bounds
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist() == bounds[:-1]
    steps = batch["position_ids"][0].diff()
    assert set(steps[steps != 1].tolist()) <= {1 - b for b in (5, 12, 17)}
    assert batch["max_length_q"] == batch["max_length_k"] == (17 if crosses else 12)


def test_a_documents_label_crosses_into_the_next_only_where_attention_does(
    write_documents, tmp_path
):
    spans = [[(0, 4)], [(0, 4)]]
    documents = write_documents(tmp_path / "t.arrow", [[5, 6, 7, 8], [9, 10, 11, 12]], spans)
    row = [[Piece(0, 0, 4), Piece(1, 0, 4)]]
    apart = Collator(documents, crosses_documents=False)(row)["labels"].tolist()
    joined = Collator(documents, crosses_documents=True)(row)["labels"].tolist()
    assert apart == [[IGNORED, 6, 7, 8, IGNORED, 10, 11, 12]]
    assert joined == [[IGNORED, 6, 7, 8, 9, 10, 11, 12]]


def test_carried_over_context_has_no_labels_and_begins_with_bos(write_documents, tmp_path):
    documents = write_documents(tmp_path / "t.arrow", [[1, *range(10, 20)]], [[(1, 11)]])
    row = [Piece(0, 4, 6, n_context=2)]
    batch = Collator(documents, crosses_documents=False)([row])
    assert batch["input_ids"].tolist() == [[1, 14, 15, 16, 17, 18]]  # BOS in place of 13
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 15, 16, 17, 18]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_padding_is_a_segment_without_labels_after_each_shorter_row(documents):
    rows = [[Piece(1, 0, 5)], [Piece(0, 0, 12)], [Piece(4, 0, 7), Piece(5, 0, 2)]]
    padded = Collator(documents, crosses_documents=False, pads_rows=True)(rows)
    flat = Collator(documents, crosses_documents=False)(rows)
    assert padded["cu_seq_lens_q"].tolist() == [0, 5, 12, 24, 31, 33, 36]
    assert padded["input_ids"].shape == padded["labels"].shape == (1, 36)
    is_padding = torch.zeros(36, dtype=torch.bool)
    is_padding[5:12] = is_padding[33:36] = True
    assert (padded["labels"][0, is_padding] == IGNORED).all()
    for key in ("input_ids", "position_ids", "labels"):
        assert torch.equal(padded[key][0, ~is_padding], flat[key][0])


def test_a_micro_batch_without_rows_is_one_token_without_a_label(documents):
    for rows in ([[]], [[], []]):
        batch = Collator(documents, crosses_documents=True, pads_rows=True)(rows)
        assert batch["input_ids"].shape == (1, 1)
        assert batch["labels"].tolist() == [[IGNORED]]
        assert batch["cu_seq_lens_q"].tolist() == [0, 1]
    full = Collator(documents, crosses_documents=False)([[Piece(0, 0, 12)], []])
    assert full["cu_seq_lens_q"].tolist() == [0, 12]


def test_planned_rows_are_the_rows_of_the_plan_in_order():
    rows = [[Piece(2, 0, 5)], [Piece(0, 3, 1), Piece(1, 0, 2)]]
    planned_rows = PlannedRows(Rows.of(rows))
    assert len(planned_rows) == 2
    assert list(planned_rows) == [planned_rows[0], planned_rows[1]] == rows
    assert planned_rows[NO_ROW] == []
