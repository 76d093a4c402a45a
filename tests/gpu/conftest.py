"""Fixtures of the CUDA tests. Tests that can also run on the CPU, so that they keep working."""

from __future__ import annotations

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request) -> str:
    return request.param


@pytest.fixture
def cuda() -> str:
    """The CUDA device, for tests that need one."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    return "cuda"
