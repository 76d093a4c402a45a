"""Memory, cores and disk of this machine, compared with what the config's runs need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from workflow_scripts.doctor.finding import Finding, Status
from workflow_scripts.doctor.requirements import Wanted
from workflow_scripts.log import StageError
from workflow_scripts.release import plan_disk
from workflow_scripts.train.memory.ram import available_ram_bytes

# Memory on top of a model's weights while they move to the GPU or are scored. The demo's largest
# job takes 1.3 GB in all.
MARGIN_BYTES, DEMO_RAM_BYTES = 4e9, 2e9
# Disk space that the demo's build takes.
DEMO_DISK_BYTES = 0.3e9


def findings(wanted: Wanted, *, gpu_bytes: int | None, has_torch: bool) -> Iterator[Finding]:
    """Findings about memory, cores and disk.

    Args:
        gpu_bytes: free memory of the smallest GPU here; None without a GPU.
        has_torch: PyTorch can be imported; without it the memory of training is not predicted.
    """
    ram = available_ram_bytes()
    needed = (
        max(wanted.weight_bytes.values(), default=0) + MARGIN_BYTES
        if wanted.needs_gpu
        else DEMO_RAM_BYTES
    )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(
        "memory",
        "ok" if ram >= needed else "warning",
        f"{ram / 1e9:.1f} GB available of {total / 1e9:.1f}",
        f"{needed / 1e9:.0f} GB for the largest job",
        "end other programs, or take a larger machine",
    )
    for name, run in wanted.runs.items():
        is_small = wanted.models[run.model].built_here is not None
        if not run.is_trained or (is_small and run.model not in wanted.shapes):
            continue  # the demo's shape is known once it is made, and it fits anywhere
        if run.model not in wanted.shapes:
            yield Finding(
                f"memory, {name}",
                "warning",
                f"not known before {run.model} is fetched",
                "its config.json",
                f"snakemake --cores 1 results/models/{run.model}/facts.json",
            )
        elif not has_torch:
            yield Finding(f"memory, {name}", "warning", "not predicted: that needs PyTorch")
        elif gpu_bytes is not None or not is_small:
            yield _training(name, wanted, is_on_gpu=True, available=gpu_bytes)
        else:
            yield _training(name, wanted, is_on_gpu=False, available=ram)
    yield _cores()
    yield _disk(wanted)


def _training(name: str, wanted: Wanted, *, is_on_gpu: bool, available: int | None) -> Finding:
    """The verdict that plan_memory will give on a run.

    Args:
        available: bytes of the device; None if that is not known.
    """
    # These may need PyTorch, which may be missing or broken: not before `probes` has tried it.
    from workflow_scripts.train.memory import fit
    from workflow_scripts.train.memory.layouts import Layouts
    from workflow_scripts.train.memory.shape import PlannedRun

    run, training = wanted.runs[name], wanted.config.training
    assert run.recipe is not None and run.packing is not None  # a run that is trained has both
    layouts = Layouts.of(
        PlannedRun(
            wanted.shapes[run.model],
            wanted.config.recipes[run.recipe],
            training,
            row_tokens=wanted.config.packings[run.packing].row_tokens,
            device_type="cuda" if is_on_gpu else "cpu",
            n_gpus=training.gpus * training.nodes if is_on_gpu else 1,
        )
    )
    smallest = layouts.smallest.peak / (1 - fit.MARGIN)
    place = "a GPU" if is_on_gpu else "this machine"
    least = f"training takes at least {smallest / 1e9:.1f} GB of {place}"
    title = f"memory, {name}"
    if available is None:
        return Finding(title, "ok", least)
    try:
        chosen = fit.choose(layouts, available_bytes=available)
    except StageError as error:
        to_fix = str(error.parts["to fix"]).splitlines()[0]
        found = f"{least}; {available / 1e9:.1f} GB free"
        return Finding(title, "missing", found, "a layout that fits", to_fix)
    peak = f"{chosen.peak / 1e9:.1f} GB predicted"
    return Finding(title, "ok", f"{peak} in the fastest layout that fits; {least}")


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
            f"{found}, of which a control group allows {quota:g}",
            f"no more threads than that: snakemake --cores {cores}",
            f"export OMP_NUM_THREADS={cores}",
        )
    threads = os.environ.get("OMP_NUM_THREADS")
    return Finding("CPU", "ok", found + (f", OMP_NUM_THREADS={threads}" if threads else ""))


def _quota() -> float | None:
    """Cores that a control group (version 2) allows this process; None if there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _disk(wanted: Wanted) -> Finding:
    """Room for the base models that are still to be fetched, and for what plan_disk counts."""
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
        found += f", plus {', '.join(sorted(unknown))}, whose size is not known yet"
    status: Status = "warning" if unknown else "ok"
    expected, to_fix = "the sizes of the base models", "fetch them, or allow access to the Hub"
    if needed > free:
        status, expected = "missing", f"{needed / 1e9:.1f} GB"
        to_fix = (
            "make room, name fewer runs in `build` or fewer gguf.quantizations, or set retention"
        )
    return Finding("disk", status, found, expected, to_fix)
