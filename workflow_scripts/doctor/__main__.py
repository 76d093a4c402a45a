"""What this machine has, what it lacks for what a config builds, and how to get it.

Nothing is built, loaded or changed; no GPU is needed, nor any package. Exits 1 when something that
the config needs is missing.

python -m workflow_scripts.doctor
python -m workflow_scripts.doctor --configfile my-data.yaml --workflow-profile profiles/slurm
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from workflow_scripts.doctor import cluster, devices, packages, probes
from workflow_scripts.doctor.finding import Finding, as_json, is_complete, of_error, table

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workflow_scripts.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[], help="overlays, as Snakemake takes them"
    )
    parser.add_argument("--workflow-profile", type=Path, help="as Snakemake takes it: its executor")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of results")
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements.lock", help="lock file")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    findings = []
    for finding in examine(arguments):
        findings.append(finding)
    print(as_json(findings) if arguments.json else table(findings))
    return 0 if is_complete(findings) else 1


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Everything, in an order in which each can use what was learned before."""
    yield from packages.findings(arguments.lock)
    locked = packages.locked(arguments.lock)

    wanted = None
    try:
        from workflow_scripts.doctor import hub_access, machine, requirements
        from workflow_scripts.log import StageError

        try:
            config = requirements.read_config(arguments.configfile)
        except StageError as error:
            yield of_error("config", error)
        else:
            wanted = requirements.Wanted(config, arguments.results)
            requirements.local_facts(wanted)
            yield Finding("config", "ok", f"builds {', '.join(wanted.runs)}")
            tasks = config.evaluation.tasks
            if tasks.names:
                lock = ROOT / "requirements-tasks.lock"
                yield packages.harness_finding(tasks.names, lock, is_needed=tasks.use)
    except ImportError as error:
        yield Finding("config", "missing", f"not read: {error}", None, "install the packages first")

    found, answer = cluster.partitions()
    torch = probes.ask_torch()
    gpus, driver, failed = devices.nvidia_smi()
    gpus = gpus or devices.seen_by(torch)
    needs_gpu = wanted is not None and wanted.needs_gpu
    yield from devices.gpu_findings(
        gpus,
        failed,
        n_wanted=wanted.n_gpus if wanted else None,
        cluster_gpus=cluster.offered_gpus(found),
    )
    yield from devices.torch_findings(
        torch, driver, needs_gpu=needs_gpu, locked=locked.get("torch", "")
    )
    yield from devices.llama_cpp_findings(
        probes.ask_llama_cpp(),
        has_gpu=bool(gpus),
        locked=locked.get("llama_cpp_python", ""),
    )
    if wanted is not None:
        hub = list(hub_access.findings(wanted))  # before the disk: it tells sizes
        free = min((gpu.free_bytes for gpu in gpus), default=None)
        yield from machine.findings(wanted, gpu_bytes=free)
        yield from hub
    try:
        yield from cluster.findings(arguments.workflow_profile, found, answer)
    except ImportError as error:
        yield Finding("profile", "missing", f"not read: {error}", None, "install the packages")


if __name__ == "__main__":
    sys.exit(main())
