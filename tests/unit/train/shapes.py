"""Facts of models, as read_model_facts gives them."""

MISTRAL_7B = {
    "model_type": "mistral",
    "n_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 128,
    "vocabulary_size": 32768,
    "context_tokens": 32768,
    "sliding_window": 4096,
    "layer_windows": [4096] * 32,
    "n_experts": None,
    "n_experts_per_token": None,
    "ties_embeddings": False,
}
TINY = MISTRAL_7B | {
    "n_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 768,
    "n_heads": 8,
    "n_kv_heads": 2,
    "head_dim": 32,
    "vocabulary_size": 320,
    "layer_windows": [None] * 2,
    "sliding_window": None,
}
