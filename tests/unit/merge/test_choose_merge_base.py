from __future__ import annotations

import math

import pytest
import torch

from tests.unit.merge.merges import merge
from workflow_scripts import files
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.gates import MergeCandidate
from workflow_scripts.log import StageError
from workflow_scripts.merge import choose_merge_base, merge_candidates
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.scoring.likelihood import (
    all_logits,
    divergence,
    score_documents,
    summarize,
)
from workflow_scripts.scoring.transformers_model import TransformersModel
from workflow_scripts.tokens.documents import Documents


def arguments(chain, choice, tokens=None, settings='{"n_conversations": 3}'):
    return (
        ["--checkpoint", chain.checkpoint, "--facts", chain.facts, "--adapter", chain.adapter]
        + ["--tokens", tokens or chain.tokens, "--settings", settings, "--choice", choice]
    )  # fmt: skip


@pytest.fixture(scope="module")
def chosen(chain, tmp_path_factory):
    choice = tmp_path_factory.mktemp("choice") / "merge_base.json"
    choose_merge_base.main([str(argument) for argument in arguments(chain, choice)])
    return choice


def test_the_candidates_in_memory_score_as_their_merged_files(chain, chosen, tmp_path):
    report = files.read_json(chosen)
    facts = Facts.read(chain.facts)
    pieces = list(cutting.cut(list(Documents(chain.tokens)), piece_tokens=300))
    live = TransformersModel(chain.checkpoint, window=300, precision="nf4", adapter=chain.adapter)
    reference = [all_logits(live, piece) for piece in pieces]
    assert facts.sliding_window == 300
    assert report["n_conversations"] == 3
    perplexity = summarize(score_documents(live, pieces)).perplexity
    assert report["adapter_perplexity"] == pytest.approx(perplexity, rel=1e-6)
    for base in ("original", "dequantized"):
        merged = merge(chain.checkpoint, chain.adapter, tmp_path / base, base=base)
        model = TransformersModel(merged, window=300, precision="float32")
        divergences = [
            divergence(expected, all_logits(model, piece))[0]
            for expected, piece in zip(reference, pieces, strict=True)
        ]
        summary = summarize(score_documents(model, pieces))
        # The same weights through the same arithmetic; measured equal.
        assert report[base]["perplexity"] == pytest.approx(summary.perplexity, rel=1e-6)
        assert report[base]["kl_divergence_nats"] == pytest.approx(
            float(torch.cat(divergences).mean()), rel=1e-4
        )


def test_the_base_that_training_saw_is_nearer_to_the_live_adapter(chosen):
    report = files.read_json(chosen)
    original, dequantized = report["original"], report["dequantized"]
    assert dequantized["kl_divergence_nats"] < 0.1 * original["kl_divergence_nats"]
    assert report["merge_base"] in ("original", "dequantized")
    difference = math.log(original["perplexity"]) - math.log(dequantized["perplexity"])
    assert report["loss_difference_nats_per_token"] == pytest.approx(difference, abs=1e-9)


def test_only_the_choice_is_written(chosen):
    assert [path.name for path in chosen.parent.iterdir()] == ["merge_base.json"]


def figures(original_kl, dequantized_kl):
    return {
        base: MergeCandidate(perplexity=3.0, kl_divergence_nats=kl, top1_agreement_fraction=0.9)
        for base, kl in (("original", original_kl), ("dequantized", dequantized_kl))
    }


@pytest.mark.parametrize(
    ("difference", "error", "expected"),
    [
        (-0.03, 0.01, "original"),
        (0.03, 0.01, "dequantized"),
        (-0.01, 0.01, "dequantized"),  # not significant: the nearer base
        (0.01, 0.01, "dequantized"),
        (-0.5, None, "dequantized"),
    ],
)
def test_perplexity_decides_beyond_its_error_and_otherwise_the_nearer_base(
    difference, error, expected
):
    assert merge_candidates.better(figures(0.2, 0.1), difference, error) == expected


def test_within_the_error_the_original_is_chosen_where_it_is_nearer():
    assert merge_candidates.better(figures(0.1, 0.2), 0.01, 0.01) == "original"


def test_a_figure_that_is_not_finite_stops_the_choice():
    with pytest.raises(StageError, match="a merge computes no numbers") as caught:
        merge_candidates.better(figures(0.1, math.nan), 0.5, 0.01)
    assert "dequantized" in str(caught.value)


def test_without_a_conversation_no_base_can_be_chosen(
    chain, write_documents, tmp_path, ends_with_message
):
    write_documents(tmp_path / "none.arrow", [], [])
    given = arguments(chain, tmp_path / "merge_base.json", tokens=tmp_path / "none.arrow")
    message = ends_with_message(choose_merge_base.main, given)
    assert "there is no conversation to choose the base by" in message
    assert "runs.<name>.merge_base" in message
    assert not (tmp_path / "merge_base.json").exists()


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.merge.choose_merge_base")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers"}
