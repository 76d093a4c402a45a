"""The recipe's optimizer, and its learning rate by step."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from transformers.optimization import Adafactor

from workflow_scripts.log import StageError
from workflow_scripts.settings import RecipeSettings

ADAM_BETA1 = 0.9
# PEFT's names of the parameters that LoRA+ trains faster. DoRA's magnitudes scale the product, as B
# does.
LORAPLUS_PARTS = ("lora_B", "lora_magnitude_vector")


def optimizer(model: torch.nn.Module, recipe: RecipeSettings) -> torch.optim.Optimizer:
    """The recipe's optimizer over all weights that train.

    AdamW with 8-bit state keeps 2 bytes per weight instead of 8; tensors below 4096 weights keep a
    32-bit state. Adafactor keeps one row and one column per matrix.

    Raises:
        StageError: nothing trains.
    """
    groups = parameter_groups(model, recipe)
    betas = (ADAM_BETA1, recipe.adam_beta2)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, fused=True)
    if recipe.optimizer == "adafactor":
        # torch.optim.Adafactor multiplies the rate by the size of the matrix's values. LoRA's B
        # begins at zero and would learn a thousand times slower.
        return Adafactor(
            groups, lr=recipe.learning_rate, scale_parameter=False, relative_step=False
        )
    # Without a GPU there is nothing to page from.
    is_paged = recipe.optimizer == "adamw_paged_8bit" and torch.cuda.is_available()
    return (PagedAdamW8bit if is_paged else AdamW8bit)(groups, lr=recipe.learning_rate, betas=betas)


def parameter_groups(
    model: torch.nn.Module, recipe: RecipeSettings
) -> list[dict[str, Any]]:  # untyped: as torch's optimizers take them
    """Group the weights that train by learning rate and weight decay.

    Norms and other vectors have no decay, which would only pull a scale to 0.

    Returns:
        Groups for an optimizer: `params`, `lr`, `weight_decay`, in the model's order.
    Raises:
        StageError: nothing trains.
    """
    by_options: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_faster = any(part in name for part in LORAPLUS_PARTS)
            ratio = (recipe.loraplus_ratio or 1.0) if is_faster else 1.0
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            options = (recipe.learning_rate * ratio, decay)
            by_options.setdefault(options, []).append(parameter)
    if not by_options:
        raise StageError("the model has no weight that trains", where="recipes.<name>")
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in by_options.items()
    ]


def scheduler(
    optimizer: torch.optim.Optimizer, recipe: RecipeSettings, n_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The recipe's learning rate; `step()` is called once per optimizer step.

    Args:
        n_steps: optimizer steps of the whole run.
    """
    share = functools.partial(
        rate_share,
        schedule=recipe.schedule,
        n_steps=n_steps,
        n_warmup=round(n_steps * recipe.warmup_fraction),
        n_decay=round(n_steps * recipe.decay_fraction),
    )
    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def rate_share(step: int, *, schedule: str, n_steps: int, n_warmup: int, n_decay: int) -> float:
    """Learning rate of a step ÷ the recipe's.

    Args:
        step: from 0; with a warm-up the rate of step 0 is 0.
        n_warmup: steps in which the rate rises linearly.
        n_decay: last steps of `wsd`, in which the rate falls linearly to 0.
    Source: `wsd`: arXiv:2405.18392 §3, linear instead of the exponential of arXiv:2404.06395.
    """
    if step < n_warmup:
        return step / n_warmup
    n_left = max(0, n_steps - step)
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        return min(1.0, n_left / n_decay) if n_decay else 1.0
    left = n_left / max(1, n_steps - n_warmup)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
