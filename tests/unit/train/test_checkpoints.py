from __future__ import annotations

import logging

import pytest

from tests.training import identity_of
from workflow_scripts import files
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train.checkpoints import Checkpoints, all_steps_down, differences

IDENTITY = identity_of(recipe=RecipeSettings(learning_rate=1e-4, rank=8), plan="a" * 64)


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "run", IDENTITY)
    opened.open()
    return opened


def write(checkpoints, step):
    with checkpoints.writing(step) as folder:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "weights").write_text(str(step))


def test_the_newest_checkpoint_is_of_the_latest_step_and_not_last_in_the_alphabet(checkpoints):
    assert checkpoints.newest() is None
    for step in (9, 10, 100):
        write(checkpoints, step)
    assert checkpoints.newest() == checkpoints.folder / "checkpoint-100"
    checkpoints.keep_newest(2)
    names = {path.name for path in checkpoints.folder.glob("checkpoint-*")}
    assert names == {"checkpoint-10", "checkpoint-100"}


def test_a_checkpoint_whose_writing_failed_is_absent_and_the_previous_one_is_kept(checkpoints):
    write(checkpoints, 1)
    with pytest.raises(OSError, match="full"), checkpoints.writing(2) as folder:
        (folder / "checkpoint-2").mkdir()
        (folder / "checkpoint-2" / "weights").write_text("ha")
        raise OSError("full")
    assert checkpoints.newest().name == "checkpoint-1"
    assert {path.name for path in checkpoints.folder.iterdir()} == {"checkpoint-1", "identity.json"}


def test_a_checkpoint_appears_only_when_it_is_complete(checkpoints):
    with checkpoints.writing(3) as folder:
        (folder / "checkpoint-3").mkdir()
        assert checkpoints.newest() is None
    assert checkpoints.newest().name == "checkpoint-3"


def test_an_incomplete_checkpoint_of_a_killed_process_is_removed(checkpoints, caplog):
    (checkpoints.folder / ".writing" / "checkpoint-5").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        checkpoints.open()
    assert "incomplete" in caplog.text
    assert checkpoints.newest() is None and not (checkpoints.folder / ".writing").exists()


def test_a_step_written_twice_keeps_the_later_checkpoint(checkpoints):
    write(checkpoints, 4)
    with checkpoints.writing(4) as folder:
        (folder / "checkpoint-4").mkdir()
        (folder / "checkpoint-4" / "weights").write_text("again")
    assert (checkpoints.newest() / "weights").read_text() == "again"


def test_other_settings_start_from_scratch_and_log_what_differs(checkpoints, tmp_path, caplog):
    write(checkpoints, 7)
    other = identity_of(recipe=RecipeSettings(learning_rate=2e-4, rank=8), plan="b" * 64)
    afresh = Checkpoints(tmp_path / "run", other)
    with caplog.at_level(logging.WARNING):
        afresh.open()
    assert afresh.newest() is None
    assert str(checkpoints.folder) in caplog.text
    assert "recipe.learning_rate: 0.0001 → 0.0002" in caplog.text
    assert "plan: aaaaaaaaaaaa… → bbbbbbbbbbbb…" in caplog.text
    assert "rank" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        Checkpoints(tmp_path / "another run", IDENTITY).open()
    assert not caplog.text


def test_differences_include_leaves_of_either_side():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "d": 3}}) == [
        "a.d: None → 3",
        "c: 2 → None",
    ]


def test_stepping_down_is_remembered_until_the_run_is_done(checkpoints, tmp_path):
    assert checkpoints.n_steps_down == 0 == all_steps_down(tmp_path / "run")
    checkpoints.step_down()
    assert Checkpoints(tmp_path / "run", IDENTITY).n_steps_down == 1
    assert all_steps_down(tmp_path / "run") == 1
    checkpoints.remove()
    assert checkpoints.n_steps_down == 0
    assert files.fingerprint(IDENTITY.model_dump(mode="json")) == checkpoints.folder.name
