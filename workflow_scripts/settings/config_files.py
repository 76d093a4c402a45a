"""Config files: which are read, and in which order.

The catalogue (config/config.yaml: packings and recipes) comes first. Over it come the files of
`--configfile`, each replacing what it names. Without `--configfile` the demo is built, unless the
folder in which Snakemake runs has a config/config.yaml of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.log import StageError

FOLDER = Path(__file__).resolve().parents[2] / "config"
CATALOGUE = FOLDER / "config.yaml"
DEMO = FOLDER / "demo.yaml"
OWN = Path("config", "config.yaml")
"""Config of a project that keeps its files apart from the workflow (`--directory`)."""


def defaults(overlays: Sequence[Path]) -> list[Path]:
    """Files to read after the catalogue and before those of `--configfile`.

    Args:
        overlays: files of `--configfile`.
    """
    if OWN.is_file() and not OWN.samefile(CATALOGUE):
        return [OWN]
    return [] if overlays else [DEMO]


def layered(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:  # untyped: as YAML gave them
    """The catalogue with each config merged over it, in order.

    Tables merge key by key; a list or a value replaces the one before.

    Raises:
        StageError: the catalogue cannot be read.
    """
    from snakemake.utils import update_config

    merged = read(CATALOGUE)
    for config in configs:
        update_config(merged, config)
    return merged


def read(path: Path) -> dict[str, Any]:  # untyped: as YAML gave it
    """One config file, as Snakemake reads it.

    Raises:
        StageError: the file does not exist, or is not a YAML or JSON mapping.
    """
    from snakemake.common.configfile import load_configfile
    from snakemake_interface_common.exceptions import WorkflowError

    try:
        config: dict[str, Any] = load_configfile(path)
    except WorkflowError as error:
        raise StageError("a config file cannot be read", where=path, found=error) from error
    return config
