"""`packings`, `recipes` and `training`: how rows are filled, what is learned, and how it runs on a
machine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from workflow_scripts.settings.fields import (
    Count,
    Fraction,
    NonNegative,
    NonNegativeNumber,
    Positive,
    Settings,
    named_or_count,
)


def _on_off(value: object) -> object:
    # YAML reads a bare `off` as false.
    return {False: "off", True: "full"}[value] if isinstance(value, bool) else value


KvRank = Annotated[Literal["uniform", "matched"] | Count, named_or_count("uniform", "matched")]
MicroBatchRows = Annotated[Literal["auto"] | Count, named_or_count("auto")]
Checkpointing = Annotated[
    Literal["auto", "off", "full"] | Count,
    named_or_count("auto", "off", "full"),
    BeforeValidator(_on_off),
]


class PackingSettings(Settings):
    """`packings.<name>`: how documents share a row of training."""

    strategy: Literal["best_fit", "concatenate", "none"] = "best_fit"
    """`best_fit` keeps documents whole and apart. `concatenate` cuts wherever a row ends, and
    attention crosses documents. `none` puts one document in a row, groups rows by length, and pads
    those of a micro-batch to the longest."""
    row_tokens: Annotated[Count, Field(ge=16, le=131_072)] = 4096
    """Length of a training row, tokens."""
    long_documents: Literal["split", "truncate", "drop", "error"] = "split"
    """What to do with a document longer than a row: `split` cuts it between turns, else between
    sentences, else between tokens; `truncate` keeps its beginning; `drop` leaves it out; `error`
    stops. `concatenate` ignores this and cuts every document where a row ends."""
    overlap_tokens: Count | None = None
    """Tokens that a later piece of a split document repeats from the piece before it, as context
    that the loss does not count; null is 1/16 of a row."""
    seed: NonNegative = 0
    """Decides which of equally long documents share a row, and the order of the rows."""

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
    """`recipes.<name>`: which weights train and how; everything that decides the result."""

    method: Literal["qlora", "lora_int8", "lora", "full"] = "qlora"
    """`qlora`: LoRA on the base in 4 bits (NF4, double quantization); `lora_int8`: in 8 bits;
    `lora`: in 16 bits; `full`: no adapter, every weight trains (small models)."""
    rank: Count = 32
    """LoRA rank."""
    alpha: Positive = 64
    """LoRA alpha. The adapter's scale is alpha ÷ rank (with rsLoRA: alpha ÷ √rank), the same for
    every module."""
    kv_rank: KvRank = "uniform"
    """Rank of the k and v projections: `uniform` is `rank`; `matched` is rank × key/value heads ÷
    query heads (the same rank per head); or a number."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Modules that get an adapter: every linear layer, or a list (`[q_proj, v_proj]`)."""
    adapts_experts: bool = False
    """Mixture of experts: the experts get adapters too. Without this, only attention does."""
    trains_router: bool = False
    """Mixture of experts: the router's full weights train too; otherwise it is frozen."""
    router_loss_coefficient: NonNegativeNumber = 0.0
    """Mixture of experts: weight of the load-balancing loss that is added to the loss of the
    tokens; 0 leaves it out."""
    modules_to_save: list[Literal["embed_tokens", "lm_head"]] = []
    """Layers whose full weights train along with the adapter, for the embeddings of new tokens;
    kept in float32."""
    dora: bool = False
    """DoRA (arXiv:2402.09353): LoRA learns the direction of each weight, a vector learns its
    magnitude; slower."""
    rslora: bool = False
    """rsLoRA (arXiv:2312.03732): scale alpha ÷ √rank, for high ranks."""
    loraplus_ratio: Annotated[Positive, Field(ge=1)] | None = None
    """LoRA+ (arXiv:2402.12354): learning rate of B ÷ that of A; null is the same for both."""
    dropout: Annotated[Fraction, Field(lt=1)] = 0.0
    """LoRA dropout; a value above 0 takes two thirds more activation memory."""
    neftune_alpha: Positive | None = None
    """NEFTune (arXiv:2310.05914): scale of the noise added to embeddings in training, 5 in the
    paper; null adds none."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_paged_8bit", "adafactor"] = "adamw"
    """AdamW (fused), with 8-bit state, with 8-bit state paged to the CPU (bitsandbytes), or
    Adafactor."""
    adam_beta2: Annotated[Fraction, Field(gt=0, lt=1)] = 0.999
    """AdamW's decay of the second moment."""
    learning_rate: Positive = 1.4e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after warm-up; `wsd` is warm-up, stable, decay (arXiv:2404.06395)."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    decay_fraction: Fraction = 0.1
    """`wsd`: share of the steps at the end in which the learning rate falls to 0."""
    weight_decay: NonNegativeNumber = 0.0
    """Decoupled weight decay of the weights that train."""
    max_gradient_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    honours_window: bool = True
    """Limit attention in training to the model's sliding window. false trains like scripts that
    ignore the window, to measure what that costs; scores always use the window."""
    epochs: Positive = 1.0
    """Passes over the training rows."""
    max_steps: Count | None = None
    """Largest number of optimizer steps, even if `epochs` asks for more; null is no limit."""
    rows_per_step: Count = 8
    """Rows per optimizer step, over all micro-batches and GPUs. The number of micro-batches changes
    only rounding. Several GPUs get rows of similar cost, so the rows that share a step may
    differ from those on one GPU."""
    evaluations: NonNegative = 2
    """Number of validations during training, evenly spaced; 0 is none."""
    validation_conversations: Count | None = 1000
    """Validation conversations that are scored, the first in the order of the split; null is
    all."""
    keeps_best: bool = True
    """Keep the weights with the lowest validation loss; false keeps the last ones."""
    early_stopping: Count | None = None
    """Number of validations in a row without a lower loss after which training stops; null never
    stops early."""
    seed: NonNegative = 0
    """Seed of the adapter's initial weights, the order of the rows, dropout and noise."""
    sweep: bool = False
    """Train one run for each combination of the values that are given as lists, as in
    `learning_rate: [1e-4, 2e-4]` (`snakemake sweep`)."""

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
    """`training`: how training runs on your machine. These options change speed, memory and
    rounding, but not what is learned, so a change re-runs no step."""

    rows_per_micro_batch: MicroBatchRows = "auto"
    """Rows per forward and backward pass on each GPU; `auto` takes the fastest layout that fits
    (`plan_memory`)."""
    gradient_checkpointing: Checkpointing = "auto"
    """Layers whose activations are recomputed in the backward pass, which saves memory and takes up
    to half more time: `off`, `full` (all), or a number, evenly spread; `auto` takes as few as
    memory allows."""
    offload_activations: Literal["auto"] | bool = "auto"
    """Keep the activations that checkpointing saves in CPU memory, for very long rows; `auto` does
    so if nothing else fits."""
    kernels: Literal["auto", "liger", "torch"] = "auto"
    """Kernels for RoPE, RMSNorm and SwiGLU: Liger's (Triton) or PyTorch's; `auto` is Liger's on a
    CUDA GPU if `liger-kernel` is installed."""
    memory_gb: Positive | None = None
    """GPU memory that training may use, GB (10⁹ bytes); null is the memory that is free when
    training starts."""
    gpus: Count = 1
    """GPUs per node of a training job; `rows_per_step` must be a multiple of gpus × nodes."""
    nodes: Count = 1
    """Nodes of a training job on Slurm."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """How several GPUs share the model: with `ddp` each holds all of it; with `fsdp2` each holds a
    part of the weights."""
    checkpoint_steps: Count = 100
    """Optimizer steps between resumable checkpoints."""
    checkpoints_kept: Count = 2
    """Number of resumable checkpoints kept, the newest ones."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where training writes its curves: TensorBoard (`logs/runs/<run>/tensorboard`), Weights &
    Biases, MLflow."""
    tracker_project: str = "tramontane"
    """Name of the project (Weights & Biases) or experiment (MLflow)."""
