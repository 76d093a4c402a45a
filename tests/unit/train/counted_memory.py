"""The model of a memory test, and a count of the bytes that its operations keep in use."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MistralConfig

from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.train import attention, projections
from workflow_scripts.train.model import adapt


def config_of(facts, *, attn_implementation=None, **options):
    """The configuration of a model with these facts; attention is ours unless another is named."""
    return MistralConfig(
        vocab_size=facts.vocabulary_size,
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        num_hidden_layers=facts.n_layers,
        num_attention_heads=facts.n_heads,
        num_key_value_heads=facts.n_kv_heads,
        head_dim=facts.head_dim,
        sliding_window=facts.sliding_window,
        tie_word_embeddings=facts.ties_embeddings,
        attn_implementation=attn_implementation or attention.register(),
        **options,
    )


def model_of(folder, facts, recipe, *, precision="nf4", fuses=True):
    base = load_model(
        folder,
        window=facts.sliding_window,
        precision=precision,
        attention=attention.register(),
        device="cpu",
    )
    model = adapt(base, facts, recipe).train()
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            vars(layer).pop("forward", None)
    if fuses and recipe.method != "full":
        projections.fuse(model)
    return model


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations created and that are still in use, and their
    peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), options=None):
        for tensor in tree_leaves((args, options)):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage(), 0)  # was there before
        result = function(*args, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def add(self, storage, size):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key):
        self.now -= self.sizes.pop(key)
