"""`datasets`: which chats, and how they are read, cleaned, rendered and shown."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from workflow_scripts.settings.fields import (
    HUB_ID,
    Count,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Settings,
)


class DemoDatasetSettings(Settings):
    """`datasets.<name>.generate`: chats about Python's standard library, made from its source."""

    n_conversations: Count = 115
    """Number of chats; `mixed` has about 300 at most, when there is a question about every
    object."""
    length: Literal["mixed", "long"] = "mixed"
    """`mixed`: the user pastes source and help texts and asks about them; four short chats for each
    one of 600 to 900 tokens. `long`: help texts pasted over several turns, with facts to recall,
    250 to 3,800 tokens. Both have a `group` for `cleaning.split_by`."""
    seed: NonNegative = 0
    """Seed of the choice and order of the questions."""


class NearDuplicateSettings(Settings):
    """`datasets.<name>.cleaning.near_duplicates`: conversations with almost the same text."""

    threshold: Annotated[Fraction, Field(ge=0.5)] = 0.8
    """Jaccard similarity of word shingles at which the later conversation is dropped."""
    shingle_words: Count = 5
    """Words per shingle."""


class DecontaminationSettings(Settings):
    """`datasets.<name>.cleaning.decontamination`: training conversations that overlap with held-out
    text."""

    threshold: Annotated[Fraction, Field(gt=0)] = 0.5
    """Share of a training conversation's n-grams in held-out text at which it is dropped."""
    ngram_words: Count = 13
    """Words per n-gram; GPT-3 used 13."""
    files: list[str] = []
    """Evaluation files to keep out of training, besides the validation and test splits, in any
    format of a dataset."""


class CleaningSettings(Settings):
    """`datasets.<name>.cleaning`: which conversations are kept, and in which split."""

    unicode: Literal["repair", "keep"] = "repair"
    """`repair` corrects mojibake, control characters and similar faults (ftfy), and normalizes to
    NFC."""
    whitespace: Literal["strip", "collapse", "keep"] = "strip"
    """`strip` removes white space at both ends of a message; `collapse` also shortens runs of
    spaces and of empty lines, in code too; `keep` changes nothing."""
    min_characters: NonNegative = 1
    """Shortest conversation kept, in characters of all its messages."""
    max_characters: Count | None = None
    """Longest conversation kept, in characters; null is no limit (`rendering` has a limit in
    tokens)."""
    languages: Annotated[list[str], Field(min_length=1)] | None = None
    """Languages kept, as ISO 639-1 codes (`[en, fr]`), identified from the text of all turns; null
    keeps all."""
    personal_data: Literal["off", "report", "redact"] = "off"
    """E-mail addresses, phone, card and account numbers, and key-like secrets: `report` counts
    them, `redact` puts `[EMAIL]`, `[PHONE]`, `[CARD]`, `[IBAN]`, `[SECRET]` in their place."""
    near_duplicates: NearDuplicateSettings | None = NearDuplicateSettings()
    """MinHash-LSH over word shingles; null keeps near duplicates. Exact duplicates are always
    dropped."""
    decontamination: DecontaminationSettings | None = DecontaminationSettings()
    """Drop training conversations that overlap with held-out text; null keeps them."""
    validation_fraction: Fraction = 0.05
    """Share held out for choices: the validation loss of training, the gates, sweeps."""
    test_fraction: Fraction = 0.05
    """Share held out for reporting: every link of the chain is scored on it, and it decides
    nothing."""
    split_by: str = "first_user_turn"
    """What decides the split of a conversation, by its hash: `first_user_turn`, or the name of a
    field of the record (`group`, `customer_id`). Conversations with an equal value are in one
    split."""
    max_rejected_fraction: Fraction = 0.1
    """Share of conversations that may be rejected before the stage fails. Duplicates and
    conversations that a source's weight leaves out do not count."""

    @model_validator(mode="after")
    def _leaves_training(self) -> CleaningSettings:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction: less than 1 is expected")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError("max_characters: at least min_characters is expected")
        return self


