"""A Slurm cluster of two nodes on this machine, and Snakemake as a user of it runs it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml

from tests.workflow.conftest import DEMO, REPOSITORY, TINY, copy_workflow
from workflow_scripts.take_gpus import BATCH_JOBS

HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SYSTEM = "/usr/sbin:/sbin"
# One run, one quantization: what is under test is Slurm.
OVERLAY = {"build": ["mistral"], "gguf": {"quantizations": ["Q8_0"]}}
# The profile as it is, but for a cluster whose jobs take seconds.
HURRIED = ("--slurm-init-seconds-before-status-checks", 2, "--latency-wait", 5, "--max-threads", 1)


class Cluster:
    """Slurm's commands, and Snakemake on it.

    Args:
        home: folder of the daemons.
        environment: with which both are run.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home = home
        self.environment = environment

    def ask(self, *command: object) -> str:
        """What one of Slurm's commands answers."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout.strip()

    def jobs(self) -> dict[str, str]:
        """Comment of each running job, which names rule and wildcards → its number."""
        listed = self.ask("squeue", "--noheader", "--states", "running", "--format", "%k|%i")
        return dict(line.split("|") for line in listed.splitlines())

    def lose(self, node: str) -> None:
        """A node goes away, with all that runs on it, as when its power does."""
        daemon = psutil.Process(int((self.home / "run" / f"slurmd-{node}.pid").read_text()))
        # A job's processes are children of its slurmstepd, which are nobody's.
        jobs = self.ask("squeue", "--noheader", "--nodelist", node, "--format", "%A").split()
        steps = [
            process
            for process in psutil.process_iter(["cmdline"])
            for job in jobs
            if f"slurmstepd: [{job}." in " ".join(process.info["cmdline"] or [])
            # Another cluster on this machine has jobs of the same numbers.
            and process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
        ]
        for process in [daemon, *steps]:
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        # Slurm itself finds out when the node has been silent for SlurmdTimeout, 300 s.
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def bring_back(self, node: str) -> None:
        self.ask("slurmd", "-N", node)
        listed = ("sinfo", "--noheader", "--nodes", node, "--format", "%t")
        wait_until(lambda: "down" not in self.ask(*listed), 30, f"node {node} is back")

    def start(self, folder: Path, *arguments: object, profile: str = "slurm") -> subprocess.Popen:
        """Snakemake in a folder; its output goes to the folder's `output.txt`."""
        with (folder / "output.txt").open("w") as output:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "snakemake", "--nocolor"),
                    *("--workflow-profile", f"profiles/{profile}"),
                    *map(str, [*HURRIED, *arguments]),
                ],
                cwd=folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C of a terminal is for it alone
                # A script's `pytest … &` ignores Ctrl-C, and so would all that it starts.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def run(
        self, folder: Path, *arguments: object, profile: str = "slurm", seconds: int = 600
    ) -> tuple[int, str]:
        """Exit code and output of Snakemake."""
        process = self.start(folder, *arguments, profile=profile)
        return self.wait(process, folder, seconds)

    def wait(self, process: subprocess.Popen, folder: Path, seconds: int) -> tuple[int, str]:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            queue = self.ask("squeue", "--states", "all")
            pytest.fail(f"Snakemake ran for {seconds} s\n{queue}\n{output_of(folder)}")
        return code, output_of(folder)


def output_of(folder: Path) -> str:
    return (folder / "output.txt").read_text(encoding="utf-8")


def wait_until(is_so: Callable[[], object], seconds: float, what: str) -> object:
    """What `is_so` returned once that was something."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found = is_so()
        if found:
            return found
        time.sleep(0.5)
    pytest.fail(f"waited for {seconds} s: {what}")


def processes_in(folder: Path) -> list[str]:
    """Commands of the processes that run in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                found.append(" ".join(process.cmdline()))
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def free_port() -> int:
    """The first of three free ones, so that two clusters on a machine do not meet."""
    for port in range(26_817, 32_000, 10):
        with ExitStack() as stack:
            try:
                for number in range(port, port + 3):
                    taken = stack.enter_context(socket.socket())
                    taken.bind(("127.0.0.1", number))
            except OSError:
                continue
            return port
    raise AssertionError("no three ports are free")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    path = f"{os.environ['PATH']}:{SYSTEM}"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    if not find_spec("snakemake_executor_plugin_slurm"):
        pytest.skip("pip install --no-deps -r requirements-cluster.lock")
    # Not pytest's folder: the path of munge's socket may have 107 characters.
    home = Path(tempfile.mkdtemp(prefix="slurm-tests-"))
    kept = {name: value for name, value in os.environ.items() if name not in BATCH_JOBS}
    environment = kept | {
        "PATH": f"{home / 'bin'}:{path}",
        "SLURM_CONF": str(home / "slurm.conf"),
        "SLURM_TEST_PORT": str(free_port()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    try:
        done = subprocess.run(
            [HERE / "up", home], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        yield Cluster(home, environment)
    finally:
        subprocess.run([HERE / "down", home], env=environment, timeout=120)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def small(tmp_path: Path) -> Callable[[str], Path]:
    """A folder with a workflow of a few lines, and our profiles."""

    def write(snakefile: str) -> Path:
        shutil.copytree(REPOSITORY / "profiles", tmp_path / "profiles")
        (tmp_path / "Snakefile").write_text(snakefile)
        return tmp_path

    return write


def configured(folder: Path, overlay: dict) -> list[object]:
    """Arguments that run a copy of the workflow with an overlay over the tiny config."""
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return ["--configfile", DEMO, TINY, path]


@pytest.fixture(scope="session")
def prepared(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workflow in a folder, all that training needs made through Slurm."""
    folder = tmp_path_factory.mktemp("prepared")
    copy_workflow(folder)
    target = "results/runs/mistral/memory_plan.json"
    tokens = "results/data/stdlib-help/demo/tokens/check.json"
    code, output = cluster.run(folder, target, tokens, *configured(folder, OVERLAY))
    assert code == 0, output[-8000:]
    return folder


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it to go on in."""
    folder = tmp_path / "copied"
    shutil.copytree(prepared, folder, symlinks=True)
    return folder
