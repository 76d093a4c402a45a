"""The config, once: typed settings that validate it, document it, and parse what a stage is handed.

An attribute's docstring is the option's documentation: `config/config.schema.json` and the table in
`config/README.md` are made from it (`make schema`; a test fails when they drift). Unknown keys,
wrong types and impossible combinations raise `SettingsError` before any job runs.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from workflow_scripts import sweeps
from workflow_scripts.log import StageError

Table = TypeVar("Table", bound="Settings")


class SettingsError(StageError):
    """A config that cannot be built, with the path of the key at fault."""


class Settings(BaseModel):
    """Base of every config table: an unknown key is an error, a loaded value never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _not_a_boolean(value: object) -> object:
    # pydantic would take `true` as 1; numbers written as text ("2e-4", --config) stay welcome.
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_not_a_boolean), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(_not_a_boolean), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_not_a_boolean), Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_not_a_boolean), Field(ge=0, le=1)]
NonNegativeNumber = Annotated[
    float, BeforeValidator(_not_a_boolean), Field(ge=0, allow_inf_nan=False)
]


def _named_or_count(*names: str) -> BeforeValidator:
    """One message for the whole choice, where pydantic would have one for each of its types."""

    def check(value: object) -> object:
        if value not in names and not re.fullmatch("[1-9][0-9]*", str(value)):
            choice = ", ".join(map(repr, names))
            raise ValueError(f"found {value!r}, expected {choice} or a whole number from 1")
        return value

    return BeforeValidator(check)


def _on_off(value: object) -> object:
    # YAML reads a bare `off` as false.
    return {False: "off", True: "full"}[value] if isinstance(value, bool) else value


KvRank = Annotated[Literal["uniform", "matched"] | Count, _named_or_count("uniform", "matched")]
MicroBatchRows = Annotated[Literal["auto"] | Count, _named_or_count("auto")]
Checkpointing = Annotated[
    Literal["auto", "off", "full"] | Count,
    _named_or_count("auto", "off", "full"),
    BeforeValidator(_on_off),
]

# Names become folder names and wildcards.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]

