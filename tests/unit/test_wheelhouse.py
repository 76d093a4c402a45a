"""`make wheelhouse` here, then a fresh environment from it with the network cut off."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from workflow_scripts.doctor.packages import locked

# llama-cpp-python with what it needs, and what fetches its converter: few packages, by the same
# rules of the Makefile as all of them.
PACKAGES = {
    "diskcache", "Jinja2", "llama_cpp_python", "MarkupSafe", "numpy", "tqdm", "typing_extensions",
    "pydantic", "pydantic_core", "annotated-types", "typing-inspection",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """The workflow's Makefile and programs, with a lock of few packages."""
    built = subprocess.run(
        [sys.executable, "-m", "pip", "cache", "list", "llama_cpp_python", "--format=abspath"],
        capture_output=True,
        text=True,
    )
    version = locked(REPOSITORY / "requirements.lock")["llama_cpp_python"]
    if f"llama_cpp_python-{version}" not in built.stdout:
        pytest.skip("pip's cache has no wheel of llama-cpp-python: it would compile for minutes")
    lock = (REPOSITORY / "requirements.lock").read_text().splitlines()
    lines = [line for line in lock if line.partition("==")[0] in PACKAGES]
    assert len(lines) == len(PACKAGES)
    (tmp_path / "requirements.lock").write_text("\n".join(lines) + "\n")
    plugin = "snakemake-executor-plugin-slurm-jobstep==0.6.1\n"
    assert plugin in (REPOSITORY / "requirements-cluster.lock").read_text()
    (tmp_path / "requirements-cluster.lock").write_text(plugin)
    shutil.copyfile(REPOSITORY / "Makefile", tmp_path / "Makefile")
    shutil.copytree(REPOSITORY / "workflow_scripts", tmp_path / "workflow_scripts")
    return tmp_path


def make(folder, *arguments, before=(), **environment):
    # As a user has it: no environment active.
    inherited = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    return subprocess.run(
        [*before, "make", f"PYTHON={sys.executable}", *arguments],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def without_network() -> list[str]:
    """A network namespace of its own where one is allowed; an index that nobody serves else."""
    cut = ["unshare", "--user", "--map-root-user", "--net"]
    try:
        allowed = subprocess.run([*cut, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return cut if allowed else []


def test_a_folder_of_wheels_is_enough_without_a_network(folder):
    gathered = make(folder, "wheelhouse")
    assert gathered.returncode == 0, gathered.stderr[-3000:]
    names = [path.name for path in (folder / "wheelhouse").iterdir()]
    assert (
        sum(re.match(r"llama_cpp_python-.*\.(whl|tar\.gz)$", name) is not None for name in names)
        == 2
    )
    assert any(name.startswith("snakemake_executor_plugin_slurm_jobstep-0.6.1") for name in names)
    shutil.rmtree(folder / ".venv")

    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": ""}
    offline |= {"PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0"}
    # Nothing comes from elsewhere: without the folder the same command fails.
    lacking = make(
        folder, ".venv/.installed", before=without_network(), PIP_FIND_LINKS="", **offline
    )
    assert lacking.returncode != 0
    wheels = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheelhouse")}
    installed = make(folder, ".venv/.installed", before=without_network(), **(offline | wheels))
    assert installed.returncode == 0, installed.stdout[-3000:] + installed.stderr[-3000:]

    python = folder / ".venv" / "bin" / "python"
    code = (
        "import llama_cpp\n"
        "from workflow_scripts.quantize import llama_cpp_source\n"
        "print(llama_cpp_source.converter())"
    )
    done = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(folder / ".venv"))
