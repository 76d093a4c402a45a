"""Writes the result of one evaluation and one optimizer step of the product's trainer to a file.

Started by torchrun if several processes share the step:
python -m torch.distributed.run --nproc-per-node 2 tests/unit/train/one_step.py …
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from tests.unit.train.jobs import make_job, trainer_of
from workflow_scripts.handover.facts import Facts
from workflow_scripts.packing.plan import read_plan
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.tokens.documents import Documents
from workflow_scripts.train.model import trainable_model


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer gets."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.by_name = {
            name.removeprefix("module."): parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }


def take_step(
    checkpoint: Path,
    facts: Path,
    documents: Path,
    plan: Path,
    recipe: dict,
    rows_per_micro_batch: int,
    folder: Path,
) -> dict[str, torch.Tensor]:
    """Gradients by parameter, `loss` and `eval_loss`, with no matrix of the adapter zero."""
    settings = RecipeSettings(max_steps=1, evaluations=1, max_gradient_norm=1e9, rank=8, **recipe)
    shape = Facts.read(facts)
    model = trainable_model(checkpoint, shape, settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    tokens = Documents(documents)
    job = make_job(shape, read_plan(plan), tokens, settings)
    trainer = trainer_of(
        model, job, folder / "checkpoints", rows_per_micro_batch=rows_per_micro_batch
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    losses = {"loss": torch.tensor([loss]), "eval_loss": torch.tensor([eval_loss])}
    return losses | gradients.by_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--checkpoint", "--facts", "--documents", "--plan", "--folder"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--recipe", type=json.loads, required=True)
    parser.add_argument("--rows-per-micro-batch", type=int, required=True)
    arguments = parser.parse_args()
    result = take_step(**vars(arguments))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    save_file(result, arguments.folder / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    main()