# What llama.cpp's quantizer makes beside F16, from large to small.
QuantizationType = Literal[
    "F32", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_1", "Q4_K_M", "Q4_K_S",
    "IQ4_NL", "Q4_0", "MXFP4_MOE", "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S",
    "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "Q2_0", "IQ2_XXS", "TQ2_0",
    "IQ1_M", "TQ1_0", "IQ1_S", "Q1_0",
]  # fmt: skip
# What a single tensor may be.
TensorType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "IQ4_NL", "Q4_0",
    "MXFP4", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "Q2_0", "IQ2_XXS",
    "TQ2_0", "IQ1_M", "TQ1_0", "IQ1_S", "Q1_0",
]  # fmt: skip
# Those that llama.cpp's quantizer refuses to make without an importance matrix: the first as a
# whole (they hold tensors of the second). Source: `tensor_requires_imatrix` in llama-quant.cpp.
NEED_IMATRIX = frozenset(
    {"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
)
TENSORS_NEED_IMATRIX = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
# Made the same with one as without; the tensor types among them too. Source: ggml-quants.c.
IGNORE_IMATRIX = frozenset(
    {"F32", "F16", "BF16", "Q8_0", "MXFP4_MOE", "MXFP4", "TQ2_0", "TQ1_0", "Q2_0", "Q1_0"}
)


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_local(source: str) -> bool:
    """Whether a source is a folder, not an id of the Hub."""
    return source.startswith((".", "/", "~"))


class DemoModelSettings(Settings):
    """`models.<name>.generate`: a small Mistral, pre-trained on the spot."""

    n_layers: Count = 4
    """Transformer layers."""
    hidden_size: Annotated[Count, Field(multiple_of=256)] = 256
    """Width; k-quants need a multiple of 256. Always 8 query and 2 key/value heads."""
    intermediate_size: Annotated[Count, Field(multiple_of=256)] = 1024
    """Width of the feed-forward layer, a multiple of 256."""
    sliding_window: Count | None = 512
    """Keys a query sees, itself included; null is full causal attention."""
    context_tokens: Count = 4096
    """Longest input the model is advertised for, tokens."""
    n_pretraining_steps: Count = 280
    """Steps of 1,024 tokens; 280 take two to three minutes on 2 CPU cores."""
    learning_rate: Positive = 0.02
    """Peak of the pre-training schedule (Muon's)."""
    seed: NonNegative = 0
    """Initial weights and order of the text."""


class RopeScalingSettings(Settings):
    """`models.<name>.rope_scaling`: positions stretched, for a longer context than the base's."""

    type: Literal["linear", "yarn", "dynamic"] = "yarn"
    """`linear` (arXiv:2306.15595), `yarn` (arXiv:2309.00071), or `dynamic` NTK, which GGUF has no
    form of: a run with it ends before `export`."""
    factor: Annotated[Positive, Field(gt=1)]
    """New context ÷ the context the base was trained on."""
    original_context_tokens: Count | None = None
    """Context the base was trained on; null is what its config.json says."""


class ModelSettings(Settings):
    """`models.<name>`: where a base model comes from; exactly one of `source` and `generate`."""

    source: str | None = None
    """Hugging Face Hub id (`mistralai/Mistral-7B-v0.3`) or a local folder (absolute, or
    beginning with `.` or `~`)."""
    revision: str | None = None
    """Commit, tag or branch on the Hub; a commit is the only one that cannot move."""
    generate: DemoModelSettings | None = None
    """Build the demo's model instead of fetching one."""
    tokenizer_version: Literal["v1", "v2", "v3", "v7", "tekken"] | None = None
    """Version of the tokenizer and of the chat format; null reads it from the checkpoint's own
    files."""
    rope_scaling: RopeScalingSettings | None = None
    """Stretch RoPE for a longer context; null keeps the checkpoint's own."""
    license: str | None = None
    """Licence of the base model by the Hub's name (`apache-2.0`), for the model card."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSettings:
        if (self.source is None) == (self.generate is None):
            raise ValueError("exactly one of `source` and `generate` is expected")
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


class DemoDatasetSettings(Settings):
    """`datasets.<name>.generate`: chats about the standard library, from its own docstrings."""

    n_conversations: Count = 3000
    """How many chats."""
    length: Literal["mixed", "long"] = "mixed"
    """`mixed`: most of 20 to 200 tokens, a few of up to 3,000; `long`: help texts pasted over
    several turns with facts to recall, 250 to 3,800 tokens, grouped by the texts they hold."""
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
    value}`, `{prompt: question, completion: answer}`."""
    weight: Positive = 1.0
    """How often a training conversation is seen an epoch: 2 is twice, 0.3 keeps three in ten, by a
    stable hash. Held-out splits are not weighted."""


class SourceSettings(ReadingSettings):
    """`datasets.<name>.sources.<source>`: one origin of chats; exactly one of `files` and `hub`."""

    files: Annotated[list[str], Field(min_length=1)] | None = None
    """Files, folders or globs: JSON Lines, JSON, CSV or Parquet, also compressed (.gz, .zst)."""
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


class PackingSettings(Settings):
    """`packings.<name>`: how documents share a row of training."""

    strategy: Literal["best_fit", "concatenate", "none"] = "best_fit"
    """`best_fit` keeps documents whole and apart; `concatenate` cuts wherever a row ends, and
    attention crosses documents; `none` has one document a row, and pads those of a micro-batch,
    grouped by length, to the longest."""
    row_tokens: Annotated[Count, Field(ge=16, le=131_072)] = 4096
    """Length of a row of training, tokens."""
    long_documents: Literal["split", "truncate", "drop", "error"] = "split"
    """What becomes of a document longer than a row (`concatenate` cuts every document alike):
    `split` cuts it between turns, else sentences, else tokens; `truncate` keeps its beginning;
    `error` stops."""
    overlap_tokens: Count | None = None
    """Context that a later piece of a split document carries over, seen and not learned again;
    null is a sixteenth of a row."""
    seed: NonNegative = 0
    """Which equally long documents share a row, and the order of the rows."""

    @property
    def context_tokens(self) -> int:
        """`overlap_tokens`, its default filled in."""
        return self.overlap_tokens or self.row_tokens // 16

    @model_validator(mode="after")
    def _leaves_room(self) -> PackingSettings:
        if self.context_tokens > self.row_tokens // 2:
            raise ValueError(
                f"overlap_tokens: found {self.overlap_tokens}, expected at most half of"
                f" row_tokens ({self.row_tokens // 2})"
            )
        return self


class RecipeSettings(Settings):
    """`recipes.<name>`: what is trained and how it learns; all that decides the result."""

    method: Literal["qlora", "lora_int8", "lora", "full"] = "qlora"
    """`qlora`: LoRA on the base in 4 bits (NF4, double quantization); `lora_int8`: in 8 bits;
    `lora`: in 16 bits; `full`: no adapter, every weight trains (small models)."""
    rank: Count = 32
    """LoRA rank."""
    alpha: Positive = 64
    """LoRA alpha; the adapter's scale is alpha ÷ rank (rsLoRA: ÷ √rank), the same for every
    module."""
    kv_rank: KvRank = "uniform"
    """Rank of k and v: `uniform` as the rest, `matched` rank × kv heads ÷ heads (the same
    budget a head), or a number."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Modules that get an adapter: every linear layer, or a list (`[q_proj, v_proj]`)."""
    adapts_experts: bool = False
    """A mixture's experts get adapters as well; without, its attention alone is adapted."""
    trains_router: bool = False
    """A mixture's router trains too, as a whole; frozen otherwise."""
    router_loss_coefficient: NonNegativeNumber = 0.0
    """Weight of the mixture's load-balancing loss, beside the loss of the tokens; 0 leaves it
    out."""
    modules_to_save: list[Literal["embed_tokens", "lm_head"]] = []
    """Layers that train whole beside the adapter, for embeddings of new tokens; kept in
    float32."""
    dora: bool = False
    """DoRA (arXiv:2402.09353): direction by LoRA, magnitude by a vector of its own; slower."""
    rslora: bool = False
    """rsLoRA (arXiv:2312.03732): scale alpha ÷ √rank, for high ranks."""
    loraplus_ratio: Annotated[Positive, Field(ge=1)] | None = None
    """LoRA+ (arXiv:2402.12354): learning rate of B ÷ that of A; null is the same for both."""
    dropout: Annotated[Fraction, Field(lt=1)] = 0.0
    """LoRA dropout; above 0 costs two thirds more activation memory."""
    neftune_alpha: Positive | None = None
    """NEFTune (arXiv:2310.05914): noise on the embeddings of training, 5 in the paper; null is
    none."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_paged_8bit", "adafactor"] = "adamw"
    """AdamW (fused), with 8-bit state, with 8-bit state paged to the CPU (bitsandbytes), or
    Adafactor."""
    adam_beta2: Annotated[Fraction, Field(gt=0, lt=1)] = 0.999
    """AdamW's decay of the second moment."""
    learning_rate: Positive = 1.4e-4
    """Peak of the schedule."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after warm-up; `wsd` is warm-up, stable, decay (arXiv:2404.06395)."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    decay_fraction: Fraction = 0.1
    """`wsd`: share of the steps, at the end, in which the learning rate falls to 0."""
    weight_decay: NonNegativeNumber = 0.0
    """Decoupled weight decay, on what trains."""
    max_gradient_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    epochs: Positive = 1.0
    """Passes over the packed rows."""
    max_steps: Count | None = None
    """Stop after so many optimizer steps, whatever `epochs` says; null is no limit."""
    rows_per_step: Count = 8
    """Rows of one optimizer step, over all micro-batches and GPUs. How many micro-batches share
    them changes nothing but rounding; several GPUs take rows of like cost, so that which rows share
    a step may differ."""
    evaluations: NonNegative = 2
    """How often the validation loss is taken during training, evenly spaced; 0 is never."""
    validation_conversations: Count | None = 1000
    """Conversations it is taken on, the first of the split's order; null is all."""
    keeps_best: bool = True
    """The weights of the lowest validation loss are the result; false takes the last ones."""
    early_stopping: Count | None = None
    """Stop after so many evaluations in a row without a lower validation loss; null is never."""
    seed: NonNegative = 0
    """Adapter's initial weights, order of the rows, noise."""
    sweep: bool = False
    """Every value given as a list stands for a run each: `learning_rate: [1e-4, 2e-4]`
    (`snakemake sweep`)."""

    @model_validator(mode="after")
    def _fits_together(self) -> RecipeSettings:
        adapter_only = ("dora", "rslora", "loraplus_ratio", "modules_to_save", "adapts_experts")
        if self.method == "full":
            for key in adapter_only:
                if getattr(self, key):
                    raise ValueError(f"{key}: `method: full` has no adapter")
        if self.adapts_experts and (self.dora or self.dropout):
            raise ValueError("adapts_experts: experts take neither `dora` nor `dropout`")
        if self.early_stopping is not None and self.evaluations <= self.early_stopping:
            raise ValueError(
                f"early_stopping: found {self.early_stopping}, which {self.evaluations} evaluations"
                " never reach; raise `evaluations`"
            )
        if self.warmup_fraction + self.decay_fraction > 1 and self.schedule == "wsd":
            raise ValueError("warmup_fraction + decay_fraction: at most 1 is expected")
        return self


class TrainingSettings(Settings):
    """`training`: how training runs on your machine. It changes speed and memory, nothing that is
    learned but rounding, so a change here re-runs no step."""

    rows_per_micro_batch: MicroBatchRows = "auto"
    """Rows of one forward and backward pass on each GPU; `auto` takes what fits and is fastest
    (`plan_memory`)."""
    gradient_checkpointing: Checkpointing = "auto"
    """Recompute activations in the backward pass, for less memory and up to half more time: of no
    layer, of every layer, or of so many, evenly spread; `auto` as few as memory allows."""
    offload_activations: Literal["auto"] | bool = "auto"
    """Keep what checkpointing saves in the CPU's memory: for very long rows; `auto` where nothing
    else fits."""
    kernels: Literal["auto", "liger", "torch"] = "auto"
    """Kernels of RoPE, RMSNorm and SwiGLU: Liger's (Triton) or PyTorch's; `auto` is Liger's on a
    CUDA GPU where `liger-kernel` is installed."""
    memory_gb: Positive | None = None
    """GPU memory the planner may count on, GB (10⁹ bytes); null is what is free when training
    starts."""
    gpus: Count = 1
    """GPUs of a training job on each node; needs `rows_per_step` to be a multiple of all of
    them."""
    nodes: Count = 1
    """Nodes of a training job, under Slurm."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """Several GPUs: `ddp`, the model on each of them; `fsdp2`, its weights shared out."""
    checkpoint_steps: Count = 100
    """Optimizer steps between resumable checkpoints."""
    checkpoints_kept: Count = 2
    """Newest resumable checkpoints kept."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where curves go while training: TensorBoard (`logs/runs/<run>/tensorboard`), Weights &
    Biases, MLflow."""
    tracker_project: str = "tramontane"
    """Project or experiment that the tracker files the runs under."""


class RunSettings(Settings):
    """`runs.<name>`: model × dataset × packing × recipe, each the name of an entry above. A run
    with an `adapter` or a `merged` model of yours is not trained, but exported and measured."""

    model: str
    """Name of an entry of `models`; of an adapter or merged model, the base that it was made of."""
    dataset: str
    """Name of an entry of `datasets`; what is not trained is calibrated, gated and scored on it."""
    packing: str | None = None
    """Name of an entry of `packings`; training needs one."""
    recipe: str | None = None
    """Name of an entry of `recipes`; training needs one."""
    adapter: str | None = None
    """An adapter that is there already: a folder (absolute, or beginning with `.` or `~`) or a Hub
    id."""
    merged: str | None = None
    """A fine-tuned model that is there already, whole: a folder or a Hub id."""
    revision: str | None = None
    """Commit, tag or branch of an `adapter` or `merged` model on the Hub."""
    precision: Literal["native", "int8", "nf4"] = "native"
    """How the base of an `adapter` was loaded when it was trained: in its own 16 bits, in 8 bits,
    or in 4 (QLoRA)."""
    merge_base: Literal["original", "dequantized", "auto"] = "original"
    """What an adapter of `method: qlora`, or of `precision: nf4`, is merged into: the `original`
    16-bit weights; the 4-bit ones it was trained against, `dequantized`; `auto` measures both on
    validation text and keeps the better (`choose_merge_base`)."""

    @model_validator(mode="after")
    def _one_beginning(self) -> RunSettings:
        given = self.adapter or self.merged
        needed = ("packing", "recipe")
        if self.adapter and self.merged:
            raise ValueError("found both `adapter` and `merged`, expected one of them")
        if given is None:
            missing = [key for key in needed if getattr(self, key) is None]
            if missing:
                raise ValueError("\n".join(f"{key}: missing" for key in missing))
        elif any(getattr(self, key) is not None for key in needed):
            key = "adapter" if self.adapter else "merged"
            raise ValueError(f"found `packing` or `recipe` beside `{key}`: nothing is trained")
        elif not (is_local(given) or HUB_ID.fullmatch(given)):
            raise ValueError(f"{given!r} is neither a Hub id (owner/name) nor a folder (./name)")
        if self.revision and (given is None or is_local(given)):
            raise ValueError("`revision` belongs to an adapter or merged model on the Hub")
        if self.precision != "native" and not self.adapter:
            raise ValueError("`precision` belongs to an `adapter`; a recipe's is its `method`")
        if self.merged and self.merge_base != "original":
            raise ValueError("`merge_base`: a merged model is not merged again")
        return self

    @property
    def is_trained(self) -> bool:
        """Whether the run makes its adapter itself."""
        return self.recipe is not None


class ImatrixSettings(Settings):
    """`gguf.imatrix`: the importance matrix, by which a quantization spends its bits."""

    use: Literal["always", "auto", "never"] = "always"
    """`always`: for every quantization it can change; `auto`: for those that cannot be made without
    one; `never`: for none, and such types are refused."""
    n_tokens: Count = 51_200
    """Tokens it is computed on: of the training split's chats, and as many of each file. 100 chunks
    of 512 are llama.cpp's practice."""
    files: list[str] = []
    """Text files to compute it on as well."""


class MixSettings(Settings):
    """`gguf.mixes.<name>`: a quantization with tensors of other types, built where `quantizations`
    names it."""

    type: QuantizationType
    """Type of what the other keys leave."""
    output: TensorType | None = None
    """Type of the output layer; null is what llama.cpp takes for `type`."""
    token_embd: TensorType | None = None
    """Type of the token embeddings; null is what llama.cpp takes for `type`."""
    tensors: dict[str, TensorType] = {}
    """Types of tensors by a regular expression found in their names: `{attn_v: Q8_0,
    'blk\\.[01]\\.ffn_down': Q6_K}`; the first that is found counts."""

    @model_validator(mode="after")
    def _can_be_made(self) -> MixSettings:
        for key in ("output", "token_embd"):
            found = getattr(self, key)
            # Neither is a product that an importance matrix is taken of.
            if found in TENSORS_NEED_IMATRIX:
                raise ValueError(f"{key}: {found} needs an importance matrix, which it has not")
        if self.tensors and self.type in ("F32", "BF16"):
            raise ValueError(f"tensors: llama.cpp takes none beside `type: {self.type}`")
        for pattern in self.tensors:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"tensors: {pattern!r} is no regular expression: {error}"
                ) from None
        return self

    @property
    def needs_imatrix(self) -> bool:
        """llama.cpp does not make it without one."""
        return self.type in NEED_IMATRIX or not TENSORS_NEED_IMATRIX.isdisjoint(
            self.tensors.values()
        )

    @property
    def takes_imatrix(self) -> bool:
        """It is another with one than without."""
        return not IGNORE_IMATRIX.issuperset({self.type, *self.tensors.values()})


