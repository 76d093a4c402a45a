"""The model that trains: a base in the recipe's precision, its adapter, the loss in its forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from transformers import set_seed

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import default_device, load_model, native_precision
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train import attention, noise
from workflow_scripts.train.kernels import liger_runs, use_liger
from workflow_scripts.train.lora import ROUTER, check_mixture, lora_config
from workflow_scripts.train.loss import sum_loss
from workflow_scripts.train.projections import fuse


def trainable_model(
    checkpoint: Path, facts: ModelShape, recipe: RecipeSettings, *, kernels: str = "auto"
) -> Any:
    """The base with a fresh adapter in float32, or every weight of it in float32: ready to train.

    Args:
        checkpoint: folder of the base model.
        facts: the model's.
        kernels: `training.kernels`.
    """
    set_seed(recipe.seed)
    base = load_model(
        checkpoint,
        window=facts.sliding_window,
        precision=base_precision(recipe),
        rope=facts.rope_parameters,
        attention=attention.register(),
    )
    if liger_runs(kernels):
        use_liger(base)
    return adapt(base, facts, recipe)


def base_precision(recipe: RecipeSettings) -> Any:
    """What the recipe's method holds the base in, as `load_model` names it.

    A full fine-tune keeps float32 weights whatever computes (autocast does, on a GPU): an update
    of 1e-5 is lost in bfloat16's eight bits.
    """
    by_method = {"qlora": "nf4", "lora_int8": "int8", "full": "float32"}
    if recipe.method in by_method:
        return by_method[recipe.method]
    return native_precision(default_device())


def adapt(base: Any, facts: ModelShape, recipe: RecipeSettings) -> Any:
    """What the recipe trains, on a loaded base, whose forward pass then sums the loss.

    The base stays as it was loaded, frozen. PEFT's `prepare_model_for_kbit_training` would make its
    embeddings, norms and output layer float32, and with them the hidden states: twice the
    activations. What trains is float32.

    Returns:
        PEFT's model; for a full fine-tune the base itself.
    Raises:
        StageError: the recipe asks for what this model, or this machine, does not have.
    """
    embeddings = base.get_input_embeddings().weight
    dtype = embeddings.dtype
    if recipe.dora and recipe.method == "lora_int8" and embeddings.device.type == "cpu":
        # PEFT 0.21 reads the weight's norm at each pass, and on a CPU loses its scales by that.
        raise StageError(
            "DoRA on a base in 8 bits wants a CUDA GPU",
            where="recipes.<name>.dora",
            found="a CPU",
            to_fix="set recipes.<name>.method to qlora or lora, or leave dora out",
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
        # DDP would begin by sending every process the base it has read itself; what is in NF4
        # cannot even be written to.
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [name for name, p in model.named_parameters() if not p.requires_grad]
        )
    sum_loss(base, router_loss_coefficient=recipe.router_loss_coefficient)
    if recipe.neftune_alpha is not None:
        noise.add_noise(base.model, alpha=recipe.neftune_alpha)
    return model


def _join_precisions(base: Any, dtype: Any) -> None:
    """Where a layer that trains whole, in float32, meets the rest of the model in `dtype`.

    Float32 embeddings would make every hidden state float32; a float32 router takes no others.
    """
    for name, layer in base.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            if name.endswith("embed_tokens"):
                layer.register_forward_hook(lambda _, __, embedded: embedded.to(dtype))
            elif name.endswith("mlp.gate"):
                layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
