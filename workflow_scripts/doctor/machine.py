"""Memory, cores and disk of this machine, against what the config's runs take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from workflow_scripts.doctor import probes
from workflow_scripts.doctor.finding import Finding, Status
from workflow_scripts.doctor.requirements import Wanted

# Beside a model's weights, on their way to the GPU or while they are scored; the demo's largest job
# takes 1.3 GB in all.
BESIDE_BYTES, DEMO_RAM_BYTES = 4e9, 2e9
# What the demo writes.
DEMO_DISK_BYTES = 0.3e9


def findings(wanted: Wanted, *, gpu_bytes: int | None) -> Iterator[Finding]:
    """
    Args:
        gpu_bytes: free of the smallest GPU here; None without one.
    """
    from workflow_scripts.train.memory.ram import available_ram_bytes

    ram = available_ram_bytes()
    weights = wanted.weight_bytes.values()
    needed = max(weights, default=0) + BESIDE_BYTES if wanted.needs_gpu else DEMO_RAM_BYTES
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(
        "memory",
        "ok" if ram >= needed else "warning",
        f"{ram / 1e9:.1f} GB available of {total / 1e9:.1f}",
        f"{needed / 1e9:.0f} GB for the largest job",
        "end what else runs, or take a larger machine",
    )
    for name in wanted.runs:
        yield from _training(name, wanted, gpu_bytes=gpu_bytes, ram_bytes=ram)
    yield _cores()
    yield _disk(wanted)


def _training(
    name: str, wanted: Wanted, *, gpu_bytes: int | None, ram_bytes: int
) -> Iterator[Finding]:
    """What plan_memory will say of a run, where its model's shape is known already."""
    run, config = wanted.runs[name], wanted.config
    if not run.is_trained:
        return
    is_small = config.models[run.model].built_here is not None
    title = f"memory, {name}"
    if run.model not in wanted.shapes:
        if not is_small:  # the demo's shape is known once it is made, and fits anywhere
            yield Finding(
                title,
                "warning",
                f"not known before {run.model} is fetched",
                "its config.json",
                "snakemake --cores 1 results/models/" + run.model + "/facts.json",
            )
        return
    on_gpu = gpu_bytes is not None or not is_small
    available = gpu_bytes if on_gpu else ram_bytes
    assert run.recipe is not None and run.packing is not None  # a run that is trained has both
    answer = probes.ask_memory(
        {
            "shape": wanted.shapes[run.model].model_dump(),
            "recipe": config.entry("recipes", run.recipe).model_dump(),
            "training": config.training.model_dump(),
            "row_tokens": config.packings[run.packing].row_tokens,
            "n_gpus": config.training.gpus * config.training.nodes if on_gpu else 1,
            "device_type": "cuda" if on_gpu else "cpu",
            "available_bytes": available,
        },
    )
    place = "a GPU" if on_gpu else "this machine"
    if isinstance(answer, probes.NoAnswer):
        yield Finding(title, "warning", f"not reckoned: {answer.reason}")
        return
    least = f"training takes at least {answer.least_bytes / 1e9:.1f} GB of {place}"
    if available is None:
        yield Finding(title, "ok", least)
    elif answer.peak_bytes is None:
        found = f"{least}; {available / 1e9:.1f} GB free"
        yield Finding(title, "missing", found, "a layout that fits", answer.refusal)
    else:
        peak = f"{answer.peak_bytes / 1e9:.1f} GB predicted"
        yield Finding(title, "ok", f"{peak} in the fastest layout that fits; {least}")


def _cores() -> Finding:
    n_cores = len(os.sched_getaffinity(0))
    found = f"{n_cores} cores"
    quota = _quota()
    # Threads beyond the quota wait for each other.
    if quota is not None and quota < n_cores:
        cores = max(1, int(quota))
        return Finding(
            "CPU",
            "warning",
            f"{found}, of which a control group gives {quota:g}",
            f"as many threads as it gives: snakemake --cores {cores}",
            f"export OMP_NUM_THREADS={cores}",
        )
    threads = os.environ.get("OMP_NUM_THREADS")
    return Finding("CPU", "ok", found + (f", OMP_NUM_THREADS={threads}" if threads else ""))


def _quota() -> float | None:
    """Cores that a control group of version 2 leaves this process."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _disk(wanted: Wanted) -> Finding:
    """Base models to be fetched, and what plan_disk counts."""
    from workflow_scripts.release import plan_disk

    planned: dict[str, int] = {}
    unknown: set[str] = set()
    gguf, awq = wanted.config.gguf, wanted.config.awq.use
    for name, run in wanted.runs.items():
        if run.model in wanted.weight_bytes:
            shape, n_bytes = wanted.shapes[run.model], wanted.weight_bytes[run.model]
            planned |= plan_disk.files_of(name, shape, n_bytes, gguf, has_awq=awq)
        elif wanted.models[run.model].built_here is None:
            unknown.add(run.model)
        else:
            planned[f"runs/{name}"] = round(DEMO_DISK_BYTES / 2)
    needed = plan_disk.needed_bytes(plan_disk.missing(planned, wanted.results))
    needed += sum(wanted.download_bytes.values())
    place = wanted.results.resolve()
    folder = next(one for one in (place, *place.parents) if one.exists())
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free at {folder}; the build writes {needed / 1e9:.1f}"
    if unknown:
        found += f", and what {', '.join(sorted(unknown))} takes, which is not known yet"
    status: Status = "missing" if needed > free else "warning" if unknown else "ok"
    return Finding(
        "disk",
        status,
        found,
        f"{needed / 1e9:.1f} GB" if needed > free else "the sizes of the base models",
        "make room, name fewer runs in `build` or fewer gguf.quantizations, or set retention"
        if needed > free
        else "fetch them, or let the Hub be asked",
    )
