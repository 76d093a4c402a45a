"""The attention probe on the model that trains, on this machine's device."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM

from tests.facts import facts_of
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import default_device
from workflow_scripts.packing.packing import STRATEGIES, Pieces
from workflow_scripts.packing.plan import Plan
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.tokens.documents import Documents, documents_schema
from workflow_scripts.train import attention
from workflow_scripts.train.model import trainable_model
from workflow_scripts.train.probe import check_attention

LENGTHS = [140, 50, 90, 200, 70, 30]
WINDOW = 64


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    generator = np.random.default_rng(0)
    rows = [
        {
            "id": f"chat/{number}",
            "input_ids": generator.integers(3, 512, size=length).tolist(),
            "supervised_spans": [length // 2, length],
            "n_tokens": length,
            "n_supervised_tokens": length - length // 2,
            "n_copies": 1,
        }
        for number, length in enumerate(LENGTHS)
    ]
    path = tmp_path_factory.mktemp("tokens") / "train.arrow"
    files.write_arrow(path, pa.Table.from_pylist(rows, schema=documents_schema()))
    return Documents(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model in NF4 on this device, with a new adapter."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=4,
        sliding_window=WINDOW,
        initializer_range=0.06,
    )
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return trainable_model(folder, facts_of(folder), RecipeSettings(rank=8)).train()


def plan(strategy):
    rows = STRATEGIES[strategy](Pieces.whole(LENGTHS), row_tokens=300, seed=0)
    costs = np.zeros(len(rows))  # the probe does not use them
    return Plan(rows, 300, strategy, costs, costs, costs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_model_that_trains_passes(model, documents, strategy):
    assert model.device.type == default_device().type
    found = check_attention(model, documents, plan(strategy), [WINDOW] * 4)
    assert found["n_windows"] == 1
    assert 0 < found["n_exchanged_tokens"] <= found["n_moved_tokens"] < found["n_tokens"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_attention_over_the_whole_micro_batch_stops_the_stage(model, documents, strategy):
    def whole(module, query, key, value, mask, **options):
        n_tokens = query.shape[2]
        bounds = torch.tensor([0, n_tokens], dtype=torch.int32, device=query.device)
        options |= {"cu_seq_lens_q": bounds, "max_length_q": n_tokens}
        return attention.packed_attention(module, query, key, value, mask, **options)

    AttentionInterface.register("whole_micro_batch", whole)
    base = model.get_base_model()
    base.set_attn_implementation("whole_micro_batch")
    with pytest.raises(StageError, match="must not see them"):
        check_attention(model, documents, plan(strategy), [WINDOW] * 4)
    base.set_attn_implementation(attention.NAME)


@pytest.mark.parametrize("of_facts", [WINDOW - 1, WINDOW + 16, None])
def test_another_window_stops_the_stage(model, documents, of_facts):
    with pytest.raises(StageError, match="a layer's window is not the model's"):
        check_attention(model, documents, plan("best_fit"), [of_facts] * 4)
