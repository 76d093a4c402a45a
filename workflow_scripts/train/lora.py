"""The adapter's shape: LoRA on every linear layer, with a rank of its own for k and v where asked.

In grouped-query attention k and v project to `n_kv_heads · head_dim`, a quarter of q in Mistral
7B. Whether they want less rank is a hypothesis that the report measures, not a fact.

A mixture's experts are two tensors for all of them, its router a bare matrix; each has a setting of
its own. PEFT 0.21's `all-linear` would adapt both, as with transformers 4, the experts'
first half at twice the rank.
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
        name: of the recipe, for the message.
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
    """A recipe can be used on a model; no weight is needed to say so.

    Args:
        facts: the model's, for its heads and experts.
        name: of the recipe, for the messages.
    Raises:
        StageError: `kv_rank: matched` gives no integer, a target is not a module of the model, or a
            mixture's setting meets a dense model.
    """
    check_mixture(recipe, facts)
    if recipe.method == "full":
        return
    target_modules(recipe, facts)
    kv_rank(recipe, n_heads=facts.n_heads, n_kv_heads=facts.n_kv_heads, name=name)


def lora_config(recipe: RecipeSettings, facts: ModelShape) -> LoraConfig:
    """PEFT's config of the recipe's adapter.

    Where k and v have a rank of their own, so have they an alpha: PEFT would keep the alpha, and
    their scale, alpha ÷ rank (rsLoRA: ÷ √rank), would grow.

    Args:
        facts: the model's, for its heads and experts.
    Raises:
        StageError: a target is no module of the model, or a mixture's setting meets a dense model.
    """
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
        # One matrix in two places stays one.
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

    The output layer is none of them: its loss is made without calling it, so an adapter of it
    would do nothing; `modules_to_save` trains it.

    Raises:
        StageError: a name that no adaptable module ends with.
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
        raise StageError(
            "a target of the adapter is no linear layer of the model",
            where="recipes.<name>.target_modules",
            found=", ".join(unknown),
            expected="all-linear, or of " + ", ".join(name.split(".")[-1] for name in in_layer),
            to_fix="embed_tokens and lm_head belong in `modules_to_save`, a mixture's experts and"
            " router in `adapts_experts` and `trains_router`",
        )
    return list(recipe.target_modules)


def check_mixture(recipe: RecipeSettings, facts: ModelShape) -> None:
    """Settings of experts want a model that has some.

    Raises:
        StageError: naming those that a dense model cannot have.
    """
    names = ("adapts_experts", "trains_router", "router_loss_coefficient")
    found = [name for name in names if getattr(recipe, name)]
    if found and not facts.n_experts:
        raise StageError(
            "the recipe speaks of experts, and the model has none",
            where="recipes.<name>",
            found=", ".join(f"{name}: {getattr(recipe, name)}" for name in found),
            expected="these settings for a mixture of experts alone (Mixtral)",
            to_fix="leave them out, or name another recipe for this run",
        )
