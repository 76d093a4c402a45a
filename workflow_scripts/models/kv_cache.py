"""What a key-value cache takes, from a model's shape."""

from __future__ import annotations

from workflow_scripts.handover.facts import ModelShape


def kv_cache_bytes(
    facts: ModelShape, n_tokens: int, *, rolls: bool, bytes_per_value: int = 2
) -> int:
    """Keys and values of every layer for one sequence.

    Args:
        facts: of `read_shape`.
        rolls: each layer keeps no more than its window, as transformers does; llama.cpp keeps all
            of a Mistral's.
        bytes_per_value: 2 is float16, llama.cpp's default.
    """
    n_values = 2 * facts.n_kv_heads * facts.head_dim
    kept = sum(
        min(n_tokens, window) if rolls and window else n_tokens for window in facts.layer_windows
    )
    return kept * n_values * bytes_per_value
