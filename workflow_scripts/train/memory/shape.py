"""A model under a recipe on a kind of device: what every formula of memory asks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.train.lora import ATTENTION, MLP, kv_rank, target_modules

DeviceType = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a decoder layer, and the rank of its adapter."""

    name: str
    n_in: int
    n_out: int
    rank: int
    """0 where it has none."""


@dataclass(frozen=True)
class Shape:
    """A model under a recipe on a kind of device: what every formula below asks for."""

    facts: ModelShape
    recipe: RecipeSettings
    compute_bytes: int
    is_cuda: bool
    """Attention by the varlen kernel; dropout keeps a mask of single bytes."""
    has_liger: bool
    expands_keys: bool = False
    """`varlen_attn` without `enable_gqa` (torch 2.11) is given keys repeated for every head."""
    fuses: bool = True
    """Plain LoRA runs as one operation (`projections.py`), else as PEFT has it."""

    @property
    def hidden(self) -> int:
        return self.facts.hidden_size

    @property
    def query_width(self) -> int:
        return self.facts.n_heads * self.facts.head_dim

    @property
    def kv_width(self) -> int:
        return self.facts.n_kv_heads * self.facts.head_dim

    @property
    def is_full(self) -> bool:
        return self.recipe.method == "full"

    @property
    def is_fused(self) -> bool:
        recipe = self.recipe
        return (
            self.fuses
            and recipe.method in ("qlora", "lora")
            and not (recipe.dora or recipe.dropout)
        )

    @property
    def state_bytes(self) -> int:
        """Of a hidden state's number: float32 where float32 embeddings or DoRA's float32 magnitudes
        make it so, else as computed."""
        return 4 if self.is_full or self.recipe.dora else self.compute_bytes

    @cached_property
    def matrices(self) -> list[Matrix]:
        """Those of one layer, experts left out."""
        facts = self.facts
        feed_forward = facts.intermediate_size
        widths = {
            "q_proj": (self.hidden, self.query_width),
            "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width),
            "o_proj": (self.query_width, self.hidden),
        }
        if not facts.n_experts:
            widths |= {
                "gate_proj": (self.hidden, feed_forward),
                "up_proj": (self.hidden, feed_forward),
                "down_proj": (feed_forward, self.hidden),
            }
        of_kv = kv_rank(self.recipe, n_heads=facts.n_heads, n_kv_heads=facts.n_kv_heads)
        targets = [] if self.is_full else target_modules(self.recipe, facts)
        names = {name.split(".")[-1]: name for name in ATTENTION + MLP}
        return [
            Matrix(
                name,
                *width,
                (of_kv if name in ("k_proj", "v_proj") else self.recipe.rank)
                if any(f".{names[name]}".endswith(f".{target}") for target in targets)
                else 0,
            )
            for name, width in widths.items()
        ]

    def expert_weights(self) -> list[int]:
        """Of the two tensors that hold all experts of a layer; none in a dense model."""
        size = (self.facts.n_experts or 0) * self.hidden * self.facts.intermediate_size
        return [2 * size, size] if size else []

    @cached_property
    def trained(self) -> dict[tuple[int, ...], int]:
        """How many tensors of each shape train beside a frozen base, or all of them for `full`."""
        facts, recipe = self.facts, self.recipe
        n_layers, n_experts = facts.n_layers, facts.n_experts or 0
        feed_forward, vocabulary = facts.intermediate_size, facts.vocabulary_size
        found: dict[tuple[int, ...], int] = {}

        def add(size: tuple[int, ...], n: int = n_layers) -> None:
            found[size] = found.get(size, 0) + n

        for matrix in self.matrices:
            if self.is_full:
                add((matrix.n_out, matrix.n_in))
            elif matrix.rank:
                add((matrix.rank, matrix.n_in))
                add((matrix.n_out, matrix.rank))
                if recipe.dora:
                    add((matrix.n_out,))
        if self.is_full:
            add((vocabulary, self.hidden), 1 if facts.ties_embeddings else 2)
            add((self.hidden,), 2 * n_layers + 1)
            if n_experts:
                add((n_experts, 2 * feed_forward, self.hidden))
                add((n_experts, self.hidden, feed_forward))
        elif recipe.adapts_experts and n_experts:
            for n_in, n_out in ((self.hidden, 2 * feed_forward), (feed_forward, self.hidden)):
                add((recipe.rank * n_experts, n_in))
                add((n_out, recipe.rank * n_experts))
        if n_experts and recipe.trains_router:
            add((n_experts, self.hidden))
        for _ in recipe.modules_to_save:
            add((vocabulary, self.hidden), 1)
        return found


@dataclass(frozen=True)
class PlannedRun:
    """What is to be trained, with which settings, on what."""

    facts: ModelShape
    """Of read_model_facts."""
    recipe: RecipeSettings
    training: TrainingSettings
    row_tokens: int
    """Of the longest row of training."""
    device_type: DeviceType
    n_gpus: int = 1
    """Of all nodes."""
    longest_evaluation: int | None = None
    """Tokens of the longest row of the validation loss; None is the longest there can be."""

    @property
    def evaluation_tokens(self) -> int:
        """Longest row that is evaluated, as `validation.py` packs them; 0 where none is."""
        longest = self.longest_evaluation or self.facts.served_context_tokens
        return max(self.row_tokens, longest) if self.recipe.evaluations else 0

    @cached_property
    def shape(self) -> Shape:
        """What runs on this kind of device: 16-bit arithmetic and the varlen kernel on CUDA."""
        is_cuda = self.device_type == "cuda"
        return Shape(
            self.facts,
            self.recipe,
            compute_bytes=2 if is_cuda else 4,
            is_cuda=is_cuda,
            has_liger=is_cuda and _liger_is_used(self.training, self.facts),
            expands_keys=is_cuda and not _varlen_groups_heads(),
        )


def _liger_is_used(training: TrainingSettings, facts: ModelShape) -> bool:
    if training.kernels == "torch" or facts.model_type != "mistral":
        return False
    import importlib.util

    return training.kernels == "liger" or importlib.util.find_spec("liger_kernel") is not None


@cache
def _varlen_groups_heads() -> bool:
    from importlib import metadata

    major, minor = metadata.version("torch").split(".")[:2]
    return (int(major), int(minor)) >= (2, 12)
