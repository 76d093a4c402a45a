"""A link of the chain on the command line: the files of the model that is measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from workflow_scripts.handover.facts import Facts
from workflow_scripts.settings import settings_from_json
from workflow_scripts.settings.fields import Settings

TableT = TypeVar("TableT", bound=Settings)


@dataclass(frozen=True)
class Link:
    """A GGUF, or a checkpoint with what is applied to it when it is loaded."""

    facts_path: Path
    checkpoint: Path | None
    """Folder of a base, merged or AWQ model; None for a GGUF."""
    adapter: Path | None
    """Folder of train_adapter, applied to the loaded checkpoint."""
    precision: Literal["native", "int8", "nf4"]
    gguf: Path | None
    n_threads: int
    """CPU threads of llama.cpp."""

    @cached_property
    def facts(self) -> Facts:
        """Facts of the base model."""
        return Facts.read(self.facts_path)


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    kind: type[TableT],
    table: str,
    *,
    takes_gguf: bool = True,
) -> tuple[argparse.Namespace, TableT, Link]:
    """Add the arguments of settings and a link to a program's own, and parse them all.

    Args:
        kind: class of the settings.
        table: their table in the config.
        takes_gguf: False for a program that needs the sliding window, which llama.cpp ignores: it
            takes no GGUF and no number of threads.
    """
    parser.add_argument("--settings", required=True, help=f"JSON of `{table}`")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="folder of a base, merged or AWQ model")
    parser.set_defaults(gguf=None, threads=1)
    if takes_gguf:
        model.add_argument("--gguf", type=Path, help="GGUF file")
        parser.add_argument("--threads", type=int, required=True, help="CPU threads of llama.cpp")
    parser.add_argument("--adapter", type=Path, help="folder of train_adapter, applied live")
    parser.add_argument(
        "--precision",
        choices=["native", "int8", "nf4"],
        default="native",
        help="native: float32 on a CPU, a 16-bit type on a GPU (float16 for an AWQ model); int8,"
        " nf4: the 8-bit and the 4-bit base of training",
    )
    arguments = parser.parse_args(argv)
    link = Link(
        arguments.facts,
        arguments.checkpoint,
        arguments.adapter,
        arguments.precision,
        arguments.gguf,
        arguments.threads,
    )
    return arguments, settings_from_json(kind, arguments.settings), link
