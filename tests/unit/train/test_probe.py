from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    MinistralConfig,
    MixtralConfig,
)

from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.packing.packing import STRATEGIES, Piece, Pieces, Rows
from workflow_scripts.packing.plan import Plan
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train import attention
from workflow_scripts.train.model import trainable_model
from workflow_scripts.train.probe import check_attention

LENGTHS = [14, 5, 9, 20, 7, 3]
WINDOWS = [8, 8]
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": 8,
    "initializer_range": 0.15,
}
OUTSIDE = ("attention is not what the plan declares", "tokens moved that must not see them")
BEYOND = ("a layer's window is not the model's", "it sees tokens 8 or more back")
TO_FIX = "requirements.lock"


@pytest.fixture(scope="module")
def documents(random_documents, tmp_path_factory):
    return random_documents(tmp_path_factory.mktemp("tokens") / "train.arrow", LENGTHS)


def plan_of(rows, strategy, row_tokens):
    costs = np.zeros(len(rows))  # the probe does not use them
    return Plan(rows, row_tokens, strategy, costs, costs, costs)


def packed(strategy, *, row_tokens=40):
    rows = STRATEGIES[strategy](Pieces.whole(LENGTHS), row_tokens=row_tokens, seed=0)
    return plan_of(rows, strategy, row_tokens)


@pytest.fixture
def load(checkpoint):
    """`load(window=8, implementation=None)`: the tiny Mistral, by default with packed attention."""

    def model(*, window=8, implementation=None):
        name = implementation or attention.register()
        return load_model(checkpoint, window=window, precision="float32", attention=name)

    return model


