from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from workflow_scripts import log
from workflow_scripts.doctor.finding import Finding, of_error, table


def run_doctor(python, *arguments):
    return subprocess.run(
        [python, "-m", "workflow_scripts.doctor", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """`bare_python(without)`: an environment with the packages of this one, without some."""

    def make(without) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            name = entry.name.partition("-")[0].partition(".")[0].lower()
            if not without(name):
                (site / entry.name).symlink_to(entry)
        return folder / "bin" / "python"

    return make


def test_the_demo_can_be_built_here_and_json_lists_every_finding():
    done = run_doctor(sys.executable, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, found
    assert found["is_complete"]
    names = {finding["name"] for finding in found["findings"]}
    assert {"Python", "packages", "config", "GPU", "PyTorch", "attention", "4-bit weights"} <= names
    assert {"llama.cpp", "memory", "CPU", "disk", "Hub", "executors", "Slurm"} <= names


def test_with_no_package_at_all_it_names_what_to_install(bare_python):
    done = run_doctor(bare_python(lambda _: True))
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "missing  packages" in done.stdout and "requirements.lock" in done.stdout
    assert "No module named 'torch'" in done.stdout


def test_without_torch_everything_else_is_examined(bare_python):
    done = run_doctor(bare_python(lambda name: name in ("torch", "functorch")))
    assert done.returncode == 1 and done.stderr == "", done.stderr
    assert "missing  packages" in done.stdout and "not installed: torch" in done.stdout
    assert "No module named 'torch'" in done.stdout
    for line in ("ok       config", "ok       disk", "ok       llama.cpp"):
        assert line in done.stdout


def test_a_config_that_cannot_be_built_is_a_finding(tmp_path):
    (tmp_path / "wrong.yaml").write_text("build: [misral]\n")
    done = run_doctor(sys.executable, "--configfile", "config/demo.yaml", tmp_path / "wrong.yaml")
    assert done.returncode == 1
    assert "missing  config" in done.stdout and "did you mean 'mistral'" in done.stdout


def test_overlays_are_merged_as_snakemake_merges_them(tmp_path):
    from workflow_scripts.doctor.requirements import read_config
    from workflow_scripts.settings import config_files

    first = {"build": ["mistral"], "gguf": {"quantizations": ["Q8_0"]}}
    second = {"gguf": {"quantizations": ["Q6_K"], "imatrix": {"use": "auto"}}}
    for number, overlay in enumerate((first, second)):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(overlay))
    paths = [config_files.DEMO, tmp_path / "0.yaml", tmp_path / "1.yaml"]
    config = read_config(paths)
    # The settings that Snakemake itself passes to the disk's gate.
    shown = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "-p", "--cores", "1", "--nocolor"]
        + ["results/disk_plan.json", "--configfile", *map(str, paths)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    line = next(line for line in shown.splitlines() if "release.plan_disk" in line)
    settings = json.loads(line.split("--settings '")[1].split("'")[0])
    assert list(settings["runs"]) == config.build == ["mistral"]
    assert settings["gguf"]["quantizations"] == list(config.gguf.quantizations) == ["Q6_K"]
    assert config.gguf.imatrix.use == "auto"


def test_a_stage_error_becomes_a_finding_without_pointing_to_the_doctor():
    error = log.StageError("no room", where="disk", found=0, to_fix=f"make room; {log.DOCTOR}")
    assert of_error("disk", error) == Finding(
        "disk", "missing", "no room (disk): 0", None, "make room"
    )


def test_the_table_says_what_to_do_only_where_something_is_wrong():
    fine = Finding("GPU", "ok", "one", "one", "buy one")
    wrong = Finding("disk", "missing", "full", "room", "make room")
    assert table([fine, wrong]).splitlines() == [
        "ok       GPU   one",
        "missing  disk  full",
        "           expected: room",
        "           to fix: make room",
    ]


def test_help_needs_no_package():
    done = subprocess.run(
        [sys.executable, "-S", "-m", "workflow_scripts.doctor", "--help"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "--workflow-profile" in done.stdout
