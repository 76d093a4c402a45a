from __future__ import annotations

import pytest

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.release import frozen

NAMES = {"model": "tiny", "dataset": "chats", "packing": "apart", "recipe": "lora"}
CONFIG = {
    "model": {"source": "/models/tiny", "license": None},
    "dataset": {"cleaning": {"min_characters": 1}},
    "packing": {"row_tokens": 64},
    "recipe": {"rank": 8, "learning_rate": 0.01},
    "gguf": {"quantizations": ["Q8_0"], "quantized_by": None},
    "evaluation": {"piece_tokens": 64},
}


@pytest.fixture
def release(tmp_path):
    made = {
        "run": "one",
        **NAMES,
        "config": {**CONFIG, "model": {"source": "tiny", "license": None}},
    }
    files.write_json(tmp_path / "provenance.json", made)
    return tmp_path


def test_unchanged_settings_are_accepted(release):
    frozen.check("one", NAMES, CONFIG, release)


def test_a_later_key_and_another_quantizer_s_name_are_accepted(release):
    config = CONFIG | {
        "recipe": CONFIG["recipe"] | {"new": 1},
        "gguf": CONFIG["gguf"] | {"quantized_by": "me"},
    }
    frozen.check("one", NAMES, config, release)


def test_a_release_with_fewer_settings_is_compared_by_those(release):
    made = {"run": "one", **NAMES, "config": {"recipe": {"rank": 8}}}
    files.write_json(release / "provenance.json", made)
    frozen.check("one", NAMES, CONFIG, release)


def test_a_run_without_a_release_is_not_checked(tmp_path):
    frozen.check("one", NAMES, CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("names", "config", "where"),
    [
        ({}, {"recipe": {"rank": 16, "learning_rate": 0.01}}, "runs.one, recipes.lora: rank"),
        ({"recipe": "other"}, {}, "runs.one, recipes.other: name"),
        ({}, {"dataset": {"cleaning": {"min_characters": 2}}}, "cleaning.min_characters"),
        ({}, {"recipe": {"rank": 8}}, "runs.one, recipes.lora: learning_rate"),
        ({}, {"evaluation": {"piece_tokens": 32}}, "evaluation.piece_tokens"),
        ({}, {"gguf": {"quantizations": ["Q8_0", "Q4_K_M"]}}, "gguf.quantizations"),
    ],
)
def test_a_changed_setting_is_named(release, names, config, where):
    with pytest.raises(StageError, match="the frozen run one was made with other") as caught:
        frozen.check("one", {**NAMES, **names}, {**CONFIG, **config}, release)
    assert where in str(caught.value) and "provenance.json" in str(caught.value)
