"""Facts of a model, from its own files (`read_model_facts`)."""

from __future__ import annotations

from typing import Any, Literal, Self

from workflow_scripts.handover.record import LEFT_OUT, Record

RopeParameters = dict[str, Any]  # untyped: transformers' keys differ from one RoPE type to another


class FileFacts(Record):
    """One file of a checkpoint."""

    sha256: str | None = LEFT_OUT
    """Left out where only the size is known."""
    size_bytes: int


class RopeStretch(Record):
    """RoPE scaling of `models.<name>.rope_scaling`."""

    type: Literal["linear", "yarn", "dynamic"]
    factor: float
    """New context ÷ the context the base was trained on."""
    original_context_tokens: int
    """The context the base was trained on."""


class ModelShape(Record):
    """The shape of a model, from its config.json alone."""

    architecture: str
    """The class of transformers, `MistralForCausalLM`."""
    model_type: Literal["mistral", "mixtral", "ministral"]
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary_size: int
    """Rows of the embeddings."""
    context_tokens: int
    """Longest input that the model is made for."""
    sliding_window: int | None
    """Keys that a query sees, itself included; None is full causal attention."""
    layer_windows: tuple[int | None, ...]
    """The window of each layer. Ministral's layers differ."""
    rope_theta: float | None
    """The base of the rotary embedding; None where config.json does not say it."""
    rope_parameters: RopeParameters
    """Parameters of the positions in the form of transformers 5; empty for plain positions of an
    older config.json."""
    rope_scaling: RopeStretch | None = LEFT_OUT
    """Left out where the positions are the checkpoint's own."""
    n_experts: int | None
    """Experts of a mixture's layer; None for a dense model."""
    n_experts_per_token: int | None
    """Experts that compute a token; None for a dense model."""
    ties_embeddings: bool
    """True if the output layer is the embedding matrix."""
    dtype: str | None
    """Type of the weights, as config.json names it: `bfloat16`."""

    @property
    def served_context_tokens(self) -> int:
        """Tokens over which llama.cpp computes as the model was trained: the context, up to the
        window."""
        return min(self.context_tokens, self.sliding_window or self.context_tokens)

    @property
    def query_size(self) -> int:
        """Width of all heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.n_kv_heads * self.head_dim

    def without_window(self) -> Self:
        """The same model with full causal attention in every layer."""
        no_windows = (None,) * self.n_layers
        return self.model_copy(update={"sliding_window": None, "layer_windows": no_windows})


class Facts(ModelShape):
    """`facts.json`: shape, tokenizer and files of a checkpoint."""

    tokenizer_version: str
    """Version of Mistral's tokenizer: `v1`, `v3`, `v7`, `tekken`…"""
    files: dict[str, FileFacts]
    """config.json, the tokenizer and the weights, by name."""

    @property
    def weight_bytes(self) -> int:
        """Size of the safetensors together."""
        return sum(
            one.size_bytes for name, one in self.files.items() if name.endswith(".safetensors")
        )
