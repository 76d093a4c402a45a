"""Profiles: each plans the whole demo; the programs of cluster-generic speak with three systems."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import REPOSITORY, jobs_of

PROFILES = REPOSITORY / "profiles"
PLUGINS = {"slurm-sharded": "slurm", "cluster-generic": "cluster_generic"}
# Settings of profiles/default that decide what is run; a workflow profile replaces that one.
SHARED = ("rerun-incomplete", "keep-going", "show-failed-logs", "max-checksum-file-size")


def settings_of(profile: str) -> dict:
    return yaml.safe_load((PROFILES / profile / "config.yaml").read_text())


@pytest.mark.parametrize(
    "profile", ["default", "slurm", "slurm-sharded", "cluster-generic", "kubernetes"]
)
def test_a_profile_plans_the_demo_as_the_default_does(workflow, profile: str) -> None:
    plugin = f"snakemake_executor_plugin_{PLUGINS.get(profile, profile)}"
    if profile != "default" and not find_spec(plugin):
        pytest.skip("pip install --no-deps -r requirements-cluster.lock")
    assert settings_of("default")["rerun-incomplete"] is True
    for setting in SHARED:
        assert settings_of(profile)[setting] == settings_of("default")[setting]
    planned = jobs_of(workflow("-n", "--workflow-profile", f"profiles/{profile}"))
    assert planned["train_adapter"] == 2 and planned["package_release"] == 2


def test_the_sharded_profile_asks_slurm_for_the_gpus_that_training_starts() -> None:
    sharded, slurm = settings_of("slurm-sharded"), settings_of("slurm")
    (config,) = sharded.pop("config")
    training = yaml.safe_load(config.removeprefix("training="))
    extra = sharded["set-resources"].pop("train_adapter")["slurm_extra"]
    assert f"--gpus-per-node={training['gpus']}" in extra and "--ntasks-per-node=1" in extra
    alone = slurm["set-resources"].pop("train_adapter")["slurm_extra"]
    assert extra.startswith(alone.rstrip("'"))
    assert training["nodes"] > 1
    assert sharded == slurm  # in all the rest


@pytest.fixture
def system(tmp_path: Path, monkeypatch):
    """Commands of a batch system, each a line of shell, first in the path."""
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.delenv("SGE_ROOT", raising=False)

    def define(**lines: str) -> Path:
        for name, line in lines.items():
            (commands / name).write_text(f"#!/bin/bash\n{line}\n")
            (commands / name).chmod(0o755)
        return commands

    return define


def answer(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [PROFILES / "cluster-generic" / program, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_lsf_is_asked_in_its_own_words(system) -> None:
    system(bsub='echo "$@" > asked; cat > given; echo "Job <71> is submitted to queue <normal>."')
    Path("script").write_text("true\n")
    assert answer("submit", "train", "8", "4000", "90", "2", "script") == "71"
    asked = Path("asked").read_text()
    for option in ("-n 8", "-W 90", "-M 4000MB", "-gpu num=2", "-wt 5 -wa TERM"):
        assert option in asked
    assert Path("given").read_text() == "true\n"
    answer("submit", "merge", "8", "4000", "90", "0", "script")
    assert "-gpu" not in Path("asked").read_text()
    states = {"PEND": "running", "RUN": "running", "UNKWN": "running", "": "running"}
    for state, expected in (states | {"DONE": "success", "EXIT": "failed"}).items():
        system(bjobs=f"echo {state}")
        assert answer("status", "71") == expected, state


def test_pbs_is_asked_in_its_own_words(system) -> None:
    system(qsub='echo "$@" > asked; echo 71.head')
    assert answer("submit", "train", "8", "4000", "90", "2", "script") == "71.head"
    asked = Path("asked").read_text()
    assert "select=1:ncpus=8:mem=4000mb:ngpus=2" in asked and "walltime=5400" in asked
    shown = 'printf "Job Id: 71.head\\n    job_state = {}\\n    {}\\n"'
    for state, code, expected in (
        ("Q", "", "running"),
        ("R", "", "running"),
        ("F", "Exit_status = 0", "success"),
        ("F", "Exit_status = 271", "failed"),  # killed
        ("F", "", "failed"),  # never started
    ):
        system(qstat=shown.format(state, code))
        assert answer("status", "71.head") == expected, (state, code)


def test_sge_is_asked_in_its_own_words(system, monkeypatch) -> None:
    monkeypatch.setenv("SGE_ROOT", "/opt/sge")
    system(qsub='echo "$@" > asked; echo 71')
    assert answer("submit", "train", "8", "4001", "90", "1", "script") == "71"
    asked = Path("asked").read_text()
    for option in ("-terse", "-pe smp 8", "h_rt=5400", "h_vmem=501M", "gpu=1"):
        assert option in asked
    listed = 'if [ "$1" = -j ]; then exit {}; fi; echo "  71 0.5 train me {} 11/21/2026"'
    gone = listed.format(1, "")
    report = 'printf "failed       {}\\nexit_status  {}\\n"'
    for queue, account, expected in (
        (listed.format(0, "qw"), "exit 1", "running"),
        (listed.format(0, "r"), "exit 1", "running"),
        (listed.format(0, "Eqw"), "exit 1", "failed"),
        (gone, "exit 1", "running"),  # not accounted for yet
        (gone, report.format("0", "0"), "success"),
        (gone, report.format("0", "1"), "failed"),
        (gone, report.format("100 : assumedly after job", "137"), "failed"),
    ):
        system(qstat=queue, qacct=account)
        assert answer("status", "71") == expected, (queue, account)


SNAKEFILE = """
rule all:
    input: "good.txt"

rule good:
    output: "good.txt"
    shell: "test -e tried && touch {output} || {{ touch tried; exit 1; }}"
"""


def test_a_job_that_fails_on_such_a_system_is_seen_and_tried_again(
    system, tmp_path: Path, monkeypatch
) -> None:
    if not find_spec("snakemake_executor_plugin_cluster_generic"):
        pytest.skip("pip install --no-deps -r requirements-cluster.lock")
    monkeypatch.setenv("SGE_ROOT", "/opt/sge")
    # A batch system of a few lines: it runs at once what it is handed, and tells how that ended.
    system(
        qsub='number=$$; (bash "${@: -1}" > /dev/null 2>&1; echo $? > ended.$number) &'
        " echo $number; echo $number >> numbers",
        qstat="! [ -e ended.$2 ]",
        qacct='printf "failed       0\\nexit_status  $(cat ended.$2)\\n"',
    )
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    shutil.copytree(PROFILES, tmp_path / "profiles")
    profile = ("--workflow-profile", "profiles/cluster-generic", "--latency-wait", "2")
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *profile],
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "good.txt").exists()
    assert len(Path("numbers").read_text().split()) == 2
