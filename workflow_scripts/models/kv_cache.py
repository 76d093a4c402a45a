"""Size of the key-value cache, from a model's shape."""

from __future__ import annotations

from workflow_scripts.handover.facts import ModelShape


def kv_cache_bytes(
    facts: ModelShape, n_tokens: int, *, rolls: bool, bytes_per_value: int = 2
) -> int:
    """Return the bytes of all layers' keys and values for one sequence.

    Args:
        rolls: each layer keeps only its window, as in transformers; llama.cpp keeps all tokens of a
            Mistral.
        bytes_per_value: 2 is float16, llama.cpp's default.
    """
    n_values = 2 * facts.n_kv_heads * facts.head_dim
    kept = sum(
        min(n_tokens, window) if rolls and window else n_tokens for window in facts.layer_windows
    )
    return kept * n_values * bytes_per_value
