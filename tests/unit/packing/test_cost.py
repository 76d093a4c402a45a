from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.facts import MISTRAL_7B
from tests.unit.train.counted_memory import config_of
from workflow_scripts.packing.cost import CostModel, attention_pairs
from workflow_scripts.packing.packing import Piece, Pieces, Rows, best_fit

windows = st.none() | st.integers(1, 50)
SHAPE = MISTRAL_7B.changed(
    n_layers=3,
    hidden_size=96,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    intermediate_size=160,
    vocabulary_size=300,
    layer_windows=(None,) * 3,
)


def visible_pairs(length, window):
    """Count the pairs one by one."""
    return sum(
        key <= query and (window is None or query - key < window)
        for query in range(length)
        for key in range(length)
    )


@given(lengths=st.lists(st.integers(0, 40), max_size=5), window=windows)
def test_attention_pairs_equals_a_brute_force_count(lengths, window):
    pairs = attention_pairs(np.array(lengths, dtype=np.int32), window)
    assert pairs.tolist() == [visible_pairs(length, window) for length in lengths]


@pytest.mark.parametrize("window", [None, 4096])
def test_attention_pairs_of_the_longest_row_do_not_overflow(window):
    seen = np.arange(1, 131_073, dtype=object)
    expected = sum(seen if window is None else np.minimum(seen, window))
    assert attention_pairs(131_072, window) == expected


@given(
    lengths=st.lists(st.integers(1, 40), max_size=20),
    layer_windows=st.lists(windows, min_size=1, max_size=4),
    crosses_documents=st.booleans(),
)
def test_a_rows_pairs_are_the_sum_over_its_segments_and_layers(
    lengths, layer_windows, crosses_documents
):
    rows = best_fit(Pieces.whole(lengths), row_tokens=64, seed=0)
    cost = CostModel.of(SHAPE.changed(layer_windows=layer_windows))
    found = cost.pairs(rows, crosses_documents=crosses_documents)
    segments = [[piece.length for piece in row] for row in rows]
    if crosses_documents:
        segments = [[sum(row)] for row in segments]
    assert found.tolist() == [
        sum(visible_pairs(length, window) for length in row for window in layer_windows)
        for row in segments
    ]


def counted_flops(n_tokens):
    """PyTorch's count for the forward and backward pass of a frozen model."""
    from transformers import MistralForCausalLM

    config = config_of(SHAPE, attn_implementation="eager")
    model = MistralForCausalLM(config).requires_grad_(False)
    embedded = torch.randn(1, n_tokens, SHAPE.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def test_linear_and_output_flops_match_pytorchs_count():
    """Eager attention computes all n² pairs: 2 products forward, 4 backward."""
    n_tokens = 48
    cost = CostModel.of(SHAPE)
    dense_attention = 2.0 * (2 + 4) * SHAPE.n_heads * SHAPE.head_dim
    dense_attention *= SHAPE.n_layers * n_tokens**2
    rows = np.array([n_tokens])
    found = cost.training_flops(rows, rows, np.array([0]))[0] + dense_attention
    assert counted_flops(n_tokens) == pytest.approx(found, rel=1e-9)


def test_only_a_mixtures_active_experts_count():
    dense = CostModel.of(SHAPE)
    mixture = CostModel.of(SHAPE.changed(n_experts_per_token=2))
    expert = 4.0 * 3 * SHAPE.hidden_size * SHAPE.intermediate_size * SHAPE.n_layers
    assert mixture.linear_flops_per_token - dense.linear_flops_per_token == expert


def test_share_of_attention_in_mistral_7b_at_32k_tokens():
    """By hand: 14·4096 operations per pair and layer, 4 per weight and token."""
    facts = MISTRAL_7B.changed(vocabulary_size=32_000)
    n, w, n_weights = 32_768, 4096, 6_979_321_856
    pairs_by_hand = {None: n * (n + 1) / 2, w: w * (w + 1) / 2 + (n - w) * w}
    for window, expected in pairs_by_hand.items():
        cost = CostModel.of(facts.changed(layer_windows=(window,) * 32))
        rows = Rows.of([[Piece(0, 0, n)]])
        pairs = cost.pairs(rows, crosses_documents=False)
        nothing = np.array([0])
        linear = cost.training_flops(rows.n_tokens, nothing, nothing)
        assert linear[0] == 4 * n_weights * n
        both = cost.training_flops(rows.n_tokens, nothing, pairs)
        assert both[0] - linear[0] == pytest.approx(14 * 4096 * 32 * expected, rel=1e-12)
