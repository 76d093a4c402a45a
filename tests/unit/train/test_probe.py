from __future__ import annotations

import pytest
import torch

from workflow_scripts.data.packing import Piece, best_fit, concatenate
from workflow_scripts.data.plan import Plan
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train import attention
from workflow_scripts.train.probe import check_attention
from workflow_scripts.train.train_adapter import adapted_model

LENGTHS = [14, 5, 9, 20, 7, 3]


@pytest.fixture(scope="module")
def documents(random_documents, tmp_path_factory):
    return random_documents(tmp_path_factory.mktemp("tokens") / "train.arrow", LENGTHS)


@pytest.fixture(scope="module")
def plan():
    return Plan(best_fit(LENGTHS, row_tokens=40, seed=0), row_tokens=40, crosses_documents=False)


def whole_row_attention(module, query, key, value, mask, *, cu_seq_lens_q, **options):
    """What a trainer does that does not hand the boundaries on: one segment, the whole row."""
    n_tokens = query.shape[2]
    bounds = torch.tensor([0, n_tokens], dtype=torch.int32)
    options["max_length_q"] = n_tokens
    return attention.packed_attention(
        module, query, key, value, mask, cu_seq_lens_q=bounds, **options
    )


@pytest.fixture
def leaking_model(checkpoint):
    from transformers import AttentionInterface

    AttentionInterface.register("whole_row", whole_row_attention)
    return load_model(checkpoint, window=None, precision="float32", attention="whole_row")


@pytest.fixture
def masked_model(checkpoint):
    """transformers' own sdpa, which finds documents by their positions, until it gets a mask."""
    from transformers import MistralForCausalLM

    class MaskedMistral(MistralForCausalLM):
        def forward(self, input_ids, **inputs):
            ones = torch.ones_like(input_ids)
            return super().forward(input_ids=input_ids, attention_mask=ones, **inputs)

    return MaskedMistral.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    )


@pytest.mark.parametrize("is_training", [True, False])
def test_the_model_that_trains_passes_and_is_left_in_its_mode(
    checkpoint, facts, documents, plan, is_training
):
    model = adapted_model(checkpoint, facts, RecipeSettings(rank=8))
    model.train(is_training)
    check_attention(model, documents, plan)
    assert model.training == is_training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_transformers_own_packed_attention_passes(checkpoint, documents, plan):
    model = load_model(checkpoint, window=8, precision="float32", attention="sdpa")
    check_attention(model, documents, plan)


@pytest.mark.parametrize("leak", ["leaking_model", "masked_model"])
def test_documents_that_see_each_other_stop_the_stage(request, leak, documents, plan):
    model = request.getfixturevalue(leak)
    with pytest.raises(StageError) as caught:
        check_attention(model, documents, plan)
    row = next(row for row in plan.rows if len(row) > 1)
    for part in (
        "packed documents see each other",
        documents.ids[row[-1].document],
        "at most 0.001",
        "requirements.lock",
    ):
        assert part in str(caught.value)


def test_a_plan_that_crosses_documents_or_packs_nothing_is_not_probed(leaking_model, documents):
    crossing = Plan(concatenate(LENGTHS, row_tokens=40, seed=0), 40, crosses_documents=True)
    check_attention(leaking_model, documents, crossing)
    single = Plan([[Piece(0, 0, 14)], [Piece(1, 0, 5)]], 40, crosses_documents=False)
    check_attention(leaking_model, documents, single)
