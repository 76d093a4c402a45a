"""Quantize the F16 GGUF with llama.cpp's own quantizer, through llama-cpp-python.

The file is the same as llama-quantize's, bit for bit; its metadata names the importance matrix.

python -m workflow_scripts.quantize.quantize_gguf --gguf run-F16.gguf
    --settings '{"type": "Q4_K_M"}' --imatrix imatrix.gguf --threads 2 --quantized run-Q4_K_M.gguf
"""

from __future__ import annotations

import argparse
import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files, log
from workflow_scripts.log import StageError
from workflow_scripts.settings import TENSORS_NEED_IMATRIX, MixSettings, settings_from_json

if TYPE_CHECKING:
    import numpy as np

OUTPUT_VERSION = 1
# Rows of one tensor in memory at once. Without a limit the experts of a Mixtral layer take 3 GB.
BUFFER_BYTES = 512 * 2**20
logger = log.stage_logger("quantize_gguf")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="F16 GGUF")
    parser.add_argument("--settings", required=True, help="JSON of `gguf.mixes.<name>`")
    parser.add_argument("--imatrix", type=Path, help="file of compute_imatrix; default: none")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads")
    parser.add_argument("--quantized", type=Path, required=True, help="to write: GGUF")
    arguments = parser.parse_args(argv)
    mix = settings_from_json(MixSettings, arguments.settings)

    import llama_cpp

    from workflow_scripts.quantize import imatrix, quantizer

    importance: dict[str, np.ndarray] = {}
    overrides: list[tuple[str, str | int]] = []
    if arguments.imatrix:
        matrix = imatrix.read(arguments.imatrix)
        importance = matrix.importance()
        overrides = [
            ("quantize.imatrix.file", str(arguments.imatrix)),
            *(("quantize.imatrix.dataset", name) for name in matrix.datasets[:1]),
            ("quantize.imatrix.entries_count", len(importance)),
            *(("quantize.imatrix.chunks_count", n) for n in [matrix.n_chunks] if n),
        ]
    if mix.tensors:
        check_patterns(mix, list(quantizer.tensor_table(arguments.gguf)), arguments.gguf)

    llama_cpp.llama_backend_init()
    params = quantizer.parameters(mix, n_threads=arguments.threads)
    params.max_buf_size = BUFFER_BYTES
    if importance:
        params.imatrix = quantizer.imatrix_entries(importance)
        params.kv_overrides = quantizer.metadata_overrides(overrides)
    with files.atomic_file(arguments.quantized) as temporary:
        code = llama_cpp.llama_model_quantize(
            str(arguments.gguf).encode(), str(temporary).encode(), ctypes.byref(params)
        )
        if code:
            raise StageError(
                "llama.cpp's quantizer failed",
                where=arguments.gguf,
                found=f"code {code}; its own message is above",
            )
    logger.info(
        "quantized type=%s n_importances=%d size_bytes=%d path=%s",
        mix.type,
        len(importance),
        arguments.quantized.stat().st_size,
        arguments.quantized,
    )


def check_patterns(mix: MixSettings, names: Sequence[str], path: Path) -> None:
    """Check that every pattern finds a tensor, and sets no type that makes llama.cpp abort.

    llama.cpp would ignore a pattern that finds nothing. Output layer and embeddings have no
    importance matrix: a type that needs one fails an assertion there, with a message elsewhere.
    """
    left = {"output.weight", "token_embd.weight"} - {
        f"{key}.weight" for key in ("output", "token_embd") if getattr(mix, key)
    }
    for pattern, kind in mix.tensors.items():
        found = {name for name in names if re.search(pattern, name)}
        where = f"gguf.mixes.<name>.tensors, {pattern}"
        if not found:
            raise StageError(
                "a pattern finds no tensor",
                where=where,
                expected=f"part of a name in {path}, such as {min(names)}",
            )
        if kind in TENSORS_NEED_IMATRIX and found & left:
            raise StageError(
                f"{kind} needs an importance matrix, which some tensors never have",
                where=where,
                found=", ".join(sorted(found & left)),
                to_fix="set `output` and `token_embd`, or name a narrower pattern",
            )
        left -= found


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
