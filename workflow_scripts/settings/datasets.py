"""`datasets`: what is trained on, and how it is read, cleaned, rendered and shown."""

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
    """`datasets.<name>.generate`: chats about the standard library, from its own source."""

    n_conversations: Count = 115
    """How many chats; `mixed` ends at about 300, where every object has been asked about."""
    length: Literal["mixed", "long"] = "mixed"
    """`mixed`: source and help texts pasted by the user and questions about them, four short
    chats to one of 600 to 900 tokens; `long`: help texts pasted over several turns with facts
    to recall, 250 to 3,800 tokens. Both have a `group` for `cleaning.split_by`."""
    seed: NonNegative = 0
    """Which questions are asked, in which order."""


class NearDuplicateSettings(Settings):
    """`datasets.<name>.cleaning.near_duplicates`: conversations that say almost the same."""

    threshold: Annotated[Fraction, Field(ge=0.5)] = 0.8
    """Jaccard similarity of the word shingles from which the later conversation is dropped."""
    shingle_words: Count = 5
    """Words of a shingle."""


class DecontaminationSettings(Settings):
    """`datasets.<name>.cleaning.decontamination`: training rows that hold what is measured on."""

    threshold: Annotated[Fraction, Field(gt=0)] = 0.5
    """Share of a training conversation's n-grams found in held-out text from which it is
    dropped."""
    ngram_words: Count = 13
    """Words of an n-gram; 13 is GPT-3's."""
    files: list[str] = []
    """Evaluation files to keep out of training, beside the validation and test splits; any format
    that a dataset may have."""


class CleaningSettings(Settings):
    """`datasets.<name>.cleaning`: which conversations are kept, and in which split."""

    unicode: Literal["repair", "keep"] = "repair"
    """`repair` mends mojibake, control characters and the like (ftfy), and composes to NFC."""
    whitespace: Literal["strip", "collapse", "keep"] = "strip"
    """`strip` white space at both ends of a message; `collapse` also runs of blanks and of empty
    lines, code included; `keep` leaves it."""
    min_characters: NonNegative = 1
    """Shortest conversation kept, characters of all its messages."""
    max_characters: Count | None = None
    """Longest conversation kept, characters; null is no limit (`rendering` has one in tokens)."""
    languages: Annotated[list[str], Field(min_length=1)] | None = None
    """Languages kept, as ISO 639-1 codes (`[en, fr]`), judged on the text of all turns; null keeps
    every language."""
    personal_data: Literal["off", "report", "redact"] = "off"
    """E-mail addresses, phone, card and account numbers, and key-like secrets: `report` counts
    them, `redact` puts `[EMAIL]`, `[PHONE]`, `[CARD]`, `[IBAN]`, `[SECRET]` in their place."""
    near_duplicates: NearDuplicateSettings | None = NearDuplicateSettings()
    """MinHash-LSH over word shingles; null keeps near duplicates. Exact ones always go."""
    decontamination: DecontaminationSettings | None = DecontaminationSettings()
    """Removes training rows that overlap with held-out text; null keeps them."""
    validation_fraction: Fraction = 0.05
    """Share held out for choosing: watched during training, used by the gates."""
    test_fraction: Fraction = 0.05
    """Share held out for reporting: every link of the chain is scored on it, nothing is chosen
    by it."""
    split_by: str = "first_user_turn"
    """What is hashed to choose the split: `first_user_turn`, or the name of a field of the record
    (`group`, `customer_id`) whose equal values stay together."""
    max_rejected_fraction: Fraction = 0.1
    """Share of conversations that may be rejected before the stage fails; duplicates and what a
    source's weight leaves out do not count."""

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
    """Answers the loss counts: `all_turns`, or the `last_turn` alone; an answer of `weight: 0`
    never."""
    max_document_tokens: Count | None = None
    """Longer conversations are rejected; null keeps every length."""
    max_rejected_fraction: Fraction = 0.1
    """Share of conversations that may be rejected before the stage fails."""


class PreviewSettings(Settings):
    """`datasets.<name>.preview`: the page that shows conversations as the model will see them."""

    n_conversations: Count = 20
    """The first so many of the training split."""
    max_tokens: Count = 4096
    """Tokens shown of a conversation."""


class ReadingSettings(Settings):
    """How records become conversations, and how often they are trained on."""

    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Shape of a record; `auto` recognizes each of the others by its fields."""
    columns: dict[str, str] = {}
    """The format's field on the left, the record's on the right: `{messages: dialog, content:
    value}`, `{prompt: question, completion: answer}`. `reference` is the right answer to
    a chat's last question (a text, or a list of right ones), for `snakemake tasks`."""
    weight: Positive = 1.0
    """How often a training conversation is seen an epoch: 2 is twice, 0.3 keeps three in ten, by a
    stable hash. Held-out splits are not weighted."""


class SourceSettings(ReadingSettings):
    """`datasets.<name>.sources.<source>`: one origin of chats; exactly one of `files` and `hub`."""

    files: Annotated[list[str], Field(min_length=1)] | None = None
    """Files, folders or globs: JSON Lines, JSON, CSV or Parquet, also compressed (.gz, .zst); or
    URLs of files on storage (`s3://bucket/chats.jsonl`)."""
    hub: str | None = None
    """Id of a dataset on the Hugging Face Hub (`HuggingFaceH4/ultrachat_200k`)."""
    revision: str | None = None
    """Commit on the Hub; it is what a result can be traced back to, so a Hub dataset needs one."""
    subset: str | None = None
    """Configuration of the Hub dataset, where it has several."""
    split: str = "train"
    """Split of the Hub dataset to read; Tramontane makes its own splits of it."""

    @model_validator(mode="after")
    def _origin_is_whole(self) -> SourceSettings:
        if self.hub is None and self.revision is not None:
            raise ValueError("`revision` belongs to `hub`; files have none")
        if self.hub is not None:
            if not HUB_ID.fullmatch(self.hub):
                raise ValueError(f"`hub`: {self.hub!r} is no Hub id (owner/name)")
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
    """Several origins in one dataset, each with its format and weight."""
    generate: DemoDatasetSettings | None = None
    """Make the demo's chats instead of reading files."""
    cleaning: CleaningSettings = CleaningSettings()
    """What is kept, and how it is split."""
    rendering: RenderingSettings = RenderingSettings()
    """What is supervised, and limits once lengths are known in tokens."""
    preview: PreviewSettings = PreviewSettings()
    """The page of `snakemake preview`."""

    ORIGINS: ClassVar[str] = "`files`, `hub`, `sources` and `generate`"

    def origins(self) -> int:
        return super().origins() + sum(
            origin is not None for origin in (self.sources, self.generate)
        )

    @property
    def all_sources(self) -> dict[str, SourceSettings]:
        """The dataset's sources by name; a dataset that is itself a source calls it `all`."""
        if self.sources is not None:
            return self.sources
        return {"all": self}


class CleanDatasetSettings(Settings):
    """What `clean_dataset` is handed: the cleaning table, and how each source is read."""

    cleaning: CleaningSettings = CleaningSettings()
    """`datasets.<name>.cleaning`."""
    sources: dict[Name, ReadingSettings] = {}
    """By source; one that is not named here is read with the defaults."""
