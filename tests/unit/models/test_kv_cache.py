from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.facts import MISTRAL_7B, facts_of
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.models.kv_cache import kv_cache_bytes


def test_a_7b_takes_128_kib_per_token_until_its_window_rolls():
    assert kv_cache_bytes(MISTRAL_7B, 1, rolls=False) == 128 * 1024
    assert kv_cache_bytes(MISTRAL_7B, 32_768, rolls=False) == 4 * 2**30
    assert kv_cache_bytes(MISTRAL_7B, 32_768, rolls=True) == 2**29
    assert kv_cache_bytes(MISTRAL_7B, 100, rolls=True) == 100 * 128 * 1024


def test_layers_without_a_window_keep_all():
    mixed = MISTRAL_7B.changed(layer_windows=[None, 4096])
    assert kv_cache_bytes(mixed, 8192, rolls=True) == (8192 + 4096) * 2 * 8 * 128 * 2


@pytest.mark.parametrize("n_tokens", [5, 24])
def test_it_equals_the_size_of_transformers_cache(checkpoint, n_tokens):
    model = load_model(checkpoint, window=None, precision="float32")
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(3, 3 + n_tokens)[None], past_key_values=cache, use_cache=True)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    facts = facts_of(checkpoint)
    assert kv_cache_bytes(facts, n_tokens, rolls=False, bytes_per_value=4) == held
