"""The adapter's shape: LoRA on every linear layer, if requested with a separate rank for k and v.

In grouped-query attention k and v project to `n_kv_heads · head_dim`, a quarter of q in Mistral
7B. That they need less rank is a hypothesis that the report measures.

A mixture keeps all its experts in two tensors and its router in a bare matrix; each has a separate
setting. PEFT 0.21's `all-linear` would adapt both, as with transformers 4, and gate and up of the
experts at twice the rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.log import StageError
from workflow_scripts.settings import RecipeSettings

if TYPE_CHECKING:
    from peft import LoraConfig

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER = "mlp.gate"


def kv_rank(recipe: RecipeSettings, *, n_heads: int, n_kv_heads: int, name: str = "<name>") -> int:
    """Rank of k and v: the recipe's number, the uniform rank, or rank × kv heads ÷ heads.

    Args:
        name: the recipe's name, for the message.
    Raises:
        StageError: `matched` does not give an integer.
    """
    if recipe.kv_rank == "uniform":
        return recipe.rank
    if recipe.kv_rank == "matched":
        rank, rest = divmod(recipe.rank * n_kv_heads, n_heads)
        if rest:
            divisor = n_heads // math.gcd(n_heads, n_kv_heads)
            lower = recipe.rank // divisor * divisor
            nearest = [str(one) for one in (lower, lower + divisor) if one]
            raise StageError(
                f"kv_rank: matched gives {recipe.rank * n_kv_heads / n_heads:.2f} for k and v;"
                f" choose a rank divisible by {divisor}",
                where=f"recipes.{name}.rank",
                found=f"{recipe.rank} × {n_kv_heads} kv heads ÷ {n_heads} heads",
                expected=f"an integer, as {' or '.join(nearest)} would give",
                to_fix=f"change recipes.{name}.rank, or set its kv_rank to `uniform` or a number",
            )
        return rank
    return recipe.kv_rank


def check_recipe(recipe: RecipeSettings, facts: ModelShape, *, name: str = "<name>") -> None:
    """Check that a recipe fits a model; this needs no weights.

    Args:
        facts: the model's facts, for its heads and experts.
        name: the recipe's name, for the messages.
    Raises:
        StageError: `kv_rank: matched` does not give an integer, a target is not a module of the
            model, or a setting for experts meets a dense model.
    """
    check_mixture(recipe, facts)
    if recipe.method == "full":
        return
    target_modules(recipe, facts)
    kv_rank(recipe, n_heads=facts.n_heads, n_kv_heads=facts.n_kv_heads, name=name)


def lora_config(recipe: RecipeSettings, facts: ModelShape) -> LoraConfig:
    """PEFT's config of the recipe's adapter.

    If k and v have a separate rank, they get a matching alpha. PEFT would keep the alpha, and their
    scale, alpha ÷ rank (rsLoRA: ÷ √rank), would grow.

    Args:
        facts: the model's facts, for its heads and experts.
    Raises:
        StageError: as `check_recipe`.
    """
    # Not at the top: it takes seconds, and check_recipe does without.
    from peft import LoraConfig, TaskType

    check_mixture(recipe, facts)
    targets = target_modules(recipe, facts)
    rank = kv_rank(recipe, n_heads=facts.n_heads, n_kv_heads=facts.n_kv_heads)
    patterns: dict[str, Any] = {}
    if rank != recipe.rank:
        share = rank / recipe.rank
        alpha = recipe.alpha * (math.sqrt(share) if recipe.rslora else share)
        patterns = {
            "rank_pattern": {"k_proj": rank, "v_proj": rank},
            "alpha_pattern": {"k_proj": alpha, "v_proj": alpha},
        }
    whole = [*recipe.modules_to_save, *([ROUTER] if recipe.trains_router else [])]
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=targets,
        target_parameters=list(EXPERTS) if recipe.adapts_experts else None,
        modules_to_save=whole or None,
        # Tied embeddings stay tied.
        ensure_weight_tying=bool(facts.ties_embeddings and recipe.modules_to_save),
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
        lora_dropout=recipe.dropout,
        use_dora=recipe.dora,
        use_rslora=recipe.rslora,
        bias="none",
        **patterns,
    )


def target_modules(recipe: RecipeSettings, facts: ModelShape) -> list[str]:
    """The recipe's targets as PEFT takes them, each the end of a module's dotted name.

    The output layer cannot be a target: the loss reads its weight without calling it, so an
    adapter there would have no effect. `modules_to_save` trains it.

    Raises:
        StageError: no linear layer has a name that ends with one of the targets.
    """
    in_layer = ATTENTION if facts.n_experts else ATTENTION + MLP
    if recipe.target_modules == "all-linear":
        return [name.split(".")[-1] for name in in_layer]
    names = [f"model.layers.{at}.{name}" for at in range(facts.n_layers) for name in in_layer]
    unknown = [
        target
        for target in recipe.target_modules
        if not any(f".{name}".endswith(f".{target}") for name in names)
    ]
    if unknown:
        adaptable = ", ".join(name.split(".")[-1] for name in in_layer)
        raise StageError(
            "a target of the adapter is not a linear layer of the model",
            where="recipes.<name>.target_modules",
            found=", ".join(unknown),
            expected=f"all-linear, or some of {adaptable}",
            to_fix="embed_tokens and lm_head belong in `modules_to_save`, a mixture's experts and"
            " router in `adapts_experts` and `trains_router`",
        )
    return list(recipe.target_modules)


def check_mixture(recipe: RecipeSettings, facts: ModelShape) -> None:
    """Check that settings for experts meet a model with experts.

    Raises:
        StageError: the model is dense; the message names the settings.
    """
    names = ("adapts_experts", "trains_router", "router_loss_coefficient")
    found = [name for name in names if getattr(recipe, name)]
    if found and not facts.n_experts:
        raise StageError(
            "the recipe has settings for experts, but the model has no experts",
            where="recipes.<name>",
            found=", ".join(f"{name}: {getattr(recipe, name)}" for name in found),
            expected="these settings only for a mixture of experts (Mixtral)",
            to_fix="remove them, or choose another recipe for this run",
        )
