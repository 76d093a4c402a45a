"""A build of the demo's config and overlays on it, without Snakemake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workflow_scripts.orchestration.build import Build
from workflow_scripts.settings import config_files, load_config

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def build() -> Callable[..., Build]:
    """`build({"runs": …}, cores=8)`: of the demo's config with an overlay."""

    def make(overlay: dict[str, Any] | None = None, **options: Any) -> Build:
        config = config_files.layered([config_files.read(config_files.DEMO), overlay or {}])
        return Build(load_config(config), config, **options)

    return make
