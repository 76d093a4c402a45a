"""List what this machine lacks for a config, and how to get it.

Builds, loads and changes nothing; needs no GPU and no installed package. Exits 1 if something that
the config needs is missing. Versions alone: `python -m torch.utils.collect_env`, `pip check`.

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
from workflow_scripts.doctor.probes import Torch

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workflow_scripts.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[], help="overlays, as for Snakemake"
    )
    parser.add_argument("--workflow-profile", type=Path, help="as for Snakemake")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of results")
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements.lock", help="lock file")
    parser.add_argument("--json", action="store_true", help="write JSON")
    arguments = parser.parse_args(argv)
    found = examine(
        arguments.configfile,
        arguments.workflow_profile,
        results=arguments.results,
        lock=arguments.lock,
    )
    findings = list(found)
    print(as_json(findings) if arguments.json else table(findings))
    return 0 if is_complete(findings) else 1


def examine(
    overlays: Sequence[Path], profile: Path | None, *, results: Path, lock: Path
) -> Iterator[Finding]:
    """All findings, in an order in which each check can use the results of those before.

    Args:
        profile: folder given as `--workflow-profile`.
    """
    yield from packages.findings(lock)
    locked = packages.locked(lock)

    wanted = None
    try:
        # These need packages: they are imported here, where their lack can be reported.
        from workflow_scripts.doctor import hub_access, machine, requirements
        from workflow_scripts.log import StageError

        try:
            config = requirements.read_config(overlays)
        except StageError as error:
            yield of_error("config", error)
        else:
            wanted = requirements.Wanted(config, results)
            requirements.local_facts(wanted)
            yield Finding("config", "ok", f"builds {', '.join(wanted.runs)}")
            tasks = config.evaluation.tasks
            if tasks.names:
                of_tasks = ROOT / "requirements-tasks.lock"
                yield packages.harness_finding(tasks.names, of_tasks, is_needed=tasks.use)
    except ImportError as error:
        yield Finding("config", "missing", f"not read: {error}", None, "install the packages first")

    found, answer = cluster.partitions()
    torch = probes.ask_torch()
    usable, listed = (torch.devices, torch.gpu_models) if isinstance(torch, Torch) else ([], [])
    yield devices.gpu_finding(
        torch,
        n_wanted=wanted.n_gpus if wanted else None,
        cluster_gpus=cluster.offered_gpus(found),
    )
    yield from devices.torch_findings(
        torch,
        needs_gpu=wanted is not None and wanted.needs_gpu,
        locked=locked.get("torch", ""),
    )
    yield from devices.llama_cpp_findings(
        probes.ask_llama_cpp(),
        has_gpu=bool(listed),
        locked=locked.get("llama_cpp_python", ""),
    )
    if wanted is not None:
        hub = list(hub_access.findings(wanted))  # before the disk: it adds sizes
        yield from machine.findings(
            wanted,
            gpu_bytes=min((gpu.free_bytes for gpu in usable), default=None),
            has_torch=isinstance(torch, Torch),
        )
        yield from hub
    try:
        yield from cluster.findings(profile, found, answer)
    except ImportError as error:
        yield Finding("profile", "missing", f"not read: {error}", None, "install the packages")


if __name__ == "__main__":
    sys.exit(main())
