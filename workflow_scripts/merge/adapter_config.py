"""Contents of adapter_config.json: the modules it names, with rank and scale of each.

Source: PEFT 0.21, `check_target_module_exists` and `get_pattern_key` in tuners/tuners_utils.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.merge.tensor_names import TIED

# Modules that PEFT takes for linear layers; a mixture's experts and router are parameters.
LINEAR = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj|lm_head"
)
EMBEDDINGS = {*TIED, *TIED.values()}
# Options that change the arithmetic and are not implemented: an adapter with one is refused.
UNSUPPORTED = (
    "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "velora_config", "kasa_config",
)  # fmt: skip
# Other initializations also change the base, so that B·A alone is not the whole change.
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva")


class AdapterConfig:
    """An adapter_config.json.

    Attributes:
        is_full: a full fine-tune: the file holds the trained weights themselves.
        uses_dora: each row of a sum is scaled to a trained length.
        keeps_ties: embeddings that are also the output layer were trained as one.
    Raises:
        StageError: neither a LoRA nor a full fine-tune, or a LoRA with parts that are not merged
            here.
    """

    def __init__(self, path: Path) -> None:
        self._content = files.read_json(path)
        self.is_full: bool = self._content.get("method") == "full"
        self.uses_dora = bool(self._content.get("use_dora"))
        self.keeps_ties = self.is_full or bool(self._content.get("ensure_weight_tying"))
        if not self.is_full:
            self._check(path)

    def _check(self, path: Path) -> None:
        config = self._content
        if config.get("peft_type") != "LORA":
            raise StageError(
                "the adapter is not a LoRA",
                where=path,
                found=config.get("peft_type"),
                expected="LORA, or method: full",
            )
        used = [key for key in UNSUPPORTED if config.get(key)]
        for key, plain in (("bias", ("none",)), ("init_lora_weights", PLAIN_INITIALIZATIONS)):
            if config.get(key, plain[0]) not in plain:
                used.append(f"{key}: {config[key]}")
        if used:
            raise StageError(
                "the adapter has parts that are not merged here",
                where=path,
                found=", ".join(used),
                expected="LoRA, rsLoRA or DoRA, with experts and modules_to_save",
            )

    def rank(self, name: str) -> int:
        """Rank of a module (or an expert parameter).

        Args:
            name: in full.
        """
        return self._matching("rank_pattern", name, self._content["r"])

    def scale(self, name: str) -> float:
        """alpha ÷ rank, or alpha ÷ √rank, of a module (or an expert parameter).

        Args:
            name: in full.
        """
        rank = self.rank(name)
        alpha = self._matching("alpha_pattern", name, self._content["lora_alpha"])
        return alpha / (math.sqrt(rank) if self._content.get("use_rslora") else rank)

    def _matching(self, key: str, name: str, default: int) -> int:
        for pattern, value in (self._content.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    def names_whole(self, parameter: str) -> bool:
        """True if the file holds a trained tensor for the parameter, instead of A and B.

        PEFT also saves embeddings on its own, once they have been resized.
        """
        saved = self._content.get("modules_to_save") or []
        if saved and self._content.get("ensure_weight_tying"):
            saved = [*saved, "embed_tokens", "lm_head"]  # PEFT names one of the two, stores both
        return parameter in EMBEDDINGS or _is_named(parameter.removesuffix(".weight"), saved)

    def saves_modules(self) -> bool:
        """True if `modules_to_save` names any."""
        return bool(self._content.get("modules_to_save"))

    def expert_targets(self) -> set[str]:
        """Expert parameters that `target_parameters` names: gate_up_proj, down_proj."""
        named = self._content.get("target_parameters") or []
        return {name.rpartition(".")[2] for name in named} & {"gate_up_proj", "down_proj"}

    def names(self, parameter: str) -> bool:
        """True if the config of a LoRA names the base model's parameter."""
        config, module = self._content, parameter.removesuffix(".weight")
        targets = config.get("target_parameters") or []
        if any(parameter.endswith(f".{target}") for target in targets):
            return True
        if _is_named(module, config.get("modules_to_save")):
            return True
        linear = LINEAR.fullmatch(module)
        if linear is None or _is_named(module, config.get("exclude_modules")):
            return False
        layers = config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        if layers and linear["layer"] and int(linear["layer"]) not in layers:
            return False
        modules = config.get("target_modules")
        return (modules == "all-linear" and module != "lm_head") or _is_named(module, modules)


def _is_named(module: str, wanted: str | list[str] | None) -> bool:
    """True if PEFT counts the module among those that a config names.

    Args:
        wanted: a pattern of the whole name, or ends of names.
    """
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in wanted or [])
