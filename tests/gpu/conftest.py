"""What the CUDA tests share. A body that can runs on the CPU too, so that it keeps working."""

from __future__ import annotations

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request) -> str:
    return request.param


@pytest.fixture
def cuda() -> str:
    """For what only a GPU has."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    return "cuda"
