from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.train import attention

# Below, at and above the window of 8; a document of one token; the longest last and in between.
LENGTHS = [3, 8, 9, 20, 1, 7, 17]
# Relative to the reference's largest value; measured 2e-6 at most, logits and gradients.
TOLERANCE = 1e-5


def flat_batch(documents, *, segments=None):
    """A packed row, written out by hand."""
    lengths = segments or [len(document) for document in documents]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def directions(documents):
    """Fixed random weights of the logits: a scalar whose gradient is as general as any."""
    return torch.randn(sum(map(len, documents)), 300, generator=torch.Generator().manual_seed(2))


def gradients(model, scalar):
    model.zero_grad()
    scalar.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(found, expected):
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("window", [8, 2, None])
@pytest.mark.parametrize("reference", ["sdpa", "eager"])
def test_a_packed_row_equals_each_document_alone(
    checkpoint, documents, directions, window, reference
):
    packed = load_model(
        checkpoint, window=window, precision="float32", attention=attention.register()
    )
    alone = load_model(checkpoint, window=window, precision="float32", attention=reference)
    found = packed(**flat_batch(documents), use_cache=False).logits[0]
    expected = torch.cat(
        [alone(document[None], use_cache=False).logits[0] for document in documents]
    )
    assert_close(found, expected)
    found_gradients = gradients(packed, (found * directions).sum())
    for name, gradient in gradients(alone, (expected * directions).sum()).items():
        assert gradient.abs().max() > 0, name
        assert_close(found_gradients[name], gradient)


@pytest.mark.parametrize("window", [8, None])
def test_one_segment_over_all_documents_equals_the_plain_model_on_the_row(
    checkpoint, documents, directions, window
):
    packed = load_model(
        checkpoint, window=window, precision="float32", attention=attention.register()
    )
    plain = load_model(checkpoint, window=window, precision="float32", attention="eager")
    row = torch.cat(documents)
    found = packed(**flat_batch(documents, segments=[len(row)]), use_cache=False).logits[0]
    expected = plain(row[None], use_cache=False).logits[0]
    assert_close(found, expected)
    found_gradients = gradients(packed, (found * directions).sum())
    for name, gradient in gradients(plain, (expected * directions).sum()).items():
        assert_close(found_gradients[name], gradient)


def test_a_document_does_not_change_with_its_neighbours(checkpoint, documents):
    model = load_model(checkpoint, window=8, precision="float32", attention=attention.register())
    others = [(document + 7) % 297 + 3 for document in documents]
    with torch.no_grad():
        one = model(**flat_batch([*documents[:3], documents[3]]), use_cache=False).logits[0]
        two = model(**flat_batch([*others[:3], documents[3]]), use_cache=False).logits[0]
    at = sum(LENGTHS[:3])
    assert torch.equal(one[at:], two[at:])
    assert not torch.equal(one[:at], two[:at])


def test_a_token_beyond_the_window_changes_nothing_through_one_layer():
    """Window 4, the query at 9 sees 6 to 9 alone."""
    query, key, value = (torch.randn(1, heads, 10, 16) for heads in (4, 2, 2))
    bounds = [0, 10]
    before = attention.by_segment(query, key, value, bounds, window=4, scale=0.25)
    for position, is_seen in ((5, False), (6, True)):
        changed = value.clone()
        changed[:, :, position] += 1
        after = attention.by_segment(query, key, changed, bounds, window=4, scale=0.25)
        assert torch.equal(before[:, 9], after[:, 9]) != is_seen


def dense_attention(query, key, value, bounds, *, window, scale):
    """softmax(QKᵀ·scale + mask)·V in float64, the mask same document ∩ causal ∩ window."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(groups, dim=1) for part in (key, value))
    n_tokens = query.shape[2]
    visible = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    for start, end in zip(bounds, bounds[1:], strict=False):
        for at in range(start, end):
            first = start if window is None else max(start, at - window + 1)
            visible[at, first : at + 1] = True
    scores = (query.double() @ key.transpose(2, 3)) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return (weights @ value).transpose(1, 2)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 14)),
    seed=st.integers(0, 2**31),
)
def test_segments_equal_a_dense_mask(lengths, window, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 8, generator=generator) for heads in (4, 2, 2)
    )
    bounds = [0, *np.cumsum(lengths).tolist()]
    found, weights = attention.packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32),
        max_length_q=max(lengths),
        sliding_window=window,
    )
    expected = dense_attention(query, key, value, bounds, window=window, scale=0.3)
    assert weights is None
    # Measured at most 5e-7 over 1,000 examples.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "mask", "dropout", "found"),
    [
        (1, torch.ones(1, 1, 4, 4), 0.0, "mask True"),
        (2, None, 0.0, "batch 2"),
        (1, None, 0.1, "dropout 0.1"),
    ],
    ids=["mask", "batch", "dropout"],
)
def test_a_mask_a_batch_or_dropout_is_refused(batch, mask, dropout, found):
    part = torch.zeros(batch, 2, 4, 8)
    with pytest.raises(ValueError, match=f"one flat row.*{found}"):
        attention.packed_attention(
            torch.nn.Module(),
            part,
            part,
            part,
            mask,
            scaling=1.0,
            cu_seq_lens_q=torch.tensor([0, 4], dtype=torch.int32),
            max_length_q=4,
            dropout=dropout,
        )


def test_an_all_ones_mask_given_to_the_model_changes_nothing(checkpoint, documents):
    """It is how packed documents leak elsewhere; transformers makes no mask for this attention."""
    model = load_model(checkpoint, window=8, precision="float32", attention=attention.register())
    batch = flat_batch(documents)
    ones = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        found = model(**batch, attention_mask=ones, use_cache=False).logits
    assert torch.equal(found, expected)
