"""Loss of a link of the chain on held-out conversations (`evaluate_perplexity`,
`evaluate_positions`)."""

from __future__ import annotations

from workflow_scripts.handover.record import LEFT_OUT, Record


class Loss(Record):
    """Mean loss of some tokens."""

    n_conversations: int
    """Conversations that the tokens are from."""
    n_scored_tokens: int
    loss_nats_per_token: float
    loss_standard_error_nats_per_token: float | None
    """Over conversations; None for a single one."""
    perplexity: float
    """e to the power of the loss."""


class Positions(Record):
    """A range of positions in a conversation; 0 is its first token."""

    first_position: int
    last_position: int
    """Last position of the range, included."""


class LossAtPositions(Loss, Positions):
    """Loss of the tokens at some positions of their conversations."""


class Turn(Record):
    """An answer of a conversation."""

    turn: int
    """Its number among the answers, from 1."""


class LossOfTurn(Loss, Turn):
    """Loss of the tokens of one turn."""


class Source(Record):
    """A source of the dataset."""

    source: str | None
    """Its name; None where it is unknown."""


class LossOfSource(Loss, Source):
    """Loss of the tokens of one source."""


class Pieces(Record):
    """A link, and the pieces that it scores."""

    piece_tokens: int
    """Length of the longest piece; it is at most the sliding window."""
    n_pieces: int
    size_bytes: int | None
    """The link's weights on the disk; None for a base that is quantized as it is loaded."""
    precision: str | None = LEFT_OUT
    """Weights and arithmetic of a checkpoint: `float32`, `nf4`…; left out for a GGUF."""


class Scores(Loss, Pieces):
    """`{link}.json`, `validation.json`: loss of one link on the test split, or of a live adapter on
    the validation split, in pieces that every link scores alike."""

    n_conversations_beyond_piece: int | None = LEFT_OUT
    """Conversations longer than a piece. Left out where whole conversations were not scored, as are
    all fields that begin with `full_length`."""
    full_length_n_conversations: int | None = LEFT_OUT
    """Whole conversations that were scored."""
    full_length_n_scored_tokens: int | None = LEFT_OUT
    full_length_loss_nats_per_token: float | None = LEFT_OUT
    full_length_loss_standard_error_nats_per_token: float | None = LEFT_OUT
    full_length_perplexity: float | None = LEFT_OUT
    by_position: tuple[LossAtPositions, ...]
    by_turn: tuple[LossOfTurn, ...]
    by_source: tuple[LossOfSource, ...]
    duration_seconds: float


class WholeConversations(Record):
    """A link that scores whole conversations."""

    precision: str
    """Weights and arithmetic: `float32`, `nf4`…"""
    sliding_window: int | None
    """Keys that a query sees; None is full causal attention."""
    n_tokens_beyond_context: int
    """Tokens that are left out because the model's context is shorter than the conversation."""


class PositionScores(Loss, WholeConversations):
    """`positions.json`: loss of a live adapter on the validation split, each conversation whole and
    alone."""

    buckets: tuple[LossAtPositions, ...]
    duration_seconds: float


class Compared(Record):
    """The two GGUFs that are compared, and on what."""

    reference: str
    """Name of the F16 GGUF's file."""
    piece_tokens: int
    n_pieces: int


class Distance(Record):
    """Distance of next-token probabilities from those of a reference, in the terms of
    `llama-perplexity --kl-divergence`."""

    n_conversations: int
    n_scored_tokens: int
    kl_divergence_nats: float
    """Mean over tokens, reference first."""
    kl_divergence_standard_error_nats: float | None
    """Over conversations, as the other standard errors are; None for a single one."""
    median_kl_divergence_nats: float
    p90_kl_divergence_nats: float
    p99_kl_divergence_nats: float
    p99_9_kl_divergence_nats: float
    max_kl_divergence_nats: float
    top1_agreement_fraction: float
    """Tokens whose likeliest next one is the same."""
    top1_agreement_standard_error_fraction: float | None
    probability_change_fraction: float
    """Probability of the token that follows in the text, less that by the reference; mean over
    tokens."""
    probability_change_standard_error_fraction: float | None
    probability_change_rms_fraction: float
    """Root mean square of that change."""
    probability_change_rms_standard_error_fraction: float | None
    """None for a single conversation, and where the change is 0."""


class Divergence(Distance, Compared):
    """`{quantization}.divergence.json`: how far a quantization is from F16."""

    n_models_in_memory: int
    """2, or 1 where memory did not hold both and they took turns."""
    duration_seconds: float
