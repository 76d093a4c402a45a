"""An adapter as PEFT itself applies it: which parameters it changes, and how.

`adapter.py` reads the same file by our own rules, for merging. A gate that read it by those rules
would repeat their faults, so here PEFT attaches the adapter to a model without weights (on torch's
meta device), and the result is read from PEFT's own layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from workflow_scripts import files

NAME = "default"  # PEFT's name for the only adapter of a model


class LowRank(NamedTuple):
    """The change of one matrix: scale · up @ down; with a magnitude (DoRA), each row of the sum is
    then given that length."""

    down: torch.Tensor
    """(rank, in) float32: LoRA's A."""
    up: torch.Tensor
    """(out, rank) float32: LoRA's B."""
    scale: float
    magnitude: torch.Tensor | None = None
    """(out,) float32; None without DoRA."""


class LiveAdapter:
    """The changes of an adapter, by the names of the model's parameters.

    Attributes:
        low_rank: parameter → its change; one per expert where the parameter holds all experts of a
            layer, else one.
        whole: parameter → the tensor that takes its place (`modules_to_save`, resized embeddings,
            full fine-tunes).
    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        checkpoint: folder of the base model; only its config.json is read.
    """

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.low_rank: dict[str, list[LowRank]] = {}
        self.whole: dict[str, torch.Tensor] = {}
        if files.read_json(folder / "adapter_config.json").get("method") == "full":
            from safetensors.torch import load_file

            self.whole = load_file(folder / "adapter_model.safetensors")
            return
        self._read(attached(folder, weightless(checkpoint)), folder / "adapter_model.safetensors")

    def _read(self, model: Any, path: Path) -> None:
        from peft.tuners.lora.layer import LoraLayer, ParamWrapper
        from peft.utils.other import AuxiliaryTrainingWrapper

        with safe_open(path, framework="pt") as stored:

            def tensor(module: str, name: str) -> torch.Tensor:
                return stored.get_tensor(f"base_model.model.{module}.{name}").float()

            for name, module in model.named_modules():
                parameter = name.replace(".base_layer", "")
                if isinstance(module, LoraLayer):
                    down, up = (tensor(name, f"lora_{letter}.weight") for letter in "AB")
                    scale = module.scaling[NAME]
                    if isinstance(module, ParamWrapper):
                        self.low_rank[f"{parameter}.{module.parameter_name}"] = [
                            LowRank(down, up, scale) for down, up in _by_expert(module, down, up)
                        ]
                        continue
                    magnitude = None
                    if NAME in module.lora_magnitude_vector:
                        magnitude = tensor(name, "lora_magnitude_vector")
                    self.low_rank[f"{parameter}.weight"] = [LowRank(down, up, scale, magnitude)]
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    for key, saved in module.modules_to_save[NAME].named_parameters():
                        self.whole[f"{parameter}.{key}"] = saved.detach()
        # PEFT saves embeddings that were resized without wrapping them.
        for name, saved in model.named_parameters(remove_duplicate=False):
            if not saved.is_meta and name in ("model.embed_tokens.weight", "lm_head.weight"):
                self.whole.setdefault(name, saved.detach())


def _by_expert(
    wrapper: Any, down: torch.Tensor, up: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each expert of a layer, taken apart by PEFT."""
    wrapper.lora_A[NAME].weight = torch.nn.Parameter(down, requires_grad=False)
    wrapper.lora_B[NAME].weight = torch.nn.Parameter(up, requires_grad=False)
    if wrapper.num_experts == 1:
        yield down, up
        return
    ups, downs, _ = wrapper.get_delta_factors(NAME)
    yield from zip(downs, ups, strict=True)


def weightless(checkpoint: Path) -> PreTrainedModel:
    """The base model in float32 on the meta device: its modules without their weights."""
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def attached(folder: Path, model: PreTrainedModel) -> Any:
    """A weightless model with an adapter on it, whose tensors alone are in memory."""
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    from workflow_scripts.scoring.transformers_model import embedding_rows

    n_rows = embedding_rows(folder / "adapter_model.safetensors")
    if n_rows not in (None, model.config.vocab_size):
        model.resize_token_embeddings(n_rows, mean_resizing=False)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    adapted = PeftModel(model, config, low_cpu_mem_usage=True)
    set_peft_model_state_dict(
        adapted, load_peft_weights(str(folder), device="cpu"), low_cpu_mem_usage=True
    )
    return adapted.get_base_model()
