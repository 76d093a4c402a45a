"""The adapter's shape: LoRA on every linear layer, with a rank of its own for k and v where asked.

In grouped-query attention k and v project to `n_kv_heads · head_dim`, a quarter of q in Mistral
7B. Whether they want less rank is a hypothesis that the report measures, not a fact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_scripts.log import StageError
from workflow_scripts.settings import RecipeSettings

if TYPE_CHECKING:
    from peft import LoraConfig


def kv_rank(recipe: RecipeSettings, *, n_heads: int, n_kv_heads: int) -> int:
    """Rank of k and v: the recipe's number, the uniform rank, or rank × kv heads ÷ heads.

    Raises:
        StageError: `matched` comes to no whole number.
    """
    if recipe.kv_rank == "uniform":
        return recipe.rank
    if recipe.kv_rank == "matched":
        rank, rest = divmod(recipe.rank * n_kv_heads, n_heads)
        if rest or not rank:
            raise StageError(
                "the matched rank of k and v is no whole number",
                where="recipes.<name>.rank",
                found=f"{recipe.rank} × {n_kv_heads} kv heads ÷ {n_heads} heads",
                expected=f"a multiple of {n_heads // n_kv_heads}",
            )
        return rank
    return recipe.kv_rank


def lora_config(recipe: RecipeSettings, facts: dict[str, Any]) -> LoraConfig:
    """PEFT's config of the recipe's adapter.

    Where k and v have a rank of their own, so have they an alpha: PEFT would keep the alpha, and
    their scale alpha ÷ rank would grow.

    Args:
        facts: the model's, for its heads.
    """
    from peft import LoraConfig, TaskType

    rank = kv_rank(recipe, n_heads=facts["n_heads"], n_kv_heads=facts["n_kv_heads"])
    patterns: dict[str, Any] = {}
    if rank != recipe.rank:
        alpha = recipe.alpha * rank / recipe.rank
        patterns = {
            "rank_pattern": {"k_proj": rank, "v_proj": rank},
            "alpha_pattern": {"k_proj": alpha, "v_proj": alpha},
        }
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules="all-linear",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        bias="none",
        **patterns,
    )
