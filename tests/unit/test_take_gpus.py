"""Each job has exclusive GPUs, waits until enough are free, and frees them when it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workflow_scripts.take_gpus import BATCH_JOBS, listed_gpus, visible_gpus

REPOSITORY = Path(__file__).resolve().parents[2]
TAKE = [sys.executable, "-m", "workflow_scripts.take_gpus"]
# Prints its GPUs, when it began and when it ended, and holds them for N seconds.
HOLD = """
import json, os, sys, time
began = time.time()
gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
print("running", gpus, flush=True)
time.sleep(float(sys.argv[2]))
with open(sys.argv[1], "w") as file:
    json.dump({"gpus": gpus, "began": began, "ended": time.time()}, file)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Two GPU names; the launcher needs no real GPU."""
    program = tmp_path / "hold.py"
    program.write_text(HOLD)
    kept = {name: value for name, value in os.environ.items() if name not in BATCH_JOBS}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(REPOSITORY),
    }


def start(environment: dict[str, str], n_gpus: int, seconds: float, file: Path):
    program = str(Path(environment["TMPDIR"], "hold.py"))
    return subprocess.Popen(
        [*TAKE, str(n_gpus), sys.executable, program, str(file), str(seconds)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(environment: dict[str, str], n_gpus: int) -> subprocess.CompletedProcess[str]:
    code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    return subprocess.run(
        [*TAKE, str(n_gpus), sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def most_at_once(jobs: list[dict], gpu: str) -> int:
    holding = [job for job in jobs if gpu in job["gpus"].split(",")]
    return max(
        sum(other["began"] <= job["began"] < other["ended"] for other in holding) for job in holding
    )


SNAKEFILE = """
rule all:
    input: [f"{name}.json" for name in config["jobs"].split(",")]

rule job:
    output: "{name}.json"
    log: "{name}.log"
    resources: gpu=1
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python hold.py {output:q} 3 > {log:q} 2>&1"
"""


def build(environment: dict[str, str], names: str, gpu: int) -> list[dict]:
    """Parallel jobs of a workflow that requests GPUs as ours does."""
    folder = Path(environment["TMPDIR"])
    (folder / "Snakefile").write_text(SNAKEFILE)
    arguments = ["--cores", "4", "--resources", f"gpu={gpu}", "--config", f"jobs={names}"]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{name}.json").read_text()) for name in names.split(",")]


def test_two_jobs_at_once_under_snakemake_have_a_gpu_each(environment) -> None:
    one, other = build(environment, "a,b", gpu=2)
    assert {one["gpus"], other["gpus"]} == {"0", "1"}
    assert one["began"] < other["ended"] and other["began"] < one["ended"]


def test_three_jobs_share_two_gpus_one_after_another_and_the_log_says_who_waits(
    environment, tmp_path: Path
) -> None:
    # As if there are more slots than GPUs, or two workflows run on one machine.
    jobs = build(environment, "a,b,c", gpu=3)
    assert {job["gpus"] for job in jobs} == {"0", "1"}
    assert most_at_once(jobs, "0") == most_at_once(jobs, "1") == 1
    logs = [(tmp_path / f"{name}.log").read_text() for name in "abc"]
    assert sum("other jobs use them" in text for text in logs) == 1


def test_a_job_of_two_gpus_waits_for_both_and_has_both(environment, tmp_path: Path) -> None:
    first = start(environment, 1, 2, tmp_path / "first.json")
    assert "took" in first.stdout.readline()
    pair = start(environment, 2, 0, tmp_path / "pair.json")
    late = start(environment, 2, 0, tmp_path / "late.json")
    for process in (first, pair, late):
        assert process.wait(60) == 0, process.stdout.read()
    jobs = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("first", "pair", "late")]
    assert [job["gpus"] for job in jobs] == ["0", "0,1", "0,1"]
    assert most_at_once(jobs, "0") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_job_frees_its_gpu(environment, tmp_path: Path, number: int) -> None:
    environment["CUDA_VISIBLE_DEVICES"] = "1"
    first = start(environment, 1, 600, tmp_path / "first.json")
    while "running 1" not in first.stdout.readline():
        pass
    second = start(environment, 1, 0, tmp_path / "second.json")
    assert "other jobs use them" in second.stdout.readline()
    assert second.poll() is None
    first.send_signal(number)
    assert second.wait(30) == 0
    assert json.loads((tmp_path / "second.json").read_text())["gpus"] == "1"
    first.wait()


def test_too_many_gpus_is_an_error_that_counts_them(environment) -> None:
    done = run(environment, 3)
    assert done.returncode == 1
    for part in ("fewer GPUs", "2 (0,1)", "expected: 3", "training.gpus"):
        assert part in done.stderr


def test_with_0_gpus_or_without_any_the_command_runs_unchanged(environment, tmp_path: Path) -> None:
    assert run(environment, 0).stdout == "0,1\n"
    for none in ("", "-1"):
        assert run(environment | {"CUDA_VISIBLE_DEVICES": none}, 1).stdout == f"{none}\n"
    del environment["CUDA_VISIBLE_DEVICES"]
    environment["PATH"] = str(tmp_path)  # no nvidia-smi there
    assert run(environment, 1).stdout == "None\n"
    assert not list(tmp_path.glob("tramontane-gpus*"))


def test_a_batch_systems_gpus_belong_to_the_job(environment, tmp_path: Path) -> None:
    for n_gpus in (2, 4):  # on this node; on two nodes
        assert run(environment | {"SLURM_JOB_ID": "7"}, n_gpus).stdout == "0,1\n"
    # Snakemake inside a batch job shares only that job's GPUs.
    holder = start(environment | {"SLURM_JOB_ID": "7"}, 1, 600, tmp_path / "held.json")
    while "running 0" not in holder.stdout.readline():
        pass
    assert run(environment | {"SLURM_JOB_ID": "7"}, 1).stdout == "1\n"
    assert run(environment | {"SLURM_JOB_ID": "8"}, 1).stdout == "0\n"
    holder.kill()
    holder.wait()


def test_an_exit_code_is_that_of_the_command(environment) -> None:
    command = [*TAKE, "1", sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 7


# Output in the driver's documentation.
WHOLE = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-1f8f7e3b-7e4d-4a3a-bb3a-0a3c1de0c0f1)
"""
PARTITIONED = """GPU 0: A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: A100-SXM4-40GB (UUID: GPU-1f8f7e3b-7e4d-4a3a-bb3a-0a3c1de0c0f1)
"""


def test_gpus_are_counted_by_nvidia_smi_if_no_variable_names_them(
    tmp_path: Path, monkeypatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{WHOLE}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert visible_gpus({}) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, 5"}) == ["3", "5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,-1,5"}) == ["2"]


def test_instances_of_a_partitioned_gpu_count_one_by_one() -> None:
    assert listed_gpus(PARTITIONED) == [
        "1",
        "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f",
        "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb",
    ]
    assert listed_gpus("No devices found.\n") == []


def test_waiting_takes_no_processor_time(environment, tmp_path: Path) -> None:
    import psutil

    environment["CUDA_VISIBLE_DEVICES"] = "0"
    first = start(environment, 1, 600, tmp_path / "first.json")
    while "running 0" not in first.stdout.readline():
        pass
    second = start(environment, 1, 0, tmp_path / "second.json")
    assert "other jobs use them" in second.stdout.readline()
    process = psutil.Process(second.pid)
    before = process.cpu_times()
    time.sleep(3)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.3  # measured 0.00
    for job in (first, second):
        job.kill()
        job.wait()
