"""A model under a recipe on a kind of device: the input of the memory formulas."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.train import attention
from workflow_scripts.train.lora import ATTENTION, MLP, kv_rank, target_modules

DeviceType = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a decoder layer, and the rank of its adapter."""

    name: str
    n_in: int
    n_out: int
    rank: int
    """0 without an adapter."""


@dataclass(frozen=True)
class Shape:
    """A model under a recipe on a kind of device."""

    facts: ModelShape
    recipe: RecipeSettings
    compute_bytes: int
    is_cuda: bool
    """Attention runs in the varlen kernel, and dropout keeps a mask of one byte per number."""
    has_liger: bool
    expands_keys: bool = False
    """Keys are repeated for every query head, as `varlen_attn` needs without `enable_gqa` (torch
    2.11)."""
    fuses: bool = True
    """Plain LoRA runs as one operation (`projections.py`), not as in PEFT."""

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
    def active_width(self) -> int:
        """Feed-forward width that a token passes through: all experts chosen for it together."""
        return self.facts.intermediate_size * (self.facts.n_experts_per_token or 1)

    @property
    def state_bytes(self) -> int:
        """Bytes of a number of the hidden states: 4 where float32 embeddings or DoRA's float32
        magnitudes make them float32, else `compute_bytes`."""
        return 4 if self.is_full or self.recipe.dora else self.compute_bytes

    @cached_property
    def matrices(self) -> list[Matrix]:
        """The linear layers of one decoder layer, without experts."""
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
        """Weights in each of the two tensors that hold a layer's experts; none in a dense model."""
        size = (self.facts.n_experts or 0) * self.hidden * self.facts.intermediate_size
        return [2 * size, size] if size else []

    @cached_property
    def trained(self) -> Counter[tuple[int, ...]]:
        """Number of tensors that train, by shape."""
        facts, recipe = self.facts, self.recipe
        n_experts = facts.n_experts or 0
        feed_forward, table = facts.intermediate_size, (facts.vocabulary_size, self.hidden)
        in_layer: list[tuple[int, ...]] = []
        for matrix in self.matrices:
            if self.is_full:
                in_layer.append((matrix.n_out, matrix.n_in))
            elif matrix.rank:
                in_layer += [(matrix.rank, matrix.n_in), (matrix.n_out, matrix.rank)]
                if recipe.dora:
                    in_layer.append((matrix.n_out,))
        experts = ((self.hidden, 2 * feed_forward), (feed_forward, self.hidden))
        if n_experts and self.is_full:
            in_layer += [(n_experts, n_out, n_in) for n_in, n_out in experts]
        elif n_experts and recipe.adapts_experts:
            rank = recipe.rank * n_experts
            in_layer += [size for n_in, n_out in experts for size in ((rank, n_in), (n_out, rank))]
        if n_experts and recipe.trains_router:
            in_layer.append((n_experts, self.hidden))
        found = Counter(in_layer * facts.n_layers)
        if self.is_full:
            found[table] += 1 if facts.ties_embeddings else 2
            found[(self.hidden,)] += 2 * facts.n_layers + 1
        if recipe.modules_to_save:
            found[table] += len(recipe.modules_to_save)
        return found

    @cached_property
    def n_trained(self) -> int:
        """Number of weights that train."""
        return sum(n * math.prod(size) for size, n in self.trained.items())


@dataclass(frozen=True)
class PlannedRun:
    """A model with the settings and the device that it is to be trained with."""

    facts: ModelShape
    recipe: RecipeSettings
    training: TrainingSettings
    row_tokens: int
    """Length of the longest row of training."""
    device_type: DeviceType
    n_gpus: int = 1
    """GPUs of all nodes."""
    longest_evaluation: int | None = None
    """Tokens in the longest validation row; None stands for the longest possible."""

    @property
    def evaluation_tokens(self) -> int:
        """Tokens in the longest row that is evaluated (`validation.py`); 0 without evaluations."""
        longest = self.longest_evaluation or self.facts.served_context_tokens
        return max(self.row_tokens, longest) if self.recipe.evaluations else 0

    @cached_property
    def shape(self) -> Shape:
        """The model as it runs on the device: on CUDA in 16 bits and with the varlen kernel."""
        is_cuda = self.device_type == "cuda"
        has_liger = (
            is_cuda
            and self.facts.model_type == "mistral"
            and self.training.kernels != "torch"
            and (self.training.kernels == "liger" or importlib.util.find_spec("liger_kernel"))
        )
        return Shape(
            self.facts,
            self.recipe,
            compute_bytes=2 if is_cuda else 4,
            is_cuda=is_cuda,
            has_liger=bool(has_liger),
            expands_keys=is_cuda and "enable_gqa" not in attention.varlen_parameters(),
        )
