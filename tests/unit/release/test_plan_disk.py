from __future__ import annotations

import json
import shutil
from collections import namedtuple
from typing import get_args

import pytest

from tests.facts import MISTRAL_7B
from workflow_scripts.handover.plans import DiskPlan
from workflow_scripts.release import plan_disk
from workflow_scripts.settings import GgufSettings, QuantizationType, TensorType

Usage = namedtuple("Usage", "total used free")
# Mistral 7B v0.3: 7.248e9 weights in three files.
MISTRAL = MISTRAL_7B.changed(
    files={
        "config.json": {"size_bytes": 600},
        **{f"model-{n}.safetensors": {"size_bytes": 14_496_078_512 // 3} for n in range(3)},
    }
)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    def run(
        *, free_gb, runs=("one",), quantizations=("Q8_0", "Q5_K_M", "Q4_K_M"), awq=False, **gguf
    ):
        MISTRAL.write(tmp_path / "facts.json")
        (tmp_path / "results").mkdir(exist_ok=True)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(free_gb * 1e9)))
        settings = {
            "runs": dict.fromkeys(runs, "m"),
            "gguf": {"quantizations": quantizations, **gguf},
            "awq": awq,
        }
        path = tmp_path / "disk_plan.json"
        return plan_disk.main, [
            *("--facts", f"m={tmp_path / 'facts.json'}", "--settings", json.dumps(settings)),
            *("--results", tmp_path / "results", "--disk-plan", path),
        ]

    return run


def test_a_7b_with_three_quantizations_takes_about_fifty_gigabytes(plan, tmp_path):
    main, arguments = plan(free_gb=60)
    main([str(argument) for argument in arguments])
    needed = DiskPlan.read(tmp_path / "disk_plan.json").needed_bytes
    assert 45e9 < needed < 50e9


def test_awq_counts_too(plan, tmp_path):
    needed = []
    for awq in (False, True):
        main, arguments = plan(free_gb=60, awq=awq)
        main([str(argument) for argument in arguments])
        needed.append(DiskPlan.read(tmp_path / "disk_plan.json").needed_bytes)
    # Mistral 7B in AWQ is 4.15 GB on the Hub.
    assert 4e9 < needed[1] - needed[0] < 4.5e9


def test_a_full_disk_is_refused_with_the_largest_files(plan, tmp_path, ends_with_message):
    message = ends_with_message(*plan(free_gb=40, runs=("one", "two")))
    parts = (
        "no room",
        "40.0 GB free",
        "expected: 9",
        "runs/one/merged 14.5",
        "retention",
        "doctor",
    )
    for part in parts:
        assert part in message
    assert not (tmp_path / "disk_plan.json").exists()


def test_a_width_that_k_quants_do_not_support_is_planned_with_their_fallback():
    """SmolLM2-135M as a Mistral has 125,093,000 weights and width 576. llama.cpp wrote 94,409,952
    bytes in Q4_K_M, where 4.9 bits per weight would be 76.6 MB, 133,766,880 in Q8_0 and 80,849,216
    in Q4_0."""
    shape, size = MISTRAL_7B.changed(hidden_size=576, intermediate_size=1536), 250_186_136
    settings = GgufSettings(quantizations=["Q8_0", "Q4_K_M", "Q4_0"])
    sizes = plan_disk.files_of("one", shape, size, settings)
    # Its output layer fell back to Q8_0; 4.34 bits per weight would be 67.9 MB.
    assert 80_849_216 < plan_disk.MARGIN * sizes["runs/one/gguf/one-Q4_0.gguf"] < 85e6
    assert plan_disk.MARGIN * sizes["runs/one/gguf/one-Q4_K_M.gguf"] > 94_409_952
    assert 133_766_880 < plan_disk.MARGIN * sizes["runs/one/gguf/one-Q8_0.gguf"] < 140e6
    assert plan_disk.MARGIN * sizes["runs/one/gguf/one-F16.gguf"] > 250_994_400
    even = plan_disk.files_of("one", shape.changed(hidden_size=512), size, settings)
    assert even["runs/one/gguf/one-Q4_K_M.gguf"] < 80e6


def test_existing_files_are_not_counted(plan, tmp_path):
    main, arguments = plan(free_gb=40)
    (tmp_path / "results" / "runs" / "one" / "merged").mkdir(parents=True)
    main([str(argument) for argument in arguments])
    needed = DiskPlan.read(tmp_path / "disk_plan.json").needed_bytes
    assert 30e9 < needed < 36e9


def test_every_type_has_a_size_and_a_mix_has_that_of_its_largest_type():
    assert {*get_args(QuantizationType), *get_args(TensorType)} <= plan_disk.BITS_PER_WEIGHT.keys()
    mixed = GgufSettings(
        mixes={"own": {"type": "Q2_K", "output": "Q8_0"}}, quantizations=["Q2_K", "own", "Q8_0"]
    )
    sizes = plan_disk.files_of("r", MISTRAL, MISTRAL.weight_bytes, mixed)
    assert sizes["runs/r/gguf/r-Q2_K.gguf"] < sizes["runs/r/gguf/r-own.gguf"]
    assert sizes["runs/r/gguf/r-own.gguf"] == sizes["runs/r/gguf/r-Q8_0.gguf"]


def test_the_merged_model_of_a_float32_base_has_half_its_size():
    base = MISTRAL.changed(dtype="float32")
    sizes = plan_disk.files_of("r", base, base.weight_bytes, GgufSettings())
    assert sizes["runs/r/merged"] == pytest.approx(14_496_078_512 / 2, rel=1e-6)


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.release.plan_disk")
    assert done.returncode == 0
    assert imported.isdisjoint({"torch", "transformers"})
