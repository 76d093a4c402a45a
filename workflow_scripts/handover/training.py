"""Plan and results of training (`train_adapter`, `plan_memory`)."""

from __future__ import annotations

from workflow_scripts.handover.facts import RopeParameters
from workflow_scripts.handover.record import Record
from workflow_scripts.settings import RecipeSettings


class Setup(Record):
    """Layout of a run on a GPU."""

    rows_per_micro_batch: int
    n_checkpointed_layers: int
    """Layers recomputed in the backward pass, evenly spread."""
    offloads_activations: bool
    """True if CPU memory keeps the activations that checkpointing saves."""


class MemoryParts(Record):
    """Predicted bytes at the moment when most is alive."""

    base_weights: int
    adapter: int
    gradients: int
    optimizer: int
    communication: int
    """Buffers of DDP or FSDP2; 0 for one GPU."""
    activations: int
    """What is kept from the forward to the backward pass."""
    workspace: int
    """What an operation needs while it runs."""
    evaluation: int
    """What the validation loss needs beyond activations and workspace."""
    program: int
    """Python and the libraries; 0 on a GPU, where only the GPU's memory counts."""
    peak: int
    """The sum of all parts."""

    def by_name(self) -> dict[str, int]:
        """All parts without their sum."""
        return self.model_dump(exclude={"peak"})


class Candidate(Setup):
    """A layout, the memory it takes, and how long it takes."""

    parts_bytes: MemoryParts
    flops_per_token: float
    """Time per token, given as the number of operations that would take as long."""

    @property
    def setup(self) -> Setup:
        """The layout alone."""
        return Setup.model_validate(self.model_dump(include=set(Setup.model_fields)))

    @property
    def peak(self) -> int:
        return self.parts_bytes.peak


class MemoryPlan(Record):
    """`memory_plan.json`: the fastest layout that fits the device and that the settings allow."""

    device: str
    """`cpu`, or the name of the GPU."""
    row_tokens: int
    """Length of the longest row of training."""
    evaluation_tokens: int
    """Length of the longest row that is evaluated; 0 where none is."""
    n_gpus: int
    """GPUs of all nodes."""
    available_bytes: int
    """Free memory of one GPU, or of the machine."""
    usable_bytes: int
    """What may be used: `training.memory_gb` or what is available, less a margin."""
    rows_per_micro_batch: int
    n_checkpointed_layers: int
    offloads_activations: bool
    predicted_peak_memory_bytes: int
    predicted_bytes: MemoryParts
    """Memory of the fastest layout, by part."""
    candidates: tuple[Candidate, ...]
    """Every layout that the settings allow."""


class TrainingStep(Record):
    """One optimizer step."""

    step: int
    """The number of the step, from 1."""
    loss_nats_per_token: float
    """Mean over the supervised tokens of the step."""
    gradient_norm: float
    """The norm before clipping."""
    learning_rate: float


class Evaluation(Record):
    """The validation loss after a step."""

    step: int
    loss_nats_per_token: float
    """Mean over the supervised tokens of the validation rows."""
    perplexity: float


class History(Record):
    """`adapter/history.json`: every step and every evaluation of a training."""

    train: tuple[TrainingStep, ...]
    validation: tuple[Evaluation, ...]


class RunIdentity(Record):
    """`identity.json`: all that decides the result of a training. Its fingerprint names the folder
    of the checkpoints."""

    recipe: RecipeSettings
    base: dict[str, str | None]
    """SHA-256 of each file of the base model, by name; None where only the size is known."""
    rope_parameters: RopeParameters
    tokens: str
    """SHA-256 of the training documents."""
    validation: str
    """SHA-256 of the validation documents."""
    plan: str
    """SHA-256 of the packing plan."""
    output_version: int
    """`OUTPUT_VERSION` of train_adapter."""


class RecipeCheck(Record):
    """`{recipe}_check.json`: a recipe that fits the model (`check_recipe`)."""

    recipe: RecipeSettings


class TrainingManifest(Record):
    """`adapter/training_manifest.json`: how a training ran, and what decided its result."""

    n_steps: int
    """Optimizer steps taken."""
    best_step: int | None
    """The step whose weights were kept; None where the last ones were."""
    n_trainable_parameters: int
    n_processes: int
    rows_per_micro_batch: int
    n_checkpointed_layers: int
    offloads_activations: bool
    tokens_per_step: float
    """Mean over the plan."""
    tokens_per_second: float | None
    """Mean over the run; None where no step was measured."""
    duration_seconds: float
    """Time of this start alone; a run that was resumed took longer."""
    peak_memory_bytes: int
    """Memory of the GPU, or of the whole process on a CPU."""
    predicted_peak_memory_bytes: int
    final_loss_nats_per_token: float
    """Training loss of the last step."""
    device: str
    """`cpu`, or the name of the GPU."""
    compute_dtype: str
    """The dtype that a 4-bit base was quantized from and is dequantized to: `bfloat16`."""
    resumed: bool
    """The run went on from a checkpoint."""
    n_failed_checkpoints: int
    """Checkpoints that could not be written."""
    identity: RunIdentity
