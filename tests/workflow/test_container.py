"""The two recipes of one image, and that `--sdm apptainer` runs every program in it."""

from __future__ import annotations

import os
import re

import yaml

from tests.workflow.conftest import DEMO, REPOSITORY, snakemake_in

ENVS = REPOSITORY / "envs"


def installed(recipe: str) -> set[str]:
    """What pip and apt-get are told to install, and how llama.cpp is to be built."""
    text = recipe.replace("\\\n", " ").replace("RUN ", "").replace("&&", "\n")
    commands = [" ".join(line.split()) for line in text.splitlines()]
    installs = {line for line in commands if line.startswith(("pip install", "apt-get install"))}
    return {*installs, *re.findall(r'CMAKE_ARGS="([^"]+)"', text)}


def test_docker_and_apptainer_make_the_same_image():
    docker, apptainer = (ENVS / "Dockerfile").read_text(), (ENVS / "tramontane.def").read_text()
    assert re.findall(r"^FROM (\S+)", docker, re.M) == re.findall(r"^From: (\S+)", apptainer, re.M)
    assert installed(docker) == installed(apptainer)
    assert len(installed(docker)) == 6


def test_what_stands_beside_the_lock_has_the_versions_that_stand_elsewhere():
    recipe = (ENVS / "Dockerfile").read_text()
    pinned = dict(re.findall(r"([\w-]+)==([\d.]+)", recipe))
    assert pinned.keys() == {"liger-kernel"}
    project = (REPOSITORY / "pyproject.toml").read_text()
    for name, version in pinned.items():
        assert f"{name}=={version}" in project


def test_apptainer_is_given_the_image_and_the_program_in_it(workflow, tmp_path, monkeypatch):
    """A stand-in for Apptainer, which is not on every machine: it writes down what it is asked and
    runs the command where it stands."""
    tools = tmp_path / "tools"
    tools.mkdir()
    asked = tmp_path / "asked.txt"
    (tools / "apptainer").write_text(
        '#!/bin/bash\n[ "$1" = --version ] && { echo "apptainer version 1.4.2"; exit; }\n'
        f'echo "$@" >> {asked}\nwhile [ "$1" != bash ] && [ "$1" != sh ]; do shift; done\n"$@"\n'
    )
    (tools / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    source = {"models": {"m": {"source": str(tmp_path / "no-such-folder")}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(source))
    target = ["results/models/m/checkpoint", "--configfile", DEMO, "mine.yaml"]
    result = workflow("--cores", 1, *target, "--sdm", "apptainer")
    assert "the local base model is missing" in result.stdout + result.stderr
    assert f"{tmp_path}/envs/tramontane.sif" in asked.read_text()
    assert "python -m workflow_scripts.models.fetch_base_model" in asked.read_text()
    asked.unlink()
    snakemake_in(tmp_path)("--cores", 1, *target)
    assert not asked.exists()
