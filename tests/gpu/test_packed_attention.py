"""Packed attention in bfloat16: its error may be at most 1.5 times that of PyTorch's SDPA on each
document alone in bfloat16, both compared with float32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, MinistralConfig, MistralConfig

from workflow_scripts.train import attention

# Lengths of one token, below, at and above the windows, and of many windows.
LENGTHS = [1, 8, 9, 64, 300, 3, 65]
N_TOKENS = sum(LENGTHS)
BOUNDS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
MORE = 1.5
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "initializer_range": 0.1,
}
CONFIGS = {
    "window 8": MistralConfig(**SHAPE, sliding_window=8),
    "window 64": MistralConfig(**SHAPE, sliding_window=64),
    "no window": MistralConfig(**SHAPE, sliding_window=None),
    # As in Nemo: the heads together are narrower than the model.
    "explicit head_dim": MistralConfig(**SHAPE, sliding_window=None, head_dim=32),
    "interleaved": MinistralConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=64,
        layer_types=["full_attention", "sliding_attention"],
    ),
}


def random_parts(device, n_kv_heads, *, n_tokens=N_TOKENS):
    """Query, key and value of 8 heads of width 64, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, n_heads, n_tokens, 64, generator=generator).to(device, torch.bfloat16)
        for n_heads in (8, n_kv_heads, n_kv_heads)
    ]


def packed(query, key, value, window, *, lengths=LENGTHS):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    layer = SimpleNamespace(config=SimpleNamespace(dtype=torch.bfloat16))
    return attention.packed_attention(
        layer,
        query,
        key,
        value,
        None,
        scaling=0.125,
        cu_seq_lens_q=bounds.to(query.device),
        max_length_q=max(lengths),
        sliding_window=window,
    )[0]


def alone(query, key, value, window):
    """Each document alone, with its own mask."""
    outputs = []
    for parts in zip(*(part.split(LENGTHS, dim=2) for part in (query, key, value)), strict=True):
        position = torch.arange(parts[0].shape[2], device=query.device)
        tokens_back = position[:, None] - position
        mask = (tokens_back >= 0) & (tokens_back < (window or len(position)))
        outputs.append(
            scaled_dot_product_attention(*parts, attn_mask=mask, scale=0.125, enable_gqa=True)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def with_gradients(function, parts, window, direction):
    parts = [part.detach().requires_grad_() for part in parts]
    output = function(*parts, window)
    gradients = torch.autograd.grad((output.float() * direction).sum(), parts)
    return [tensor.detach().float() for tensor in (output, *gradients)]


@pytest.mark.parametrize("window", [8, 64, None])
@pytest.mark.parametrize("n_kv_heads", [8, 2, 1], ids=["GQA 1", "GQA 4", "GQA 8"])
def test_attention_and_its_gradients_are_as_exact_as_documents_alone(device, n_kv_heads, window):
    parts = random_parts(device, n_kv_heads)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(1, N_TOKENS, 8, 64, generator=generator).to(device)
    reference = with_gradients(alone, [part.float() for part in parts], window, direction)
    of_packed = with_gradients(packed, parts, window, direction)
    of_alone = with_gradients(alone, parts, window, direction)
    for name, found, one_by_one, exact in zip(
        ("output", "query", "key", "value"), of_packed, of_alone, reference, strict=True
    ):
        assert (found - exact).norm() <= MORE * (one_by_one - exact).norm(), name


def test_a_float32_query_of_a_16_bit_model_goes_through_the_kernel(cuda):
    """Float32 norms or adapters give float32 queries."""
    parts = random_parts(cuda, 2)
    found = packed(*(part.float() for part in parts), 64)
    assert found.dtype == torch.float32
    assert torch.equal(found, packed(*parts, 64).float())


def test_a_long_row_needs_no_mask(cuda):
    """A mask of one byte per pair of 32,768 tokens would take 1 GiB."""
    lengths = [20_000, 12_000, 768]
    parts = [part.requires_grad_() for part in random_parts(cuda, 2, n_tokens=sum(lengths))]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed(*parts, 4096, lengths=lengths).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30


def logits_and_gradients(config, weights, dtype, name, batches, device):
    """Logits of all documents and the gradient of all parameters, each as one vector."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=dtype)
    model.load_state_dict(weights)
    model.to(device)
    logits = torch.cat([model(**batch, use_cache=False).logits[0] for batch in batches])
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(device)
    (logits.float() * direction).sum().backward()
    gradients = [parameter.grad.float().flatten() for parameter in model.parameters()]
    return logits.detach().float(), torch.cat(gradients)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_on_a_packed_row_is_as_exact_as_on_documents_alone(device, name):
    config = CONFIGS[name]
    torch.manual_seed(0)
    # Rounded first, so that both precisions begin with the same weights.
    weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    documents = [torch.randint(0, 128, (1, length), device=device) for length in LENGTHS]
    single = [{"input_ids": document} for document in documents]
    bounds = BOUNDS.to(device)
    row = {
        "input_ids": torch.cat(documents, dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS]).to(device)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }
    exact = logits_and_gradients(config, weights, torch.float32, "eager", single, device)
    one_by_one = logits_and_gradients(config, weights, torch.bfloat16, "sdpa", single, device)
    found = logits_and_gradients(
        config, weights, torch.bfloat16, attention.register(), [row], device
    )
    for what, of_packed, of_alone, expected in zip(
        ("logits", "gradients"), found, one_by_one, exact, strict=True
    ):
        assert (of_packed - expected).norm() <= MORE * (of_alone - expected).norm(), what
