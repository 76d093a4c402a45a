"""Memory that really runs out in training: the run steps down once, or says what to do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.unit.train.conftest import REPOSITORY, Prepared, Run
from workflow_scripts import files
from workflow_scripts.packing.packing import Pieces, best_fit
from workflow_scripts.packing.plan import write_plan

N_LAYERS, ROW_TOKENS = 8, 2048
RECIPE = {"rank": 8, "rows_per_step": 1, "max_steps": 2, "evaluations": 0, "keeps_best": False}
# Freed large tensors are returned to the system, as on a GPU. With CI=true transformers also logs
# to the root's handlers.
ENVIRONMENT = {
    "CI": "true",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


@pytest.fixture(scope="module")
def long_rows(
    make_checkpoint, write_facts, random_documents, plan_of, tmp_path_factory
) -> Prepared:
    """Rows so long that activations are most of the memory of training."""
    folder = tmp_path_factory.mktemp("long rows")
    checkpoint = make_checkpoint(
        folder / "checkpoint", num_hidden_layers=N_LAYERS, intermediate_size=768,
        max_position_embeddings=ROW_TOKENS,
    )  # fmt: skip
    lengths = [ROW_TOKENS] * 3
    random_documents(folder / "train.arrow", lengths)
    random_documents(folder / "validation.arrow", [30, 50], seed=9)
    rows = best_fit(Pieces.whole(lengths), row_tokens=ROW_TOKENS, seed=0)
    write_plan(folder / "plan.parquet", plan_of(rows, row_tokens=ROW_TOKENS))
    facts = write_facts(checkpoint, folder / "facts.json")
    return Prepared(checkpoint, facts, folder, folder / "plan.parquet")


def train(prepared, folder, limit_bytes, **training) -> tuple[int, str]:
    """Exit code and output."""
    command = [sys.executable, "-m", "tests.unit.train.limited_memory", str(limit_bytes)]
    done = subprocess.run(
        [*command, *prepared.arguments(RECIPE, folder, **training)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
        env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    (folder / "log").write_text(done.stderr)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def unlimited(long_rows, tmp_path_factory) -> tuple[Run, int]:
    """A run without a limit, and the memory it took."""
    folder = tmp_path_factory.mktemp("unlimited")
    code, text = train(long_rows, folder, 0)
    assert code == 0, text
    return Run.read(folder), int(text.splitlines()[0])


def test_a_run_steps_down_once_and_ends_with_the_same_result(unlimited, long_rows, tmp_path):
    whole, took_bytes = unlimited
    assert whole.manifest.n_checkpointed_layers == 0
    code, text = train(long_rows, tmp_path, int(0.9 * took_bytes))
    assert code == 0, text
    assert "the memory ran out" in text and "DefaultCPUAllocator" in text
    found = Run.read(tmp_path)
    assert 0 < found.manifest.n_checkpointed_layers <= N_LAYERS
    for one, other in zip(found.history.train, whole.history.train, strict=True):
        assert one.model_dump() == pytest.approx(other.model_dump(), rel=1e-5)
    assert list((tmp_path / "resume").iterdir()) == []


def test_the_second_time_it_ends_with_settings_that_take_less(unlimited, long_rows, tmp_path):
    _, took_bytes = unlimited
    code, text = train(long_rows, tmp_path, int(0.25 * took_bytes))
    assert code == 1
    assert text.count("the memory ran out") == 2
    assert_says_what_to_do(text)
    (memory,) = tmp_path.glob("resume/*/memory.json")
    assert files.read_json(memory)


def test_settings_that_leave_no_choice_are_kept(unlimited, long_rows, tmp_path):
    _, took_bytes = unlimited
    fixed = {
        "rows_per_micro_batch": 1,
        "gradient_checkpointing": "off",
        "offload_activations": False,
    }
    code, text = train(long_rows, tmp_path, int(0.9 * took_bytes), **fixed)
    assert code == 1 and text.count("the memory ran out") == 1
    assert_says_what_to_do(text)
    assert "training.gradient_checkpointing: full" in text


def assert_says_what_to_do(text):
    assert "Traceback" not in text
    # From the allocator, or from the system if the weights could not be mapped again.
    assert "DefaultCPUAllocator" in text or "Cannot allocate memory" in text, text
    for part in ("predicted: ", "to fix:", "rows  recomputed  offloads"):
        assert part in text, text
