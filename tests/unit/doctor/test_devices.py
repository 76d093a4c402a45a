from __future__ import annotations

import dataclasses

import pytest

from tests.unit.doctor.conftest import by_name
from workflow_scripts.doctor import devices, probes

# As nvidia-smi of driver 580 prints it.
SMI = """
case "$1" in
--query-gpu*) echo "NVIDIA A10, 8.6, 23028, 22500, {driver}" ;;
*) echo "| NVIDIA-SMI {driver}      Driver Version: {driver}     CUDA Version: {cuda}     |" ;;
esac
"""
ON_A10 = probes.Torch(
    version="2.13.0+cu130",
    cuda="13.0",
    cuda_error=None,
    devices=(probes.Device("NVIDIA A10", (8, 6), total_bytes=23028 << 20, free_bytes=22500 << 20),),
    has_bf16=True,
    attention=probes.Tried(0.004, "varlen_attn"),
    bitsandbytes=probes.Tried(0.091, "0.50.2"),
)


@pytest.fixture(scope="module")
def torch_here():
    return probes.ask_torch()


def gpu_finding(gpus, failed, n_wanted, cluster_gpus=()):
    (found,) = devices.gpu_findings(gpus, failed, n_wanted=n_wanted, cluster_gpus=cluster_gpus)
    return found


def test_gpus_and_driver_are_read_from_nvidia_smi(command):
    command("nvidia-smi", SMI.format(driver="580.82.07", cuda="13.0"))
    gpus, driver, failed = devices.nvidia_smi()
    assert failed is None
    assert gpus == [devices.Gpu("NVIDIA A10", "8.6", 23028 << 20, 22500 << 20)]
    assert driver == devices.Driver("580.82.07", (13, 0))
    found = gpu_finding(gpus, failed, 1)
    assert (found.status, found.found) == (
        "ok",
        "NVIDIA A10, capability 8.6, 23.6 of 24.1 GB free",
    )


def test_fewer_gpus_than_training_wants_are_missing_unless_slurm_has_them(command):
    command("nvidia-smi", SMI.format(driver="580.82.07", cuda="13.0"))
    gpus, _, _ = devices.nvidia_smi()
    assert gpu_finding(gpus, None, 2).status == "missing"
    offered = gpu_finding(gpus, None, 2, ["gpu:a100:4 in gpu"])
    assert offered.status == "warning" and "gpu:a100:4 in gpu" in offered.found
    assert gpu_finding([], None, 0).status == "ok"


def test_a_driver_that_does_not_answer_is_told_in_its_own_words(command):
    message = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    command("nvidia-smi", f'echo "{message}"; exit 9')
    gpus, driver, failed = devices.nvidia_smi()
    assert (gpus, driver, failed) == ([], None, message)
    assert gpu_finding(gpus, failed, 1).status == "missing"
    assert gpu_finding(gpus, failed, 0).status == "warning"


def test_a_torch_without_cuda_beside_a_gpu_names_the_build_that_has_it(command, torch_here):
    if torch_here.cuda:
        pytest.skip("torch is built for CUDA here")
    command("nvidia-smi", SMI.format(driver="580.82.07", cuda="13.0"))
    _, driver, _ = devices.nvidia_smi()
    found = by_name(devices.torch_findings(torch_here, driver, needs_gpu=True, locked="2.13.0"))[
        "PyTorch"
    ]
    assert found.status == "missing" and "built without CUDA" in found.found
    assert "torch==2.13.0" in found.to_fix and "cu130" in found.to_fix


@pytest.mark.parametrize(
    ("cuda", "status"), [("12.8", "missing"), ("13.0", "ok"), ("13.2", "ok"), ("14.0", "ok")]
)
def test_a_driver_serves_its_own_cuda_and_older_ones(command, cuda, status):
    command("nvidia-smi", SMI.format(driver="570.1", cuda=cuda))
    _, driver, _ = devices.nvidia_smi()
    found = by_name(devices.torch_findings(ON_A10, driver, needs_gpu=True, locked="2.13.0"))
    assert found["PyTorch"].status == status
    assert found["bfloat16"].status == "ok"


def test_an_older_gpu_and_a_library_that_fails_are_told():
    turing = dataclasses.replace(
        ON_A10,
        devices=(probes.Device("NVIDIA T4", (7, 5), total_bytes=15 << 30, free_bytes=15 << 30),),
        has_bf16=False,
        bitsandbytes=probes.Tried(failure="RuntimeError: CUDA Setup failed"),
    )
    driver = devices.Driver("580.82.07", (13, 0))
    found = by_name(devices.torch_findings(turing, driver, needs_gpu=True, locked="2.13.0"))
    assert found["bfloat16"].status == "warning" and "7.5" in found["bfloat16"].found
    assert found["4-bit weights"].status == "missing"
    assert found["4-bit weights"].found == "RuntimeError: CUDA Setup failed"


def test_attention_with_a_window_and_a_4_bit_product_are_computed_here(torch_here):
    found = by_name(devices.torch_findings(torch_here, None, needs_gpu=False, locked="2.13.0"))
    assert {finding.status for finding in found.values()} == {"ok"}
    # float32 on a CPU: 7e-7 measured. NF4's rounding of normal weights: 9.1 %.
    assert 0 < torch_here.attention.error < (0.03 if torch_here.devices else 1e-5)
    assert 0.05 < torch_here.bitsandbytes.error < 0.13


def test_without_nvidia_smi_the_gpus_are_those_of_pytorch(command):
    assert devices.seen_by(ON_A10) == [devices.Gpu("NVIDIA A10", "8.6", 23028 << 20, 22500 << 20)]
    assert devices.seen_by(probes.NoAnswer("No module named 'torch'")) == []
    command("nvidia-smi", SMI.format(driver="580.82.07", cuda="13.0"))
    assert devices.nvidia_smi()[0] == devices.seen_by(ON_A10)


def test_a_wrong_product_is_missing_though_it_was_computed():
    wrong = dataclasses.replace(ON_A10, attention=probes.Tried(0.9, "varlen_attn"))
    found = by_name(devices.torch_findings(wrong, None, needs_gpu=True, locked="2.13.0"))
    assert found["attention"].status == "missing"


def test_llama_cpp_tells_how_it_was_built():
    llama = probes.ask_llama_cpp()
    found = by_name(devices.llama_cpp_findings(llama, has_gpu=False, locked="0.3.36"))
    assert found["llama.cpp"].status == "ok" and "0.3.36, built for the" in found["llama.cpp"].found
    if not llama.offloads:
        (beside_gpu,) = devices.llama_cpp_findings(llama, has_gpu=True, locked="0.3.36")
        assert beside_gpu.status == "warning" and "-DGGML_CUDA=on" in beside_gpu.to_fix


def test_a_library_that_ends_its_process_ends_no_more_than_that(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    llama = probes.ask_llama_cpp()
    (found,) = devices.llama_cpp_findings(llama, has_gpu=False, locked="0.3.36")
    assert found.status == "missing" and "ended by signal 4" in found.found
