from __future__ import annotations

import pytest

from tests.conftest import REPOSITORY
from tests.unit.doctor.conftest import by_name
from workflow_scripts.doctor import cluster

SINFO = """
echo "cpu*|up|(null)|12"
echo "gpu|up|gpu:a100:4(S:0-1),license:2|3"
echo "old|inact|gpu:k80:2|1"
"""


@pytest.fixture
def slurm(command):
    command("sinfo", SINFO)
    command("squeue", "exit 0")
    command("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")


def profile(tmp_path, text):
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    return folder


def test_partitions_and_their_gpus_are_read_from_sinfo(slurm):
    found, answer = cluster.partitions()
    assert answer.returncode == 0
    assert [(one.name, one.gpus, one.n_nodes) for one in found] == [
        ("cpu", "", 12),
        ("gpu", "gpu:a100:4", 3),
        ("old", "gpu:k80:2", 1),
    ]
    assert cluster.offered_gpus(found) == ["gpu:a100:4 in gpu"]


def test_the_profile_that_ships_needs_squeue_and_no_accounting(slurm):
    found = by_name(cluster.findings(REPOSITORY / "profiles" / "slurm", *cluster.partitions()))
    assert found["Slurm"].status == "ok"
    assert found["sacct"].status == "warning" and "disabled" in found["sacct"].found
    assert "squeue" not in found


def test_a_profile_that_reads_job_states_from_sacct_needs_it(slurm, tmp_path):
    folder = profile(tmp_path, "executor: slurm\ndefault-resources: {slurm_partition: gpux}\n")
    found = by_name(cluster.findings(folder, *cluster.partitions()))
    assert found["sacct"].status == "missing"
    assert "slurm-status-command: squeue" in found["sacct"].to_fix
    assert found["Slurm's partition"].status == "missing"
    assert found["Slurm's partition"].expected == "cpu, gpu, old"


def test_a_controller_that_does_not_answer_is_missing_for_slurm_profiles_only(command, monkeypatch):
    monkeypatch.setattr(cluster, "SECONDS", 0.2)
    command("sinfo", "exec sleep 30")
    found = by_name(cluster.findings(REPOSITORY / "profiles" / "slurm", *cluster.partitions()))
    assert found["Slurm"].status == "missing" and "no answer in 0.2 s" in found["Slurm"].found
    without = by_name(cluster.findings(None, *cluster.partitions()))
    assert without["Slurm"].status == "ok"


def test_an_executor_whose_plugin_is_not_installed_is_named(slurm, tmp_path):
    folder = profile(tmp_path, "executor: no-such\n")
    found = by_name(cluster.findings(folder, *cluster.partitions()))["executors"]
    assert found.status == "missing"
    assert found.to_fix == "pip install snakemake-executor-plugin-no-such"
    by_lock = cluster.how_to_install("snakemake-executor-plugin-slurm")
    assert by_lock == "python -m pip install --no-deps -r requirements-cluster.lock"


def test_a_folder_without_a_profile_is_named(slurm, tmp_path):
    found = by_name(cluster.findings(tmp_path / "none", *cluster.partitions()))
    assert found["profile"].status == "missing" and "config.yaml" in found["profile"].found