@pytest.fixture
def load_with(load):
    """`load_with(function)`: the tiny Mistral; the function may change the arguments of the packed
    attention."""

    def model(change):
        def changed(module, query, key, value, mask, **options):
            return attention.packed_attention(
                module, query, key, value, mask, **change(query, options)
            )

        AttentionInterface.register("changed", changed)
        return load(implementation="changed")

    return model


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("is_training", [True, False])
def test_the_model_that_trains_passes_and_is_left_as_it_was(
    checkpoint, facts, documents, strategy, is_training
):
    model = trainable_model(checkpoint, facts, RecipeSettings(rank=8))
    model.train(is_training)
    layers = list(model.get_base_model().model.layers)
    random_state = torch.get_rng_state()
    found = check_attention(model, documents, packed(strategy), WINDOWS)
    assert found["n_windows"] == 1 and found["n_windows_beyond_rows"] == 0
    if strategy == "none":
        assert found["n_tokens"] == 2 * 5  # of 3 and 5 tokens, padded
    # Every exchanged token moves, because its embedding changes.
    assert 0 < found["n_exchanged_tokens"] <= found["n_moved_tokens"] < found["n_tokens"]
    assert model.training == is_training
    assert list(model.get_base_model().model.layers) == layers
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropout_is_the_same_in_both_passes(load, documents, strategy):
    config = LoraConfig(r=8, lora_dropout=0.5, target_modules="all-linear")
    model = get_peft_model(load(), config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    check_attention(model, documents, packed(strategy), WINDOWS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_transformers_own_packed_attention_passes(load, documents, strategy):
    check_attention(load(implementation="sdpa"), documents, packed(strategy), WINDOWS)


@pytest.mark.parametrize("strategy", ["best_fit", "none", "concatenate"])
def test_attention_over_the_whole_micro_batch_stops_the_stage(load_with, documents, strategy):
    """As in a trainer that does not pass the segments' bounds on."""

    def whole(query, options):
        n_tokens = query.shape[2]
        bounds = torch.tensor([0, n_tokens], dtype=torch.int32)
        return {**options, "cu_seq_lens_q": bounds, "max_length_q": n_tokens}

    with pytest.raises(StageError) as caught:
        check_attention(load_with(whole), documents, packed(strategy), WINDOWS)
    for part in (*OUTSIDE, "where:    document chat/", f"none (strategy {strategy})", TO_FIX):
        assert part in str(caught.value)


@pytest.mark.parametrize("leak", ["attention_mask", "use_cache"])
def test_transformers_attention_without_the_bounds_stops_the_stage(load, documents, leak):
    """Its sdpa finds documents by their positions, unless it gets a mask or a cache."""
    model = load(implementation="sdpa")
    plain_forward = model.model.forward

    def forward(input_ids, **inputs):
        forced = {"attention_mask": torch.ones_like(input_ids), "use_cache": True}
        return plain_forward(input_ids=input_ids, **inputs | {leak: forced[leak]})

    model.model.forward = forward
    with pytest.raises(StageError) as caught:
        check_attention(model, documents, packed("best_fit"), WINDOWS)
    assert all(part in str(caught.value) for part in (*OUTSIDE, TO_FIX))


def test_attention_to_later_tokens_stops_the_stage(load, documents):
    def both_ways(module, query, key, value, mask, *, cu_seq_lens_q, scaling, **_):
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(*parts, scale=scaling, enable_gqa=True)
            for parts in zip(
                *(part.split(cu_seq_lens_q.diff().tolist(), 2) for part in (query, key, value)),
                strict=True,
            )
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    AttentionInterface.register("both_ways", both_ways)
    with pytest.raises(StageError) as caught:
        check_attention(
            load(implementation="both_ways"), documents, packed("best_fit"), [None, None]
        )
    assert all(part in str(caught.value) for part in OUTSIDE)


def test_a_concatenating_plan_whose_documents_are_kept_apart_stops_the_stage(load_with, documents):
    plan = packed("concatenate", row_tokens=64)
    assert len(plan.rows) == 1
    bounds = [0, *accumulate(piece.length for piece in plan.rows[0])]

    def apart(_, options):
        return {**options, "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32)}

    with pytest.raises(StageError) as caught:
        check_attention(load_with(apart), documents, plan, WINDOWS)
    for part in (OUTSIDE[0], "nothing moved in the next document", "sees it", TO_FIX):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("window", "of_facts", "found", "expected"),
    [
        (9, 8, "it sees tokens 8 or more back", "sliding_window 8"),
        (None, 8, "it sees tokens 8 or more back", "sliding_window 8"),
        (7, 8, "it does not see the token 7 back", "sliding_window 8"),
        # MistralConfig fills in a window if config.json has none.
        (20, None, "it sees none of the first 16 tokens", "sliding_window null"),
    ],
    ids=["one too wide", "dropped", "one too narrow", "forced"],
)
def test_another_window_stops_the_stage(load, documents, window, of_facts, found, expected):
    with pytest.raises(StageError) as caught:
        check_attention(load(window=window), documents, packed("best_fit"), [of_facts] * 2)
    for part in ("a layer's window is not the model's", "layer 0", found, expected, TO_FIX):
        assert part in str(caught.value)


def random_model(config, name=None):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=name or attention.register()
    )


@pytest.mark.parametrize("name", ["packed", "sdpa"])
def test_every_window_of_an_interleaved_model_is_probed_in_its_layer(documents, name):
    kinds = ["full_attention", *["sliding_attention"] * 3]
    windows = [None, 8, 8, 8]
    config = MinistralConfig(**SHAPE, layer_types=kinds)
    model = random_model(config, None if name == "packed" else name)
    found = check_attention(model, documents, packed("best_fit"), windows)
    assert found["n_windows"] == 2
    with pytest.raises(StageError, match=r"layer 1.*of 16\n.*sees tokens 8 or more back"):
        sliding = random_model(MinistralConfig(**SHAPE, layer_types=["full_attention"] * 4))
        check_attention(sliding, documents, packed("best_fit"), windows)
    with pytest.raises(StageError, match=r"layer 0.*of 40\n.*sees none of the first 16 tokens"):
        full = random_model(MinistralConfig(**SHAPE, layer_types=["sliding_attention"] * 4))
        check_attention(full, documents, packed("best_fit"), windows)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mixture_of_experts_passes_and_keeps_its_experts(documents, strategy):
    model = random_model(MixtralConfig(**SHAPE, num_local_experts=8)).train()
    tokens = torch.arange(3, 23)[None]
    model.set_attn_implementation("eager")
    before = model(tokens, use_cache=False).logits
    model.set_attn_implementation(attention.NAME)
    check_attention(model, documents, packed(strategy), [8] * 4)
    model.set_attn_implementation("eager")
    assert torch.equal(model(tokens, use_cache=False).logits, before)


def test_a_mixture_of_experts_that_leaks_stops_the_stage(documents):
    model = random_model(MixtralConfig(**SHAPE | {"sliding_window": None}))
    with pytest.raises(StageError, match=BEYOND[1]):
        check_attention(model, documents, packed("best_fit"), [8] * 4)


def test_rows_of_one_document_are_probed_two_at_a_time(load, load_with, documents):
    single = plan_of(Rows.of([[Piece(0, 0, 14)], [Piece(3, 0, 20)]]), "best_fit", 20)
    found = check_attention(load(), documents, single, WINDOWS)
    assert found["n_tokens"] == 34 and found["n_exchanged_tokens"] == 7

    def whole(query, options):
        return {**options, "cu_seq_lens_q": torch.tensor([0, 34], dtype=torch.int32)}

    with pytest.raises(StageError, match=OUTSIDE[1]):
        check_attention(load_with(whole), documents, single, WINDOWS)


@pytest.mark.parametrize(("row_tokens", "n_beyond"), [(8, 1), (9, 0)])
def test_a_window_that_no_row_exceeds_is_counted(load, documents, row_tokens, n_beyond):
    """The plan has one document, which no other could see."""
    plan = plan_of(Rows.of([[Piece(2, 0, row_tokens)]]), "best_fit", row_tokens)
    found = check_attention(load(), documents, plan, WINDOWS)
    assert found["n_tokens"] == row_tokens
    assert found["n_windows"] == 1 - n_beyond and found["n_windows_beyond_rows"] == n_beyond


def test_a_model_that_overflows_stops_the_stage(load, documents):
    model = load()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(StageError, match="not finite"):
        check_attention(model, documents, packed("best_fit"), WINDOWS)