def _is_made(name: object, info: ValidationInfo) -> object:
    """A name of `gguf.quantizations`: a type, or a mix."""
    mixes, imatrix = info.data.get("mixes"), info.data.get("imatrix")
    if mixes is None or imatrix is None:  # they have errors of their own
        return name
    known = [*get_args(QuantizationType), *mixes]
    if name not in known:
        raise ValueError(
            f"found {name!r}, expected a type of llama.cpp's or an entry of gguf.mixes"
            f" ({_did_you_mean(str(name), known)})"
        )
    mix = mixes.get(name) or MixSettings(type=name)
    if imatrix.use == "never" and mix.needs_imatrix:
        raise ValueError(
            f"found {name!r}, which llama.cpp makes with an importance matrix only;"
            " set gguf.imatrix.use: auto"
        )
    return name


Quantization = Annotated[QuantizationType | Name, BeforeValidator(_is_made)]


class GgufSettings(Settings):
    """`gguf`: what is made of the merged model."""

    # First, as `quantizations` is checked by them.
    mixes: dict[Name, MixSettings] = {}
    """Quantizations of your own, by name: `{Q4_K_L: {type: Q4_K_M, output: Q8_0, token_embd:
    Q8_0}}`."""
    imatrix: ImatrixSettings = ImatrixSettings()
    """The importance matrix of the quantizations."""
    quantizations: Annotated[list[Quantization], Field(min_length=1)] = ["Q8_0", "Q4_K_M"]
    """llama.cpp quantization types, and names of `mixes`; F16 is always made, it is their
    source."""
    quantized_by: str | None = None
    """User or organization that files and model card name as their maker."""

    @model_validator(mode="after")
    def _each_is_one(self) -> GgufSettings:
        if len(set(self.quantizations)) != len(self.quantizations):
            raise ValueError("quantizations: a type stands twice")
        # Types, and the other links of the chain, whose files lie in the same folder.
        taken = {"F16", "adapter", "merged", "awq", *get_args(QuantizationType)} & self.mixes.keys()
        if taken:
            raise ValueError(f"mixes: the name {min(taken)!r} is taken; choose another")
        return self

    def mix(self, name: str) -> MixSettings:
        """What a quantization is made of: the mix of that name, or the type."""
        return self.mixes.get(name) or MixSettings(type=name)

    def uses_imatrix(self, name: str) -> bool:
        """Whether a quantization is made with the importance matrix."""
        mix = self.mix(name)
        return mix.needs_imatrix or (self.imatrix.use == "always" and mix.takes_imatrix)


