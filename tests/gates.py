"""Reports of the export gates, for tests that read them."""

from __future__ import annotations

from workflow_scripts.handover.gates import (
    GgufCheck,
    MergeBaseChoice,
    MergeCandidate,
    MergedCheck,
)

MERGED_CHECK = MergedCheck(
    n_conversations=20,
    merge_base="original",
    n_tensors=21,
    n_adapted_tensors=14,
    rounding="once",
    n_divergence_tokens=2000,
    kl_divergence_from_rounded_nats=1e-8,
    kl_divergence_nats=1.25e-7,
    max_kl_divergence_nats=1e-6,
    rounding_kl_divergence_nats=(2e-4, 2.1e-4, 1.9e-4),
    top1_agreement_fraction=1.0,
    n_scored_tokens=789,
    merged_perplexity=10.3,
    adapter_precision="nf4",
    adapter_perplexity=10.0,
    perplexity_increase_fraction=0.03,
    loss_difference_nats_per_token=0.0296,
    loss_difference_standard_error_nats_per_token=0.004,
)
GGUF_CHECK = GgufCheck(
    n_tensors=21,
    n_metadata_keys=16,
    n_vocabulary_entries=32_768,
    n_conversations_token_parity=10,
    n_conversations_left_out=0,
    n_conversations_llama_cpp_misreads=0,
    n_scored_tokens=789,
    kl_divergence_nats=5.5e-9,
    max_kl_divergence_nats=1e-7,
    top1_agreement_fraction=1.0,
)
DEQUANTIZED = MergeBaseChoice(
    merge_base="dequantized",
    n_conversations=20,
    n_scored_tokens=789,
    adapter_perplexity=5.0,
    loss_difference_nats_per_token=0.0123,
    loss_difference_standard_error_nats_per_token=0.001,
    original=MergeCandidate(
        perplexity=5.125, kl_divergence_nats=0.0123, top1_agreement_fraction=0.9
    ),
    dequantized=MergeCandidate(
        perplexity=5.0625, kl_divergence_nats=0.00045, top1_agreement_fraction=0.99
    ),
)
"""A choice of the base that training saw."""
