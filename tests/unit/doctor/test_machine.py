from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.unit.doctor.conftest import by_name, model_overlay
from tests.unit.doctor.test_hub_access import CONFIG
from workflow_scripts.doctor import machine

# Mistral 7B: 7.248e9 weights of 16 bits.
WEIGHT_BYTES = 14_496_078_512


@pytest.fixture
def mistral_7b(tmp_path):
    """A folder with the shape and the size of Mistral 7B; its weights are a sparse file."""
    folder = tmp_path / "mistral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(WEIGHT_BYTES)
    return folder


def findings(wanted, gpu_bytes=None, has_torch=True):
    return machine.findings(wanted, gpu_bytes=gpu_bytes, has_torch=has_torch)


def test_the_demo_fits_here(wanted):
    found = by_name(findings(wanted()))
    assert {found[name].status for name in ("disk", "memory")} == {"ok"}


def test_a_7b_fits_a_gpu_of_24_gb_and_not_one_of_4(wanted, mistral_7b):
    config = wanted(model_overlay(str(mistral_7b)))
    found = by_name(findings(config, gpu_bytes=int(24e9)))
    fits = found["memory, r"]
    assert fits.status == "ok", fits
    # Weights of 14.5 GB, and 4 GB on top.
    assert found["memory"].expected.startswith("18 GB")
    fails = by_name(findings(config, gpu_bytes=int(4e9)))["memory, r"]
    assert fails.status == "missing"
    assert "4.0 GB free" in fails.found and fails.to_fix


def test_without_torch_the_memory_of_training_is_not_predicted(wanted, mistral_7b):
    found = by_name(findings(wanted(model_overlay(str(mistral_7b))), has_torch=False))
    assert found["memory, r"].status == "warning" and "PyTorch" in found["memory, r"].found


def test_without_a_gpu_the_finding_says_how_large_one_must_be(wanted, mistral_7b):
    from workflow_scripts.train.memory import fit
    from workflow_scripts.train.memory.layouts import Layouts
    from workflow_scripts.train.memory.shape import PlannedRun

    config = wanted(model_overlay(str(mistral_7b)))
    found = by_name(findings(config))
    recipe = config.config.recipes["mistral-lora"]
    run = PlannedRun(
        config.shapes["m"], recipe, config.config.training, row_tokens=4096, device_type="cuda"
    )
    least = Layouts.of(run).smallest.peak / (1 - fit.MARGIN)
    assert found["memory, r"].status == "ok"
    assert f"at least {least / 1e9:.1f} GB of a GPU" in found["memory, r"].found


def test_the_disk_must_hold_what_plan_disk_counts_and_the_download(wanted, mistral_7b):
    config = wanted(model_overlay(str(mistral_7b)))
    needs = by_name(findings(config))["disk"]
    # Merged and F16 of 14.5 GB, Q8_0 of 7.7, Q4_0 of 4.1, 3 % more.
    assert "writes 42.1" in needs.found, needs
    config.download_bytes["m"] = int(1e15)
    found = by_name(findings(config))["disk"]
    assert found.status == "missing" and "1000042.1 GB" in found.expected
    assert "gguf.quantizations" in found.to_fix


def test_a_full_file_system_is_missing(wanted, mistral_7b, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", results], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        found = by_name(findings(wanted()))["disk"]
    finally:
        subprocess.run(["umount", results], check=True)
    assert found.status == "missing" and "0.0 GB free" in found.found


def test_a_model_that_is_not_fetched_yet_leaves_memory_and_disk_unknown(wanted):
    found = by_name(findings(wanted(model_overlay("owner/model")), gpu_bytes=int(24e9)))
    assert found["memory, r"].status == found["disk"].status == "warning"
    assert "not known" in found["disk"].found


def test_only_the_cores_that_this_process_may_use_count(wanted):
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert by_name(findings(wanted()))["CPU"].found.startswith("1 core")
    finally:
        os.sched_setaffinity(0, before)