class RetentionSettings(Settings):
    """`retention`: what large intermediates stay once nothing needs them any more. One that went is
    made again when something new asks for it; figures, adapters and releases always stay."""

    merged: bool = True
    """Merged models in 16 bits (of a 7B 14.5 GB each)."""
    f16: bool = True
    """F16 GGUFs (as large), which are then in no release either."""


class AwqSettings(Settings):
    """`awq`: the merged model in AWQ's 4 bits as well, for engines that serve such a folder (vLLM,
    SGLang)."""

    use: bool = False
    """Make it, for every run in `build`, and score it along the chain."""
    group_size: Literal[32, 64, 128] = 128
    """Weights that share a scale and a zero; fewer are more precise, and more bytes."""
    n_tokens: Count = 65_536
    """Tokens of the training split's chats that it is calibrated on; 128 times 512 is AWQ's
    practice."""
    sequence_tokens: Count = 512
    """Longest piece of a chat to calibrate on, tokens; never longer than the window."""


class PushSettings(Settings):
    """`push`: releases on the Hugging Face Hub (`snakemake push_release`)."""

    owner: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """User or organization whose `owner/<run>-GGUF` a run's release goes to."""
    private: bool = True
    """A repository that is made for a release is private."""
    dry_run: bool = True
    """Say what would be uploaded, and upload nothing."""


