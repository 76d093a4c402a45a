"""The tiny workflow through Slurm, and training that Slurm ends or spreads over nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import OVERLAY, Cluster, configured

pytestmark = pytest.mark.slurm
RUN = {
    "model": "demo",
    "dataset": "stdlib-help",
    "packing": "swa-aware-demo",
    "recipe": "mistral-lora-demo",
}


@pytest.fixture(scope="session")
def built(cluster: Cluster, prepared: Path) -> tuple[Path, str]:
    """The tiny workflow made to its end through Slurm, and what Snakemake said."""
    code, output = cluster.run(prepared, *configured(prepared, OVERLAY), seconds=900)
    assert code == 0, output[-8000:]
    return prepared, output
