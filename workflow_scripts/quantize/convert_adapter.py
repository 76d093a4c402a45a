"""Convert the adapter alone to a GGUF LoRA with llama.cpp's own converter, so that several runs can
share one base at run time.

python -m workflow_scripts.quantize.convert_adapter --adapter adapter/ --checkpoint checkpoint/
    --name my-run --gguf my-run-adapter.gguf
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.quantize import llama_cpp_source

OUTPUT_VERSION = 1
logger = log.stage_logger("convert_adapter")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of train_adapter")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--name", required=True, help="the adapter's name in the file's metadata")
    parser.add_argument("--gguf", type=Path, required=True, help="to write: GGUF LoRA")
    arguments = parser.parse_args(argv)

    from workflow_scripts.quantize import lora_files

    with tempfile.TemporaryDirectory() as name, files.atomic_file(arguments.gguf) as gguf:
        # The converter takes the name of the folder as the adapter's name.
        staged, base = Path(name, arguments.name), Path(name, "base")
        for folder in (staged, base):
            folder.mkdir()
        # Of the base model it reads only the config.
        shutil.copyfile(arguments.checkpoint / "config.json", base / "config.json")
        n_modules = lora_files.write(arguments.adapter, staged)
        # 16 bits would lose the small values of B after a short training.
        options = ["--base", str(base), "--outtype", "f32", str(staged)]
        llama_cpp_source.convert("convert_lora_to_gguf.py", arguments.adapter, gguf, *options)
    logger.info(
        "converted n_modules=%d size_bytes=%d path=%s",
        n_modules,
        arguments.gguf.stat().st_size,
        arguments.gguf,
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
