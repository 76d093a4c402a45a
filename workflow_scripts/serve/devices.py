"""Settings to run a release on this machine: context, GPU layers, threads. Imports no llama.cpp."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from workflow_scripts.release.modelfile import DEFAULT_CONTEXT_TOKENS


@dataclass(frozen=True)
class Device:
    """Settings to run a model on this machine."""

    n_ctx: int | None = None
    """Context in tokens; None is `DEFAULT_CONTEXT_TOKENS`, or less if the release has less."""
    n_gpu_layers: int | None = None
    """Layers on the GPU, −1 for all; None is all if llama.cpp was built for a GPU."""
    n_threads: int | None = None
    """CPU threads; None leaves the choice to llama-cpp-python."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every program that loads a release."""
    parser.add_argument(
        "--n-ctx",
        type=int,
        help=f"context, tokens; default: {DEFAULT_CONTEXT_TOKENS}, or less if the release has less",
    )
    parser.add_argument(
        "--n-gpu-layers",
        type=int,
        help="layers on the GPU, -1 for all; default: all, if llama.cpp was built for a GPU",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: half the cores")
