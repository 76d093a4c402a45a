"""Slurm for real: what a job is given, and what becomes of one that fails, is cancelled or lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.slurm.conftest import Cluster, configured, output_of, processes_in, wait_until
from tests.workflow.conftest import copy_workflow

pytestmark = pytest.mark.slurm


GPU_JOBS = """
rule all:
    input: "1.txt", "2.txt", "cpu.txt"

rule on_gpu:
    output: "{n}.txt"
    wildcard_constraints: n="[12]"
    resources: gpu=1, mem_mb=100, runtime=2
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu} bash -c '"
        "echo $CUDA_VISIBLE_DEVICES $SLURMD_NODENAME"
        " $(squeue --noheader --jobs $SLURM_JOB_ID --format %P); sleep 8' > {output}"

rule on_cpu:
    output: "cpu.txt"
    resources: mem_mb=100, runtime=2
    shell:
        "echo $(squeue --noheader --jobs $SLURM_JOB_ID --format %P)"
        " ${{CUDA_VISIBLE_DEVICES-none}} > {output}"
"""


def test_a_job_with_a_gpu_sees_its_own_in_a_partition_of_gpus(cluster: Cluster, small) -> None:
    folder = small(GPU_JOBS)
    code, output = cluster.run(folder, seconds=120)
    assert code == 0, output
    devices, nodes, partitions = zip(
        *((folder / f"{n}.txt").read_text().split() for n in (1, 2)), strict=True
    )
    assert partitions == ("gpu", "gpu")
    assert set(devices) <= {"0", "1"}
    # Both ran at once: the same node gave each another.
    assert nodes[0] != nodes[1] or devices[0] != devices[1]
    assert (folder / "cpu.txt").read_text().split() in (["cpu", "none"], ["cpu", "NoDevFiles"])


def test_the_message_of_a_program_that_failed_on_a_node_reaches_the_user(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "failing"
    folder.mkdir()
    copy_workflow(folder)
    (folder / "chats.jsonl").write_text('{"nothing": "that is a chat"}\n')
    datasets = {"mine": {"sources": {"chats": {"files": ["chats.jsonl"]}}}}
    target = "results/data/mine/clean/train.parquet"
    arguments = configured(folder, {"datasets": datasets})
    code, output = cluster.run(folder, target, "--retries", 0, *arguments, seconds=180)
    assert code == 1
    log = (folder / "logs/data/mine/clean_dataset.log").read_text()
    message = log[log.index("clean_dataset: ") :].splitlines()[0]
    assert "to fix" in log and message in output
    # What Slurm itself kept: named in the output, with the same message in it.
    kept = list((folder / ".snakemake" / "slurm_logs" / "rule_clean_dataset").rglob("*.log"))
    assert len(kept) == 1 and str(kept[0]) in output


LOST_NODE = """
rule long:
    output: "done.txt"
    resources: mem_mb=100, runtime=5
    shell: "echo $SLURMD_NODENAME >> nodes.txt; sleep 15; touch {output}"
"""


def test_a_job_whose_node_goes_away_is_run_on_another(cluster: Cluster, small) -> None:
    folder = small(LOST_NODE)
    process = cluster.start(folder, "done.txt", "--retries", 0)
    wait_until((folder / "nodes.txt").exists, 60, "the job starts")
    node = (folder / "nodes.txt").read_text().strip()
    cluster.lose(node)
    try:
        code, output = cluster.wait(process, folder, 150)
        assert code == 0, output
        first, second = (folder / "nodes.txt").read_text().split()
        assert first == node != second
    finally:
        cluster.bring_back(node)


def test_ctrl_c_leaves_no_job_no_process_and_no_half_file(cluster: Cluster, copied: Path) -> None:
    recipe = {
        "recipes": {"mistral-lora-demo": {"max_steps": 2000, "epochs": 2000, "evaluations": 0}}
    }
    arguments = configured(copied, {"build": ["mistral"], **recipe})
    process = cluster.start(copied, "train", *arguments)
    log = copied / "logs" / "runs" / "mistral" / "train_adapter.log"
    wait_until(lambda: log.exists() and "probed" in log.read_text(), 240, "training begins")
    assert any("train_adapter" in comment for comment in cluster.jobs())
    process.send_signal(signal.SIGINT)
    code, output = cluster.wait(process, copied, 60)
    assert code != 0
    wait_until(lambda: not cluster.ask("squeue", "--noheader"), 60, "Slurm has no job")
    wait_until(lambda: not processes_in(copied), 30, f"no process: {processes_in(copied)}")
    adapter = copied / "results" / "runs" / "mistral" / "adapter"
    assert not list(adapter.glob("*"))
    # Told to end, it saved: whole, and no other is half written.
    (checkpoints,) = [path.parent for path in copied.glob("checkpoints/mistral/*/identity.json")]
    names = {path.name for path in checkpoints.iterdir()} - {"identity.json", "best"}
    assert len(names) == 1 and names.pop().startswith("checkpoint-")
    assert json.loads((checkpoints / "identity.json").read_text())
    code, output = cluster.run(copied, "train", "-n", *arguments)
    assert code == 0 and "train_adapter" in output_of(copied)
