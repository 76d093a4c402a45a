"""The links of the chain as command-line arguments: which files make up the model that is
measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.scoring.precision import measured_precision

if TYPE_CHECKING:
    from workflow_scripts.scoring.transformers_model import TransformersModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint` (with `--adapter`, `--precision`) or `--gguf`, and `--threads`."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="folder of a base, merged or AWQ model")
    model.add_argument("--gguf", type=Path, help="GGUF file")
    _add_adapter_and_precision(parser)
    parser.add_argument("--threads", type=int, required=True, help="CPU threads of llama.cpp")


def add_transformers_arguments(parser: argparse.ArgumentParser) -> None:
    """The links that honour the window: `--checkpoint`, with `--adapter` and `--precision`."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a model")
    _add_adapter_and_precision(parser)


def _add_adapter_and_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, help="folder of train_adapter, applied live")
    parser.add_argument(
        "--precision",
        choices=["native", "int8", "nf4"],
        default="native",
        help="native: float32 on a CPU, the 16-bit type on a GPU (of an AWQ model float16); int8,"
        " nf4: the 8-bit and the 4-bit base of training",
    )


def size_bytes(arguments: argparse.Namespace) -> int | None:
    """Of the link's weights on the disk, an adapter's beside its base's; None for a base that is
    quantized as it is loaded."""
    if arguments.gguf:
        return arguments.gguf.stat().st_size
    if arguments.precision != "native":
        return None
    from workflow_scripts.models.checkpoint_files import weight_files

    files = list(weight_files(arguments.checkpoint))
    if arguments.adapter:
        files.append(arguments.adapter / "adapter_model.safetensors")
    return sum(path.stat().st_size for path in files)


def load_transformers(arguments: argparse.Namespace, facts: ModelShape) -> TransformersModel:
    """The model that `--checkpoint`, `--adapter` and `--precision` name.

    Args:
        facts: of the base.
    """
    from workflow_scripts.scoring.transformers_model import TransformersModel

    return TransformersModel(
        arguments.checkpoint,
        window=facts.sliding_window,
        precision=measured_precision(arguments.precision, arguments.checkpoint),
        rope=facts.rope_parameters,
        adapter=arguments.adapter,
    )
