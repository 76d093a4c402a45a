"""How fast this machine multiplies matrices: the rate that training is measured against.

The largest product a GPU is good at, in the type that training computes in: no kernel of ours, no
figure from a data sheet, at the clock that the machine runs at now.

python -m tests.benchmarks.matrix_rate --measured rate.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log

CUDA_SIZE, CPU_SIZE = 8_192, 1_024
N_WARM_UP, N_MEASURED = 5, 20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    files.write_json(arguments.measured, measure())


def measure() -> dict[str, Any]:
    """Median rate of the product of two square matrices of normal numbers."""
    import torch

    from workflow_scripts.models.checkpoint import compute_dtype, default_device

    device = default_device()
    dtype = compute_dtype(device)
    size = CUDA_SIZE if device.type == "cuda" else CPU_SIZE
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(N_WARM_UP + N_MEASURED):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "flops_per_second": 2 * size**3 / statistics.median(seconds[N_WARM_UP:]),
    }


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
