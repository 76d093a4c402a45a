"""The adapter alone as a GGUF LoRA, so that several runs share one base at run time.

By llama.cpp's own converter. llama.cpp scales every module by alpha ÷ its rank; where training had
another scale (rsLoRA, alpha patterns) B is multiplied by what is missing.

python -m workflow_scripts.quantize.convert_adapter --adapter adapter/ --checkpoint checkpoint/
    --name my-run --gguf my-run-adapter.gguf
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files, log
from workflow_scripts.log import StageError
from workflow_scripts.quantize import llama_cpp_source

if TYPE_CHECKING:
    from workflow_scripts.merge.adapter import Adapter
    from workflow_scripts.merge.tensor_names import Part

OUTPUT_VERSION = 1
logger = log.stage_logger("convert_adapter")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of train_adapter")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--name", required=True, help="the adapter's name in the file's metadata")
    parser.add_argument("--gguf", type=Path, required=True, help="to write: GGUF LoRA")
    arguments = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as name, files.atomic_file(arguments.gguf) as gguf:
        # The converter takes the name of the folder for the adapter's.
        staged, base = Path(name, arguments.name), Path(name, "base")
        for folder in (staged, base):
            folder.mkdir()
        # Of the base it reads the configuration alone.
        shutil.copyfile(arguments.checkpoint / "config.json", base / "config.json")
        n_modules = stage_adapter(arguments.adapter, staged)
        command = [sys.executable, str(llama_cpp_source.converter("convert_lora_to_gguf.py"))]
        # 16 bits would lose the small values that B has after a short training.
        command += ["--base", str(base), "--outfile", str(gguf), "--outtype", "f32", str(staged)]
        if subprocess.run(command, check=False).returncode or not gguf.is_file():
            raise StageError(
                "llama.cpp's converter failed", where=arguments.adapter, found=" ".join(command)
            )
    logger.info(
        "converted n_modules=%d size_bytes=%d path=%s",
        n_modules,
        arguments.gguf.stat().st_size,
        arguments.gguf,
    )


def stage_adapter(source: Path, folder: Path) -> int:
    """Write the adapter as llama.cpp will apply it; how many matrices it changes.

    Raises:
        StageError: it changes more than a product of two low-rank matrices can.
    """
    from safetensors.torch import save_file

    from workflow_scripts.merge.adapter import PREFIX, Adapter

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
        # llama.cpp multiplies by alpha ÷ rank itself: for a plain LoRA nothing is left, and the
        # factor is exactly 1.
        up = up * (adapter.scale_of(part) * len(down) / config["lora_alpha"])
        # Cloned: the halves of an expert share A, which safetensors refuses to write twice.
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down.clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    files.write_json(folder / "adapter_config.json", {"lora_alpha": config["lora_alpha"]})
    return len(tensors) // 2


def parts(adapter: Adapter) -> Iterator[tuple[str, Part]]:
    """What the adapter changes, with the names of modules that the converter knows."""
    from workflow_scripts.merge.tensor_names import Part, expert_parts

    for parameter in sorted(adapter.targets):
        if ".mlp.experts." in parameter:
            yield from expert_parts(parameter, n_experts=adapter.n_experts(parameter))
        else:
            yield parameter.removesuffix(".weight"), Part(parameter)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
