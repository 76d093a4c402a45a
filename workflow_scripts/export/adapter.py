"""A LoRA adapter on disk, as PEFT saves it: the delta of each weight it changes.

Delta = alpha ÷ rank · B·A (arXiv:2106.09685), in float32; rank and alpha of a module are those of
the first pattern that matches the end of its name, as in PEFT.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from workflow_scripts import files
from workflow_scripts.log import StageError

PREFIX = "base_model.model."
# What changes the arithmetic and is not built here: refuse it rather than merge it wrongly.
UNSUPPORTED = ("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "target_parameters")


class Adapter:
    """Deltas by the base model's tensor names.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
    Raises:
        StageError: it is no LoRA adapter, or one of a kind that is not merged here.
    """

    def __init__(self, folder: Path) -> None:
        self._config = files.read_json(folder / "adapter_config.json")
        if self._config.get("peft_type") != "LORA":
            raise StageError(
                "the adapter is no LoRA",
                where=folder / "adapter_config.json",
                found=self._config.get("peft_type"),
                expected="LORA",
            )
        used = [key for key in UNSUPPORTED if self._config.get(key)]
        if used or self._config.get("bias", "none") != "none":
            raise StageError(
                "the adapter has parts that are not merged here",
                where=folder / "adapter_config.json",
                found=", ".join(used) or f"bias: {self._config['bias']}",
                expected="plain LoRA",
            )
        self._tensors = safe_open(folder / "adapter_model.safetensors", framework="pt")
        stored = set(self._tensors.keys())
        self.targets: set[str] = {
            name.removeprefix(PREFIX).removesuffix(".lora_A.weight") + ".weight"
            for name in stored
            if name.endswith(".lora_A.weight")
        }
        unknown = {name for name in stored if not re.search(r"\.lora_[AB]\.weight$", name)}
        if unknown:
            raise StageError(
                "the adapter holds tensors that are not merged here",
                where=folder / "adapter_model.safetensors",
                found=", ".join(sorted(unknown)[:10]),
                expected="lora_A and lora_B alone",
            )

    def scale(self, module: str) -> float:
        """alpha ÷ rank of a module, by its full name."""
        rank = _matching(self._config.get("rank_pattern"), module, self._config["r"])
        alpha = _matching(self._config.get("alpha_pattern"), module, self._config["lora_alpha"])
        return alpha / rank

    def delta(self, target: str) -> torch.Tensor:
        """(out, in) float32, to be added to the base tensor `target`."""
        module = target.removesuffix(".weight")
        down = self._tensors.get_tensor(f"{PREFIX}{module}.lora_A.weight").float()
        up = self._tensors.get_tensor(f"{PREFIX}{module}.lora_B.weight").float()
        return (up @ down).mul_(self.scale(module))


def _matching(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
