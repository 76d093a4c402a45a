"""`packings`, `recipes` and `training`: what is learned, and how it runs on a machine."""

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
    honours_window: bool = True
    """Attention in training ends at the model's sliding window; false trains as scripts do that
    ignore it, to see what that costs. Every score still honours it."""
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
