from __future__ import annotations

from pathlib import Path

import pytest

from workflow_scripts.orchestration.gates import Gate

RUN = {"run": "mistral", "dataset": "chats", "model": "demo"}


@pytest.fixture
def gate(tmp_path):
    return Gate(str(tmp_path / "{run}" / "gguf_check.json"), '{"kl_divergence_nats":1e-05}', 2)


@pytest.fixture
def leave(gate):
    """Write the files of an attempt: a verdict and, if it passed, its settings."""

    def write(*, passed_with: str | None, **changes):
        names = RUN | changes
        for path, text in ((gate.verdict, "{}"), (gate.passed, passed_with)):
            file = Path(path.format(**names))
            file.parent.mkdir(exist_ok=True)
            if text is not None:
                file.write_text(text)

    return write


def test_a_verdict_is_valid_only_with_the_settings_it_passed_with(gate, leave):
    assert not gate.is_valid(RUN)
    leave(passed_with=gate.record)
    assert gate.is_valid(RUN)
    assert not gate._replace(settings='{"kl_divergence_nats":1e-06}').is_valid(RUN)
    assert not gate._replace(version=3).is_valid(RUN)


def test_a_gate_judges_again_if_a_verdict_is_no_longer_valid(gate, leave):
    other = RUN | {"run": "generic"}
    assert not gate.judges_again([RUN, other])  # nothing was judged yet
    leave(passed_with=gate.record)
    assert not gate.judges_again([RUN, other])
    leave(passed_with=None, run="generic")
    assert gate.judges_again([RUN, other])


def test_the_param_of_a_gate_changes_until_it_passes_and_then_stays(gate, leave):
    recorded: list[str] = []

    def attempt() -> str:
        return gate.last_attempt(RUN, lambda path: recorded)

    first, second = attempt(), attempt()
    assert first != second
    leave(passed_with=None)  # failed: Snakemake restored the previous verdict
    recorded[:] = ["2", repr(gate.settings), repr(second)]
    assert attempt() not in {first, second}
    leave(passed_with=gate.record)
    assert attempt() == second
    recorded.clear()  # a copied folder, without Snakemake's records
    assert attempt() == ""
