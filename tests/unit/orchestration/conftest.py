"""A build of the demo's config and overlays on it, without Snakemake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.utils import update_config

from workflow_scripts.orchestration.build import Build
from workflow_scripts.settings import load_config

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def build() -> Callable[..., Build]:
    """`build({"runs": …}, cores=8)`: config.yaml with an overlay."""

    def make(overlay: dict[str, Any] | None = None, **options: Any) -> Build:
        config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text("utf-8"))
        update_config(config, overlay or {})
        return Build(load_config(config), config, **options)

    return make
