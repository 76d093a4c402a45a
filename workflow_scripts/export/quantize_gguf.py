"""Quantize the F16 GGUF with llama.cpp's own quantizer, through llama-cpp-python.

python -m workflow_scripts.export.quantize_gguf --gguf run-F16.gguf --type Q4_K_M --threads 2
    --quantized run-Q4_K_M.gguf
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.log import StageError

OUTPUT_VERSION = 1
logger = log.stage_logger("quantize_gguf")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="F16 GGUF")
    parser.add_argument("--type", required=True, help="quantization type, such as Q4_K_M")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads")
    parser.add_argument("--quantized", type=Path, required=True, help="to write: GGUF")
    arguments = parser.parse_args(argv)

    import llama_cpp

    file_type = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{arguments.type}", None)
    if file_type is None:
        raise StageError(
            "llama.cpp has no such quantization type",
            where="gguf.quantizations",
            found=arguments.type,
            to_fix="see config/README.md for the types",
        )
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = arguments.threads
    with files.atomic_file(arguments.quantized) as temporary:
        code = llama_cpp.llama_model_quantize(
            str(arguments.gguf).encode(), str(temporary).encode(), ctypes.byref(params)
        )
        if code:
            raise StageError(
                "llama.cpp's quantizer failed",
                where=arguments.gguf,
                found=f"code {code}; its own message stands above",
            )
    logger.info(
        "quantized type=%s size_bytes=%d path=%s",
        arguments.type,
        arguments.quantized.stat().st_size,
        arguments.quantized,
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
