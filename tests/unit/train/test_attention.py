from __future__ import annotations

import inspect
import logging
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AutoModelForCausalLM,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
)

from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.train import attention

# Lengths below, at and above the window of 8; one token; the longest document last and in between;
# one document of several bands.
LENGTHS = [3, 8, 9, 20, 1, 7, 300, 17]
# Relative to the reference's largest value; measured 3e-6 at most, logits and gradients.
TOLERANCE = 1e-5
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "window 8": MistralConfig(**SHAPE, sliding_window=8),
    "window 1": MistralConfig(**SHAPE, sliding_window=1),
    "no window": MistralConfig(**SHAPE, sliding_window=None),
    # As in Nemo: the heads together are narrower than the model.
    "explicit head_dim": MistralConfig(**SHAPE, sliding_window=None, head_dim=16),
    "Mixtral": MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=8),
    "Ministral, interleaved": MinistralConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=8,
        layer_types=["full_attention", *["sliding_attention"] * 3],
    ),
}


def random_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.register())


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
def directions():
    """Fixed random weights for the logits, which give a scalar with a general gradient."""
    return torch.randn(sum(LENGTHS), 300, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, window=8, precision="float32", attention=attention.register())


def gradients(model, scalar):
    model.zero_grad()
    scalar.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(found, expected):
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def assert_same(model, found, expected, directions):
    """Logits, and the gradients of all parameters."""
    assert_close(found, expected)
    found_gradients = gradients(model, (found * directions).sum())
    for name, gradient in gradients(model, (expected * directions).sum()).items():
        # With a window of 1 the scores have no effect.
        assert gradient.abs().max() > 0 or model.config.sliding_window == 1, name
        if gradient.abs().max() > 0:
            assert_close(found_gradients[name], gradient)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_equals_each_document_alone(name, documents, directions):
    model = random_model(CONFIGS[name])
    found = model(**flat_batch(documents), use_cache=False).logits[0]
    model.set_attn_implementation("eager")
    expected = torch.cat(
        [model(document[None], use_cache=False).logits[0] for document in documents]
    )
    assert_same(model, found, expected, directions)


@pytest.mark.parametrize("window", [8, None])
def test_one_segment_over_all_documents_equals_the_plain_model_on_the_row(
    checkpoint, documents, directions, window
):
    model = load_model(
        checkpoint, window=window, precision="float32", attention=attention.register()
    )
    row = torch.cat(documents)
    found = model(**flat_batch(documents, segments=[len(row)]), use_cache=False).logits[0]
    model.set_attn_implementation("eager")
    expected = model(row[None], use_cache=False).logits[0]
    assert_same(model, found, expected, directions)


def test_a_compiled_model_computes_the_same(documents, directions):
    """Traced forward and backward, run without generated code; the packing changes in between."""
    config = MistralConfig(**SHAPE | {"num_hidden_layers": 1}, sliding_window=8)
    model = random_model(config)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for packing in (documents[:4], documents[3:]):
        batch = flat_batch(packing)
        weights = directions[: batch["input_ids"].shape[1]]
        found = compiled(**batch, use_cache=False).logits[0]
        assert_same(model, found, model(**batch, use_cache=False).logits[0], weights)
    assert counter.frame_count > 0


def dense_attention(query, key, value, lengths, *, window, scale):
    """softmax(QKᵀ·scale + mask)·V, the mask same document ∩ causal ∩ window."""
    n_groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(n_groups, dim=1) for part in (key, value))
    document = np.repeat(np.arange(len(lengths)), lengths)
    visible = [
        [document[q] == document[k] and k <= q and (window is None or k > q - window) for k in each]
        for q, each in enumerate([range(len(document))] * len(document))
    ]
    scores = (query @ key.transpose(2, 3)) * scale
    weights = scores.masked_fill(~torch.tensor(visible), float("-inf")).softmax(dim=-1)
    return (weights @ value).transpose(1, 2)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), max_size=5),
    # A band is 128 queries. Beyond the window: less than a band, one band, a band and a rest.
    long=st.integers(1, 200),
    window=st.one_of(st.none(), st.integers(1, 14), st.integers(15, 210)),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
)
def test_segments_equal_a_dense_mask(lengths, long, window, n_kv_heads, seed):
    lengths = [*lengths, long]
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(1, heads, sum(lengths), 8, generator=generator, requires_grad=True)
        for heads in (4, n_kv_heads, n_kv_heads)
    ]
    found, weights = attention.packed_attention(
        torch.nn.Module(),
        *parts,
        None,
        scaling=0.3,
        cu_seq_lens_q=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max_length_q=max(lengths),
        sliding_window=window,
    )
    doubles = [part.detach().double().requires_grad_() for part in parts]
    expected = dense_attention(*doubles, lengths, window=window, scale=0.3)
    assert weights is None
    # Measured: at most 1e-6, for gradients 3e-6.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    direction = torch.randn(found.shape, generator=generator)
    pairs = zip(
        torch.autograd.grad((found * direction).sum(), parts),
        torch.autograd.grad((expected * direction).sum(), doubles),
        strict=True,
    )
    for found_gradient, gradient in pairs:
        torch.testing.assert_close(found_gradient.double(), gradient, rtol=0, atol=3e-5)