class RenderingSettings(Settings):
    """`datasets.<name>.rendering`: conversations as token ids."""

    supervise: Literal["all_turns", "last_turn"] = "all_turns"
    """Answers that the loss counts: `all_turns`, or only the `last_turn`; never an answer with
    `weight: 0`."""
    max_document_tokens: Count | None = None
    """Longer conversations are rejected; null keeps every length."""
    max_rejected_fraction: Fraction = 0.1
    """Share of conversations that may be rejected before the stage fails."""


class PreviewSettings(Settings):
    """`datasets.<name>.preview`: the page that shows conversations as the model will see them."""

    n_conversations: Count = 20
    """Number of conversations shown, the first of the training split."""
    max_tokens: Count = 4096
    """Largest number of tokens shown of a conversation."""


class ReadingSettings(Settings):
    """Options of how records are read as conversations, and how often training sees them."""

    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Shape of a record; `auto` recognizes each of the others by its field names."""
    columns: dict[str, str] = {}
    """Names of fields: the format's on the left, your record's on the right, as in `{messages:
    dialog, content: value}` or `{prompt: question, completion: answer}`. `reference` is the right
    answer to a chat's last question (a text, or a list of right answers), for `snakemake tasks`."""
    weight: Positive = 1.0
    """How many times an epoch sees each training conversation: 2 is twice; 0.3 keeps three in ten,
    chosen by a stable hash. Held-out splits are not weighted."""


class SourceSettings(ReadingSettings):
    """`datasets.<name>.sources.<source>`: where chats come from; exactly one of `files` and
    `hub`."""

    files: Annotated[list[str], Field(min_length=1)] | None = None
    """Files, folders or globs: JSON Lines, JSON, CSV or Parquet, also compressed (.gz, .zst); or
    URLs of files on storage (`s3://bucket/chats.jsonl`)."""
    hub: str | None = None
    """Id of a dataset on the Hugging Face Hub (`HuggingFaceH4/ultrachat_200k`)."""
    revision: str | None = None
    """Commit on the Hub. A Hub dataset needs one, so that a result can be traced back to its
    data."""
    subset: str | None = None
    """Configuration of the Hub dataset, if it has several."""
    split: str = "train"
    """Split of the Hub dataset to read. Tramontane divides it into its own splits."""

    @model_validator(mode="after")
    def _origin_is_whole(self) -> SourceSettings:
        if self.hub is None and self.revision is not None:
            raise ValueError("`revision` belongs to `hub`; files have none")
        if self.hub is not None:
            if not HUB_ID.fullmatch(self.hub):
                raise ValueError(f"`hub`: {self.hub!r} is not a Hub id (owner/name)")
            if self.revision is None:
                raise ValueError("`revision`: a Hub dataset is pinned by its commit")
        if self.origins() != 1:
            raise ValueError(f"exactly one of {self.ORIGINS} is expected")
        return self

    ORIGINS: ClassVar[str] = "`files` and `hub`"

    def origins(self) -> int:
        return sum(origin is not None for origin in (self.files, self.hub))


class DatasetSettings(SourceSettings):
    """`datasets.<name>`: which chats; exactly one of `files`, `hub`, `sources` and `generate`."""

    sources: Annotated[dict[Name, SourceSettings], Field(min_length=1)] | None = None
    """Several sources in one dataset, each with its format and weight."""
    generate: DemoDatasetSettings | None = None
    """Make the demo's chats instead of reading files."""
    cleaning: CleaningSettings = CleaningSettings()
    """Which conversations are kept, and how they are split."""
    rendering: RenderingSettings = RenderingSettings()
    """Which answers are supervised, and limits in tokens."""
    preview: PreviewSettings = PreviewSettings()
    """The page of `snakemake preview`."""

    ORIGINS: ClassVar[str] = "`files`, `hub`, `sources` and `generate`"

    def origins(self) -> int:
        return super().origins() + sum(
            origin is not None for origin in (self.sources, self.generate)
        )

    @property
    def all_sources(self) -> dict[str, SourceSettings]:
        """Sources by name. A dataset without `sources` is one source, `all`."""
        if self.sources is not None:
            return self.sources
        return {"all": self}


class CleanDatasetSettings(Settings):
    """Settings of `clean_dataset`: the cleaning table, and how each source is read."""

    cleaning: CleaningSettings = CleaningSettings()
    """`datasets.<name>.cleaning`."""
    sources: dict[Name, ReadingSettings] = {}
    """How each source is read; the defaults apply to a source that is not named."""
