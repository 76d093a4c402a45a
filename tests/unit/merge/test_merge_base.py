from __future__ import annotations

import pytest
import torch

from tests.gates import DEQUANTIZED
from tests.training import manifest_of
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.merge import merge_base


def test_a_base_is_given_by_name_or_read_from_the_choice(tmp_path):
    assert merge_base.chosen("original") == "original"
    assert merge_base.chosen("dequantized") == "dequantized"
    DEQUANTIZED.write(tmp_path / "merge_base.json")
    assert merge_base.chosen(str(tmp_path / "merge_base.json")) == "dequantized"


def test_a_choice_without_a_base_is_a_stage_error(tmp_path):
    choice = DEQUANTIZED.model_dump() | {"merge_base": "newest"}
    files.write_json(tmp_path / "merge_base.json", choice)
    with pytest.raises(StageError, match="no such base") as caught:
        merge_base.chosen(str(tmp_path / "merge_base.json"))
    assert "original or dequantized" in str(caught.value)


def test_the_dtype_of_training_is_the_manifests_or_else_the_bases(
    checkpoint, uniform_adapter, tmp_path
):
    assert merge_base.nf4_dtype("original", uniform_adapter, checkpoint) is None
    assert merge_base.nf4_dtype("dequantized", uniform_adapter, checkpoint) == torch.bfloat16
    manifest_of(compute_dtype="float16").write(tmp_path / "training_manifest.json")
    assert merge_base.nf4_dtype("dequantized", tmp_path, checkpoint) == torch.float16
