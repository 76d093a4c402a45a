"""The counts of the check, printed whether it passes or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.demo.questions import Answered

COUNTS = pytest.StashKey[list[str]]()


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
