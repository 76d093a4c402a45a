"""The files of an adapter as llama.cpp's converter reads them.

llama.cpp scales every module by alpha ÷ its rank. If training used another scale (rsLoRA, alpha
patterns), B is multiplied by the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.merge.adapter import PREFIX, Adapter
from workflow_scripts.merge.tensor_names import Part, expert_parts


def write(source: Path, folder: Path) -> int:
    """Write the adapter as llama.cpp will apply it; returns the number of matrices it changes.

    Raises:
        StageError: the adapter is more than products of two low-rank matrices.
    """
    adapter = Adapter(source)
    config = files.read_json(source / "adapter_config.json")
    if adapter.whole or adapter.magnitudes:
        raise StageError(
            "the adapter is more than a LoRA, and a GGUF adapter is not",
            where=source,
            found=", ".join(sorted(adapter.whole | adapter.magnitudes)[:10]),
            expected="LoRA or rsLoRA, without DoRA, modules_to_save or a full fine-tune",
            to_fix="use the merged model's GGUF",
        )
    tensors = {}
    for name, part in parts(adapter):
        down, up = adapter.factors(part)
        # llama.cpp multiplies by alpha ÷ rank itself: for a plain LoRA the factor is exactly 1.
        up = up * (adapter.scale_of(part) * len(down) / config["lora_alpha"])
        # Cloned: the halves of an expert share A, and safetensors refuses to write it twice.
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down.clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    files.write_json(folder / "adapter_config.json", {"lora_alpha": config["lora_alpha"]})
    return len(tensors) // 2


def parts(adapter: Adapter) -> Iterator[tuple[str, Part]]:
    """Yield the parts that the adapter changes, with module names that the converter knows."""
    for parameter in sorted(adapter.targets):
        if ".mlp.experts." in parameter:
            yield from expert_parts(parameter, n_experts=adapter.n_experts(parameter))
        else:
            yield parameter.removesuffix(".weight"), Part(parameter)
