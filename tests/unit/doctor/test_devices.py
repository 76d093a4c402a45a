from __future__ import annotations

import dataclasses

import pytest

from tests.unit.doctor.conftest import by_name
from workflow_scripts.doctor import devices, probes

ON_A10 = probes.Torch(
    version="2.13.0+cu130",
    cuda="13.0",
    cuda_error=None,
    driver="580.82.07",
    gpu_models=["GPU 0: NVIDIA A10"],
    devices=[probes.Device("NVIDIA A10", "8.6", total_bytes=23028 << 20, free_bytes=22500 << 20)],
    is_fast=True,
    attention=probes.Tried(0.004, "varlen_attn"),
    four_bit=probes.Tried(0.091, "0.50.2"),
)
WITHOUT_CUDA = dataclasses.replace(
    ON_A10,
    version="2.13.0+cpu",
    cuda=None,
    cuda_error="AssertionError: Torch not compiled with CUDA enabled",
    devices=[],
    is_fast=False,
)


@pytest.fixture(scope="module")
def torch_here():
    return probes.ask_torch()


def gpu_finding(torch, n_wanted, cluster_gpus=()):
    return devices.gpu_finding(torch, n_wanted=n_wanted, cluster_gpus=cluster_gpus)


def torch_findings(torch, *, needs_gpu=True):
    return by_name(devices.torch_findings(torch, needs_gpu=needs_gpu, locked="2.13.0"))


def test_gpus_are_listed_with_their_free_memory():
    found = gpu_finding(ON_A10, 1)
    assert (found.status, found.found) == (
        "ok",
        "NVIDIA A10, capability 8.6, 23.6 of 24.1 GB free",
    )


def test_fewer_gpus_than_training_needs_are_missing_unless_slurm_has_them():
    assert gpu_finding(ON_A10, 2).status == "missing"
    offered = gpu_finding(ON_A10, 2, ["gpu:a100:4 in gpu"])
    assert offered.status == "warning" and "gpu:a100:4 in gpu" in offered.found
    assert gpu_finding(WITHOUT_CUDA, 1).status == "missing"
    assert gpu_finding(WITHOUT_CUDA, 0).status == "ok"
    assert gpu_finding(probes.NoAnswer("No module named 'torch'"), 1).status == "missing"


def test_the_gpus_of_the_driver_are_those_that_nvidia_smi_lists(command):
    command("nvidia-smi", 'case "$1" in -L) echo "GPU 0: NVIDIA A10 (UUID: GPU-1)" ;; esac')
    assert probes.ask_torch().gpu_models == ["GPU 0: NVIDIA A10"]


def test_a_torch_without_cuda_next_to_a_gpu_names_the_build_with_cuda():
    found = torch_findings(WITHOUT_CUDA)["PyTorch"]
    assert found.status == "missing" and "built without CUDA" in found.found
    assert "torch==2.13.0" in found.to_fix and "cu130" in found.to_fix
    assert torch_findings(WITHOUT_CUDA, needs_gpu=False)["PyTorch"].status == "warning"


def test_a_gpu_that_pytorch_cannot_use_is_reported_in_its_own_words():
    reason = "RuntimeError: The NVIDIA driver on your system is too old (found version 12080)."
    old = dataclasses.replace(ON_A10, devices=[], is_fast=False, cuda_error=reason)
    found = torch_findings(old)["PyTorch"]
    assert found.status == "missing" and reason in found.found and "580.82.07" in found.found
    assert torch_findings(ON_A10)["PyTorch"].status == "ok"
    assert torch_findings(ON_A10)["bfloat16"].status == "ok"


def test_an_older_gpu_and_a_library_that_fails_are_reported():
    turing = dataclasses.replace(
        ON_A10,
        devices=[probes.Device("NVIDIA T4", "7.5", total_bytes=15 << 30, free_bytes=15 << 30)],
        is_fast=False,
        four_bit=probes.Tried(failure="RuntimeError: CUDA Setup failed"),
    )
    found = torch_findings(turing)
    assert found["bfloat16"].status == "warning" and "7.5" in found["bfloat16"].found
    assert found["4-bit weights"].status == "missing"
    assert found["4-bit weights"].found == "RuntimeError: CUDA Setup failed"


def test_attention_with_a_window_and_a_4_bit_product_are_computed_here(torch_here):
    found = torch_findings(torch_here, needs_gpu=False)
    assert {finding.status for finding in found.values()} == {"ok"}
    # float32 on a CPU: 7e-7 measured. NF4's rounding of normal weights: 9.1 %.
    assert 0 < torch_here.attention.error < (0.03 if torch_here.devices else 1e-5)
    assert 0.05 < torch_here.four_bit.error < 0.13


def test_a_wrong_product_is_missing_although_it_was_computed():
    wrong = dataclasses.replace(ON_A10, attention=probes.Tried(0.9, "varlen_attn"))
    assert torch_findings(wrong)["attention"].status == "missing"


def test_llama_cpp_reports_how_it_was_built():
    llama = probes.ask_llama_cpp()
    found = by_name(devices.llama_cpp_findings(llama, has_gpu=False, locked="0.3.36"))
    assert found["llama.cpp"].status == "ok" and "0.3.36, built for the" in found["llama.cpp"].found
    if not llama.offloads:
        (with_gpu,) = devices.llama_cpp_findings(llama, has_gpu=True, locked="0.3.36")
        assert with_gpu.status == "warning" and "-DGGML_CUDA=on" in with_gpu.to_fix


def test_a_library_that_ends_its_process_does_not_end_the_doctor(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    llama = probes.ask_llama_cpp()
    (found,) = devices.llama_cpp_findings(llama, has_gpu=False, locked="0.3.36")
    assert found.status == "missing" and "ended by signal 4" in found.found