@pytest.mark.parametrize("n_tokens", [10, 150, 300])
def test_a_token_beyond_the_window_changes_nothing_through_one_layer(n_tokens):
    """Window 4: the last query sees itself and the 3 tokens before it."""
    query, key, value = (torch.randn(1, heads, n_tokens, 16) for heads in (4, 2, 2))
    options = {"window": 4, "scale": 0.25}
    bounds = torch.tensor([0, n_tokens], dtype=torch.int32)
    before = attention.by_segment(query, key, value, bounds, **options)
    for n_back, is_seen in ((4, False), (3, True)):
        changed = value.clone()
        changed[:, :, -1 - n_back] += 1
        after = attention.by_segment(query, key, changed, bounds, **options)
        assert torch.equal(before[:, -1], after[:, -1]) != is_seen


def test_memory_grows_with_the_window_and_not_with_the_square_of_the_document():
    """Measured by the largest tensor that forward and backward create, in elements."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        n_elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for one in made if isinstance(made, (tuple, list)) else [made]:
                if isinstance(one, torch.Tensor):
                    n_stored = one.untyped_storage().nbytes() // one.element_size()
                    self.n_elements = max(self.n_elements, n_stored)
            return made

    query, key, value = (torch.randn(1, heads, 8192, 4, requires_grad=True) for heads in (2, 1, 1))
    bounds = torch.tensor([0, 8192], dtype=torch.int32)
    with Largest() as largest:
        attention.by_segment(query, key, value, bounds, window=64, scale=0.5).sum().backward()
    assert largest.n_elements <= 8192 * 256  # keys of a band: 64 + 127


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


def test_an_all_ones_mask_changes_nothing_and_one_that_hides_a_token_is_refused(model, documents):
    """Elsewhere an all-ones mask makes packed documents leak. A mask that hides a token must not be
    dropped silently, as transformers does for an attention without a mask function."""
    batch = flat_batch(documents)
    mask = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        found = model(**batch, attention_mask=mask, use_cache=False).logits
        assert torch.equal(found, expected)
        mask[0, :2] = 0
        with pytest.raises(ValueError, match="mask True"):
            model(**batch, attention_mask=mask, use_cache=False)


def test_transformers_logs_no_warning(checkpoint, documents, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(
            checkpoint, window=8, precision="float32", attention=attention.register()
        )
        model.train()(**flat_batch(documents), use_cache=False)
    assert caplog.records == []


@pytest.mark.parametrize(("window", "expected"), [(None, (-1, 0)), (1, (0, 0)), (4096, (4095, 0))])
def test_the_installed_kernel_takes_the_arguments(window, expected):
    """2.13's window counts keys to the left of the query's own; (−1, 0) is full causal."""
    signature = inspect.signature(varlen_attn)
    options = attention.varlen_options(frozenset(signature.parameters), window=window, scale=0.5)
    bound = signature.bind(*[None] * 7, **options)
    assert bound.arguments["window_size"] == expected
    assert bound.arguments["scale"] == 0.5
    assert bound.arguments["enable_gqa"] is True


# Parameters of the published versions after query, key, value, cu_seq_q, cu_seq_k, max_q, max_k.
TORCH_2_10 = frozenset({"is_causal", "return_aux"})
TORCH_2_11 = frozenset({"return_aux", "scale", "window_size"})
TORCH_2_12 = TORCH_2_11 | {"enable_gqa", "seqused_k", "block_table", "num_splits"}


@pytest.mark.parametrize("parameters", [TORCH_2_11, TORCH_2_12], ids=["2.11", "2.12"])
def test_older_kernels_get_only_arguments_that_they_have(parameters):
    options = attention.varlen_options(parameters, window=8, scale=0.5)
    assert options.keys() == parameters & {"scale", "window_size", "enable_gqa"}


def test_the_error_for_a_kernel_without_a_window_names_the_version_to_install():
    with pytest.raises(StageError) as caught:
        attention.varlen_options(TORCH_2_10, window=None, scale=0.5)
    for part in ("without window_size", "torch 2.11 or newer", "requirements.lock"):
        assert part in str(caught.value)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_the_kernel_gets_the_shapes_it_needs(n_kv_heads):
    """PyTorch's own function on tensors without content: forward and backward."""
    query, key, value = (
        torch.empty(1, 30, heads, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for heads in (4, n_kv_heads, n_kv_heads)
    )
    parts = [part.requires_grad_() for part in (query, key, value)]
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    output = attention._varlen(*parts, bounds, 20, window=8, scale=0.25)
    assert output.shape == (1, 30, 4, 16) and output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(part.grad.shape == part.shape for part in parts)