class GateSettings(Settings):
    """`evaluation.gates`: what a hand-over may differ by before the chain stops."""

    merge_kl_divergence_nats: Positive = 1e-5
    """Merged model against the same base with the adapter applied live, mean a token."""
    merge_perplexity_increase_fraction: Fraction = 0.005
    """Merged model against the run as it was trained (its base in 4, 8 or 16 bits); better is
    always accepted."""
    gguf_kl_divergence_nats: Positive = 1e-5
    """F16 GGUF against the merged model, mean a token, within the window."""
    n_conversations: Count = 20
    """Validation conversations the gates score."""
    parity_conversations: Count | None = 1000
    """Conversations whose tokens are compared with mistral-common's, with those of the tokenizer
    that ships and, at export, with the GGUF's own; null is all."""


class InferenceSettings(Settings):
    """`evaluation.inference`: how speed is measured, in llama-bench's terms."""

    prompt_tokens: Count = 512
    """Prompt processing, `pp512`."""
    generated_tokens: Count = 64
    """Decoding, `tg64`."""
    repetitions: Count = 3
    """Measured passes after one to warm up; mean and standard deviation are kept."""
    depths_tokens: Annotated[list[NonNegative], Field(min_length=1)] = [0]
    """Tokens of context before each pass, llama-bench's `-d`; those that leave no room in the
    context are passed over. Tables show the first."""


