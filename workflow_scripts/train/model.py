"""The model that trains: a base in the recipe's precision, an adapter, and the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from transformers import set_seed

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import (
    Precision,
    default_device,
    load_model,
    native_precision,
)
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train import attention, noise
from workflow_scripts.train.kernels import liger_runs, use_liger
from workflow_scripts.train.lora import ROUTER, check_mixture, lora_config
from workflow_scripts.train.loss import sum_loss
from workflow_scripts.train.projections import fuse


def trainable_model(
    checkpoint: Path, facts: ModelShape, recipe: RecipeSettings, *, kernels: str = "auto"
) -> Any:
    """Load the base and make it ready to train: with a new adapter in float32, or all in float32.

    Args:
        checkpoint: folder of the base model.
        kernels: `training.kernels`.
    """
    set_seed(recipe.seed)
    base = load_model(
        checkpoint,
        window=facts.sliding_window,
        precision=_base_precision(recipe),
        rope=facts.rope_parameters,
        attention=attention.register(),
    )
    if liger_runs(kernels):
        use_liger(base)
    return adapt(base, facts, recipe)


def _base_precision(recipe: RecipeSettings) -> Precision:
    """Precision of the base under the recipe's method.

    A full fine-tune keeps float32 weights even where autocast computes in 16 bits: an update of
    1e-5 is lost in bfloat16's eight bits.
    """
    by_method: dict[str, Precision] = {"qlora": "nf4", "lora_int8": "int8", "full": "float32"}
    return by_method.get(recipe.method) or native_precision(default_device())


def adapt(base: Any, facts: ModelShape, recipe: RecipeSettings) -> Any:
    """Add the weights that the recipe trains to a loaded base, and make its forward pass sum the
    loss.

    Weights that train are float32; the base stays frozen as it was loaded. PEFT's
    `prepare_model_for_kbit_training` would make embeddings, norms and output layer float32, and
    with them the hidden states, which doubles the activations.

    Returns:
        PEFT's model; for a full fine-tune the base itself.
    Raises:
        StageError: the recipe needs something that this model or this machine does not have.
    """
    embeddings = base.get_input_embeddings().weight
    dtype = embeddings.dtype
    if recipe.dora and recipe.method == "lora_int8" and embeddings.device.type == "cpu":
        # PEFT 0.21 reads the weight's norm at each pass, which on a CPU loses the weight's scales.
        raise StageError(
            "DoRA on a base in 8 bits needs a CUDA GPU",
            where="recipes.<name>.dora",
            found="a CPU",
            to_fix="set recipes.<name>.method to qlora or lora, or remove dora",
        )
    if recipe.method == "full":
        check_mixture(recipe, facts)
        model = base.float().requires_grad_(True)
        for name, parameter in model.named_parameters():
            if f".{ROUTER}." in name:
                parameter.requires_grad_(recipe.trains_router)
    else:
        base.requires_grad_(False)
        model = get_peft_model(base, lora_config(recipe, facts))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        _join_precisions(base, dtype)
        fuse(model)
        # DDP would first broadcast the base, which every process has read itself; NF4 weights
        # cannot even receive it.
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [name for name, p in model.named_parameters() if not p.requires_grad]
        )
    sum_loss(base, router_loss_coefficient=recipe.router_loss_coefficient)
    if recipe.neftune_alpha is not None:
        noise.add_noise(base.model, alpha=recipe.neftune_alpha)
    return model


def _join_precisions(base: Any, dtype: Any) -> None:
    """Convert states where a layer that trains whole, in float32, meets the rest in `dtype`.

    Float32 embeddings would make all hidden states float32; a float32 router takes only float32.
    """
    for name, layer in base.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            if name.endswith("embed_tokens"):
                layer.register_forward_hook(lambda _, __, embedded: embedded.to(dtype))
            elif name.endswith("mlp.gate"):
                layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
