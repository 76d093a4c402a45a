"""A finished build of the demo, and the counts of the check, printed whether it passes or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.demo.questions import Answered

RESULTS = REPOSITORY / "results"
BASE = RESULTS / "models" / "demo" / "checkpoint"
DTYPES = ("bfloat16", "float16", "float32")
COUNTS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """The base in three types and several shards, with values that bfloat16 does not hold."""
    from transformers import MistralForCausalLM

    folder = tmp_path_factory.mktemp("bases")
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        model = MistralForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters() if dtype != "bfloat16" else ():
                parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=generator))
        model.to(getattr(torch, dtype)).save_pretrained(folder / dtype, max_shard_size="100MB")
    return {dtype: folder / dtype for dtype in DTYPES}


@pytest.fixture
def record_counts(pytestconfig) -> Callable[[str, Sequence[Answered]], None]:
    """Note what a model made of the questions."""

    def record(name: str, answers: Sequence[Answered]) -> None:
        n_asked = sum(one.question.asked_signature is not None for one in answers)
        pytestconfig.stash.setdefault(COUNTS, []).append(
            f"{name}: {sum(one.is_ended for one in answers)} of {len(answers)} answers end by EOS,"
            f" {sum(one.has_right_signature for one in answers)} of {n_asked} signatures are right"
        )

    return record


def pytest_terminal_summary(terminalreporter, config) -> None:
    for line in config.stash.get(COUNTS, []):
        terminalreporter.write_line(line)
