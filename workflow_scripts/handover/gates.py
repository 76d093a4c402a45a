"""Measurements of the gates of the export (`check_merged`, `check_gguf`), and the base that was
chosen to merge into (`choose_merge_base`)."""

from __future__ import annotations

from typing import Literal

from workflow_scripts.handover.record import Record

MergeBase = Literal["original", "dequantized"]


class GivenMergedCheck(Record):
    """`merged_check.json`: a model that was merged elsewhere. There is no adapter to compare it
    with."""

    n_conversations: int
    """Validation conversations that were scored."""
    n_scored_tokens: int
    merged_perplexity: float


class MergedCheck(Record):
    """`merged_check.json`: a model that this workflow merged, against its base and adapter."""

    n_conversations: int
    """Validation conversations that were scored."""
    merge_base: MergeBase
    """The weights that the adapter was merged into."""
    n_tensors: int
    """Tensors that were compared with base + adapter."""
    n_adapted_tensors: int
    """Tensors that the adapter adds to."""
    rounding: str | None
    """Which numbers were rounded to the stored type, as `exact_merge.TensorResult` says it; None
    where the adapter adds to no tensor."""
    n_divergence_tokens: int
    """Tokens that the divergences are measured on."""
    kl_divergence_from_rounded_nats: float
    """Mean KL divergence of the merged model from the rounded sum of base and adapter."""
    kl_divergence_nats: float
    """Mean KL divergence of the merged model from the float32 sum."""
    max_kl_divergence_nats: float
    """Largest KL divergence of a token from the float32 sum."""
    rounding_kl_divergence_nats: tuple[float, ...]
    """Mean KL divergence of the sum rounded at random from the float32 sum, one value per seed."""
    top1_agreement_fraction: float
    """Tokens whose likeliest next one is the same as by the float32 sum."""
    n_scored_tokens: int
    """Tokens that the perplexities are measured on."""
    merged_perplexity: float
    adapter_precision: str
    """Precision of the base under the adapter that the perplexity is compared with."""
    adapter_perplexity: float
    perplexity_increase_fraction: float
    """Change of perplexity from the adapter on its base to the merged model."""
    loss_difference_nats_per_token: float
    """Loss of the merged model less that of the adapter on its base."""
    loss_difference_standard_error_nats_per_token: float | None
    """Over conversations, paired; None for a single one."""


class GgufCheck(Record):
    """`gguf_check.json`: the F16 GGUF against the merged model."""

    n_tensors: int
    """Tensors that were compared bit by bit."""
    n_metadata_keys: int
    """Keys of the metadata that were compared."""
    n_vocabulary_entries: int
    """Pieces of a SentencePiece tokenizer that were compared; 0 for tekken."""
    n_conversations_token_parity: int
    """Validation conversations that the file reads as the tokens of training."""
    n_conversations_left_out: int
    """The template renders these in its own way, or they spell a control token."""
    n_conversations_llama_cpp_misreads: int
    """These hold combining marks, where llama.cpp's split of tekken is known to differ."""
    n_scored_tokens: int
    """Tokens that the divergences are measured on."""
    kl_divergence_nats: float
    """Mean KL divergence from the merged model in float32."""
    max_kl_divergence_nats: float
    top1_agreement_fraction: float
    """Tokens whose likeliest next one is the same."""


class MergeCandidate(Record):
    """A merge into one of the bases, against the adapter on its 4-bit base."""

    perplexity: float
    kl_divergence_nats: float
    """Mean over tokens, the adapter on its base first."""
    top1_agreement_fraction: float
    """Tokens whose likeliest next one is the same."""


class MergeBaseChoice(Record):
    """`merge_base.json`: the weights to merge into, and what was measured of both."""

    merge_base: MergeBase
    n_conversations: int
    """Validation conversations that were scored."""
    n_scored_tokens: int
    adapter_perplexity: float
    """Perplexity of the adapter on its 4-bit base."""
    loss_difference_nats_per_token: float
    """Loss of the merge into the original base less that of the merge into the dequantized one."""
    loss_difference_standard_error_nats_per_token: float | None
    """Over conversations, paired; None for a single one."""
    original: MergeCandidate
    dequantized: MergeCandidate

    def candidate(self, base: MergeBase) -> MergeCandidate:
        return self.original if base == "original" else self.dequantized
