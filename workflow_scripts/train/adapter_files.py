"""Outputs of a finished run: the adapter, or every weight of a full fine-tune, and the history."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from workflow_scripts import files
from workflow_scripts.handover.origin import Origin
from workflow_scripts.handover.training import Evaluation, History, TrainingStep
from workflow_scripts.log import StageError


def save_adapter(model: Any, weights: dict[str, Tensor], checkpoint: Path, folder: Path) -> None:
    """Write the adapter as PEFT loads it, with the origin of the base as the base's name.

    A full fine-tune has no adapter: its `adapter_model.safetensors` holds every weight under the
    model's own names, and `adapter_config.json` says so.

    Args:
        weights: the weights that trained, by parameter name.
        checkpoint: folder of the base model.
    """
    source = checkpoint / "source.json"
    name = Origin.read(source).source if source.is_file() else str(checkpoint)
    with files.atomic_folder(folder / ".saved") as saved:
        if hasattr(model, "peft_config"):
            for config in model.peft_config.values():
                config.base_model_name_or_path = name
            # Embeddings are never a target. By default PEFT asks the Hub for the base's config to
            # see whether they were resized, and warns if there is no network.
            model.save_pretrained(str(saved), state_dict=weights, save_embedding_layers=False)
        else:
            save_file(weights, saved / "adapter_model.safetensors", metadata={"format": "pt"})
            config = {"peft_type": None, "method": "full", "base_model_name_or_path": name}
            files.write_json(saved / "adapter_config.json", config)
        for path in ("adapter_model.safetensors", "adapter_config.json"):
            (saved / path).replace(folder / path)
    shutil.rmtree(folder / ".saved")


def read_history(
    log_history: list[dict[str, Any]],  # untyped: transformers' log
) -> History:
    """Read the steps and the evaluations from the Trainer's log.

    Raises:
        StageError: a loss or gradient norm is not finite, or every gradient was zero.
    """
    train = tuple(
        TrainingStep(
            step=entry["step"],
            loss_nats_per_token=entry["loss"],
            gradient_norm=entry["grad_norm"],
            learning_rate=entry["learning_rate"],
        )
        for entry in log_history
        if "loss" in entry
    )
    validation = tuple(
        Evaluation(
            step=entry["step"],
            loss_nats_per_token=entry["eval_loss"],
            perplexity=math.exp(entry["eval_loss"]),
        )
        for entry in log_history
        if "eval_loss" in entry
    )
    for one in train:
        for key in ("loss_nats_per_token", "gradient_norm"):
            value = getattr(one, key)
            if not math.isfinite(value):
                raise StageError(
                    "training diverged",
                    where=f"step {one.step}, {key}",
                    found=value,
                    to_fix="lower recipes.<name>.learning_rate",
                )
    if not any(one.gradient_norm for one in train):
        raise StageError("training changed nothing", found="a gradient norm of 0 at every step")
    return History(train=train, validation=validation)
