"""Mistral 7B and a small model, and layouts."""

from tests.facts import MISTRAL_7B
from workflow_scripts.handover.training import Setup

TINY = MISTRAL_7B.changed(
    n_layers=2,
    hidden_size=256,
    intermediate_size=768,
    n_heads=8,
    n_kv_heads=2,
    head_dim=32,
    vocabulary_size=320,
    layer_windows=(None, None),
    sliding_window=None,
)


def setup_of(
    rows_per_micro_batch: int, n_checkpointed_layers: int, offloads_activations: bool
) -> Setup:
    return Setup(
        rows_per_micro_batch=rows_per_micro_batch,
        n_checkpointed_layers=n_checkpointed_layers,
        offloads_activations=offloads_activations,
    )