class RecallSettings(Settings):
    """`evaluation.recall`: facts to be found in prompts of held-out text (`snakemake
    experiment`)."""

    lengths_tokens: Annotated[list[Count], Field(min_length=1)] | None = None
    """Lengths of the prompts with their answers, tokens; null is a quarter, a half, one, two and
    four windows (a sixteenth to the whole of the context of a model without one)."""
    depths: Annotated[list[Fraction], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Where in the text the fact stands: 0 is its beginning, 1 just before the question."""
    n_prompts: Count = 20
    """Prompts of each length and depth."""
    seed: NonNegative = 0
    """Which texts and facts."""


class ContextSettings(Settings):
    """`evaluation.context`: how much of the context is usable (`snakemake context`)."""

    tasks: Annotated[
        list[Literal["single", "multi_key", "variable_tracing"]], Field(min_length=1)
    ] = ["single", "multi_key", "variable_tracing"]
    """After RULER: a fact in the text, one among others like it, a chain of variables."""
    lengths_tokens: Annotated[list[Count], Field(min_length=1)] | None = None
    """Lengths of the prompts with their answers, tokens; null doubles from 1/64 of the context to
    the whole."""
    depths: Annotated[list[Fraction], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Where in the text the fact stands."""
    n_prompts: Count = 10
    """Prompts of each task, length and depth."""
    files: list[str] = []
    """Text files that the prompts are filled with; none is Python's own documentation."""
    short_tokens: Count = 2048
    """Context against which the whole is held: what does a test conversation gain by the rest?"""
    seed: NonNegative = 0
    """Which texts and facts."""


class SampleSettings(Settings):
    """`evaluation.samples`: answers to be read (`snakemake samples`)."""

    n_prompts: Count = 5
    """Prompts, the first of the test split that fit."""
    max_tokens: Count = 128
    """Longest answer, tokens."""


class EvaluationSettings(Settings):
    """`evaluation`: what is measured, on how much."""

    piece_tokens: Annotated[Count, Field(ge=16)] | None = None
    """Longest piece scored along the chain, tokens; null is the sliding window, else the
    context."""
    max_conversations: Count | None = None
    """Conversations scored, the first of the split's order (`test` along the chain, `validation`
    by position); null is all."""
    texts: dict[Name, str] = {}
    """Text files that the links are scored on as llama-perplexity scores them, by name:
    `{wikitext: data/wiki.test.raw}`."""
    text_context_tokens: Annotated[Count, Field(ge=16)] = 512
    """Length of the chunks of `texts`, whose second half is scored; llama-perplexity's `-c`."""
    gates: GateSettings = GateSettings()
    """Thresholds of the gates."""
    inference: InferenceSettings = InferenceSettings()
    """Speed and memory."""
    recall: RecallSettings = RecallSettings()
    """Facts found again."""
    context: ContextSettings = ContextSettings()
    """Usable context."""
    samples: SampleSettings = SampleSettings()
    """Answers to be read."""


class Config(Settings):
    """The whole config: four tables, the runs that combine them, and what to build."""

    models: dict[Name, ModelSettings]
    """Base models by name."""
    datasets: dict[Name, DatasetSettings]
    """Chat datasets by name."""
    packings: dict[Name, PackingSettings]
    """Packing policies by name."""
    recipes: dict[Name, RecipeSettings]
    """Training recipes by name."""
    runs: dict[Name, RunSettings]
    """A run trains one model on one dataset with one packing and one recipe."""
    training: TrainingSettings = TrainingSettings()
    """How training runs on this machine."""
    build: Annotated[list[str], Field(min_length=1)]
    """Names of the runs to build; in an overlay this list replaces the one before."""
    gguf: GgufSettings = GgufSettings()
    """GGUF files."""
    retention: RetentionSettings = RetentionSettings()
    """Large intermediates."""
    awq: AwqSettings = AwqSettings()
    """AWQ, beside the GGUFs."""
    push: PushSettings = PushSettings()
    """Releases on the Hub."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Measurements and gates."""
    max_steps: Count | None = None
    """Smoke setting: no training, the demo's pre-training included, takes more steps; null is
    no limit."""

    @model_validator(mode="after")
    def _names_exist(self) -> Config:
        problems = []
        for run_name, run in self.runs.items():
            for field, table in RUN_TABLES.items():
                entry, known = getattr(run, field), getattr(self, table)
                if entry is not None and entry not in known:
                    problems.append(
                        f"runs.{run_name}.{field}: found {entry!r}, which is not in `{table}`"
                        f" ({_did_you_mean(entry, known)})"
                    )
        for run_name in self.build:
            if run_name not in self.runs:
                problems.append(
                    f"build: found {run_name!r}, which is not in `runs`"
                    f" ({_did_you_mean(run_name, self.runs)})"
                )
        if len(set(self.build)) != len(self.build):
            problems.append("build: a run stands twice")
        for run_name in self.build:
            run = self.runs.get(run_name)
            if run and run.merge_base != "original" and self._trained_in(run) != "nf4":
                reason = (
                    f"recipes.{run.recipe}.method is {self.recipes[run.recipe].method!r}, whose"
                    if run.recipe in self.recipes
                    else f"runs.{run_name}.precision is {run.precision!r}: its"
                )
                problems.append(
                    f"runs.{run_name}.merge_base: found {run.merge_base!r}, expected 'original':"
                    f" {reason} base has no 4-bit weights"
                )
            packing = run and self.packings.get(run.packing or "")
            model = run and self.models.get(run.model)
            if packing and model and model.generate:
                context, scaling = model.generate.context_tokens, model.rope_scaling
                if scaling:
                    context = int((scaling.original_context_tokens or context) * scaling.factor)
                if packing.row_tokens > context:
                    problems.append(
                        f"packings.{run.packing}.row_tokens: found {packing.row_tokens}, expected"
                        f" at most models.{run.model}.generate.context_tokens"
                        f"{' × rope_scaling.factor' if scaling else ''} ({context})"
                    )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def trained_precision(self, run_name: str) -> str:
        """How a run's base was loaded for training: `native` (16 bits), `int8` or `nf4`."""
        return self._trained_in(self.runs[run_name])

    def _trained_in(self, run: RunSettings) -> str:
        recipe = self.recipes.get(run.recipe or "")
        if recipe is None:
            return run.precision
        return {"qlora": "nf4", "lora_int8": "int8"}.get(recipe.method, "native")

    def entry(self, table: str, name: str) -> Settings:
        """An entry of one of the four tables, the smoke setting applied.

        Args:
            table: `models`, `datasets`, `packings` or `recipes`.
        Raises:
            KeyError: the table has no such name.
        """
        entry = getattr(self, table)[name]
        if self.max_steps is None:
            return entry
        if isinstance(entry, RecipeSettings):
            limit = min(self.max_steps, entry.max_steps or self.max_steps)
            return entry.model_copy(update={"max_steps": limit})
        if isinstance(entry, ModelSettings) and entry.generate is not None:
            limit = min(self.max_steps, entry.generate.n_pretraining_steps)
            generate = entry.generate.model_copy(update={"n_pretraining_steps": limit})
            return entry.model_copy(update={"generate": generate})
        return entry


RUN_TABLES = {"model": "models", "dataset": "datasets", "packing": "packings", "recipe": "recipes"}


def load_config(config: Mapping[str, Any]) -> Config:
    """Validate a whole config, its sweeps expanded into the recipes and runs they stand for.

    Raises:
        SettingsError: one message that lists every problem by its key's path.
    """
    what = "the config cannot be built"
    expanded = sweeps.expand(config)
    if expanded.problems:
        raise SettingsError("\n  ".join([what, *expanded.problems]))
    return _validated(Config, expanded.config, what, expanded.recipes)


def settings_from_json(table: type[Table], text: str) -> Table:
    """Parse the `--settings` a stage is handed.

    Raises:
        SettingsError: the text is not JSON, or does not fit `table`.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError("--settings is not JSON", found=text, to_fix=str(error)) from error
    return _validated(table, content, "--settings cannot be used")


def _validated(
    table: type[Table],
    content: object,
    what: str,
    swept: Mapping[str, sweeps.Combination] = MappingProxyType({}),
) -> Table:
    try:
        return table.model_validate(content)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _describe(table, problem, swept)]
        # A value of a sweep is in many recipes, and wrong once.
        raise SettingsError("\n  ".join([what, *dict.fromkeys(lines)])) from error


# What pydantic puts into a path that is no key of ours: types of a choice, `[key]` of a table.
_NO_KEY = re.compile(r"constrained-str|\[key\]|(literal|list|dict)\[.*\]")


def _written_path(
    location: Sequence[int | str], swept: Mapping[str, sweeps.Combination]
) -> tuple[int | str, ...]:
    """Where a value stands in the config as written: `recipes.lora.rank[1]`."""
    match tuple(location):
        case ("recipes", str(name), str(key), *rest) if name in swept:
            combination = swept[name]
            is_one = key in combination.places and key in RecipeSettings.model_fields
            place = f"[{combination.places[key]}]" if is_one else ""
            return "recipes", combination.recipe, f"{key}{place}", *rest
        case path:
            return path


def _describe(
    table: type[Settings],
    problem: Mapping[str, Any],
    swept: Mapping[str, sweeps.Combination],
) -> Iterator[str]:
    """One line or more a problem: the key's path, what was found, what would be right."""
    path = ".".join(
        str(part)
        for part in _written_path(problem["loc"], swept)
        if not _NO_KEY.fullmatch(str(part))
    )
    path = path or "top level"
    found = problem["input"]
    lines = _explain(table, problem, path)
    if isinstance(found, list) and found and problem["loc"][:1] == ("recipes",):
        name = problem["loc"][1]
        if len(problem["loc"]) > 2 and name not in swept:
            lines = (
                f"{line}; for a run of each value set recipes.{name}.sweep: true" for line in lines
            )
    yield from lines


def _explain(table: type[Settings], problem: Mapping[str, Any], path: str) -> Iterator[str]:
    found = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            known = _keys_beside(table, problem["loc"])
            yield f"{path}: unknown key ({_did_you_mean(str(problem['loc'][-1]), known)})"
        case "missing":
            yield f"{path}: missing"
        case "value_error":
            for line in str(problem["ctx"]["error"]).splitlines():
                # A validator of the whole config writes its own paths.
                yield line if path == "top level" else f"{path}: {line}"
        case "literal_error":
            expected = problem["ctx"]["expected"]
            known = [part.strip("'") for part in expected.replace(" or ", ", ").split(", ")]
            remedy = _did_you_mean(str(found), known)
            yield f"{path}: found {found!r}, expected {expected} ({remedy})"
        case _:
            yield f"{path}: found {found!r}; {problem['msg']}"


def _keys_beside(table: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that would have been known where `location` points to an unknown one."""
    current: Any = table
    for part in location[:-1]:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[str(part)].annotation
        else:  # dict[Name, Table] and Optional: the table is the argument that is a model
            current = _model_within(current)
            continue
        if _model_within(current) is not None and not _is_mapping(current):
            current = _model_within(current)
    model = _model_within(current)
    return list(model.model_fields) if model else []


def _is_mapping(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict


def _model_within(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = (_model_within(argument) for argument in get_args(annotation))
    return next((model for model in models if model is not None), None)


def _did_you_mean(found: str, known: Any) -> str:
    close = difflib.get_close_matches(found, list(known), n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(map(str, known)) or 'none'}"


def config_schema() -> dict[str, Any]:
    """The JSON schema that editors complete and check `config/*.yaml` with."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Tramontane config"
    # An overlay holds only what it changes.
    schema.pop("required", None)
    # A sweep has lists of values; which of them are right is found out by expanding it.
    recipe = schema["$defs"]["RecipeSettings"]["properties"]
    for key in recipe.keys() - {"sweep"}:
        recipe[key] = _value_or_list(recipe[key])
    return schema


def _value_or_list(value: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an option, or of a list of its values."""
    about = {key: value[key] for key in ("title", "description", "default") if key in value}
    one = {key: part for key, part in value.items() if key not in about}
    return about | {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


def option_tables() -> str:
    """Markdown: every option with its meaning, unit and default, a table a settings class."""
    sections = []
    for table in (
        Config, ModelSettings, RopeScalingSettings, DemoModelSettings, DatasetSettings,
        SourceSettings, DemoDatasetSettings, CleaningSettings, NearDuplicateSettings,
        DecontaminationSettings, RenderingSettings, PreviewSettings, PackingSettings,
        RecipeSettings, TrainingSettings, RunSettings, GgufSettings, MixSettings,
        ImatrixSettings, AwqSettings, RetentionSettings, PushSettings, EvaluationSettings,
        GateSettings, InferenceSettings, RecallSettings, ContextSettings,
        SampleSettings,
    ):  # fmt: skip
        path, _, meaning = (table.__doc__ or "").partition(": ")
        title = path if table is not Config else "Top level"
        lines = [f"### {title}", "", _one_line(meaning or path), ""]
        lines += ["| option | default | meaning |", "| --- | --- | --- |"]
        for name, field in table.model_fields.items():
            lines.append(f"| `{name}` | {_default(field)} | {_one_line(field.description)} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Settings):
        return "see below"
    return f"`{json.dumps(field.default)}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
