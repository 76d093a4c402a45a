"""Writes loss and gradients of a sharded model (FSDP2) to a file; each process has another row.

Started by torchrun: python -m torch.distributed.run --nproc-per-node 2 -m
tests.unit.train.sharded_step …
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.packing.plan import read_plan
from workflow_scripts.tokens.documents import Documents
from workflow_scripts.train import attention
from workflow_scripts.train.batches import Collator
from workflow_scripts.train.loss import sum_loss


def adapted(checkpoint: Path) -> torch.nn.Module:
    """A float32 base with an adapter without zero matrices, the same in every process."""
    from peft import LoraConfig, get_peft_model

    base = load_model(checkpoint, window=8, precision="float32", attention=attention.register())
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    sum_loss(model.get_base_model())
    return model.train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the adapter, gathered from all processes."""
    return {
        name: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
        for name, grad in ((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--checkpoint", "--documents", "--plan", "--folder"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    distributed.init_process_group("gloo")
    rank, n_ranks = distributed.get_rank(), distributed.get_world_size()
    model = adapted(arguments.checkpoint)
    mesh = init_device_mesh("cpu", (n_ranks,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = read_plan(arguments.plan).rows
    collate = Collator(Documents(arguments.documents), crosses_documents=False)
    loss = model(**collate(list(rows)[rank::n_ranks])).loss
    (loss * n_ranks).backward()  # FSDP averages gradients
    summed = loss.detach().clone()
    distributed.all_reduce(summed)
    result = {"loss": summed[None], **gradients(model)}
    if rank == 0:
        save_file(result, arguments.folder / "sharded.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
