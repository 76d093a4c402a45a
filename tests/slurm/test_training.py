"""The tiny workflow through Slurm, and training that Slurm ends or spreads over nodes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.slurm.conftest import OVERLAY, Cluster, configured, processes_in, wait_until
from workflow_scripts import files

pytestmark = pytest.mark.slurm
# Slurm looks at its limits every 30 s; 120 steps take as long on a fast machine.
LONG = {"max_steps": 300, "epochs": 100, "evaluations": 1}
RUN = {
    "model": "demo",
    "dataset": "stdlib-help",
    "packing": "swa-aware-demo",
    "recipe": "mistral-lora-demo",
}


def adapter_of(folder: Path, run: str) -> Path:
    return folder / "results" / "runs" / run / "adapter"


def losses(folder: Path, run: str) -> list[float]:
    history = files.read_json(adapter_of(folder, run) / "history.json")
    return [
        entry["loss_nats_per_token"]
        for split in ("train", "validation")
        for entry in history[split]
    ]


def manifest_of(folder: Path, run: str) -> dict:
    return files.read_json(adapter_of(folder, run) / "training_manifest.json")


def test_training_that_meets_its_time_limit_saves_and_ends_with_the_loss_of_one_that_does_not(
    cluster: Cluster, copied: Path
) -> None:
    overlay = {
        "runs": {"limited": RUN, "whole": RUN},
        "build": ["limited", "whole"],
        "recipes": {"mistral-lora-demo": LONG},
    }
    process = cluster.start(copied, "train", *configured(copied, overlay))
    log = copied / "logs" / "runs" / "limited" / "train_adapter.log"
    wait_until(lambda: log.exists() and "probed" in log.read_text(), 240, "training begins")
    (job,) = [
        number
        for comment, number in cluster.jobs().items()
        if "train_adapter" in comment and "limited" in comment
    ]
    # Its time was to be up in a day, and is now up in less than the profile's 300 s before TERM.
    cluster.ask("scontrol", "update", f"jobid={job}", "timelimit=4")
    wait_until(lambda: job not in cluster.jobs().values(), 180, "Slurm ends the job")
    # Where a cluster tracks processes it would have killed one that was not done with saving.
    assert not [one for one in processes_in(copied) if "checkpoints/limited" in one]
    code, output = cluster.wait(process, copied, 900)
    assert code == 0, output[-8000:]
    assert f"SLURM-job '{job}' failed" in output
    assert "training was ended by SIGTERM" in output  # its log, before the next attempt's
    assert manifest_of(copied, "limited")["resumed"] is True
    assert manifest_of(copied, "whole")["resumed"] is False
    assert len(losses(copied, "whole")) > 2
    # Exactly: the same rows by the same arithmetic, on the same number of threads.
    assert losses(copied, "limited") == losses(copied, "whole")


def test_the_tiny_workflow_goes_through_slurm_to_its_releases(
    cluster: Cluster, prepared: Path
) -> None:
    arguments = configured(prepared, OVERLAY)
    code, output = cluster.run(prepared, *arguments, seconds=900)
    assert code == 0, output[-8000:]
    for name in ("report/overview.html", "runs/mistral/release/SHA256SUMS", "report/loss.svg"):
        assert (prepared / "results" / name).is_file(), name
    kept = {path.name for path in (prepared / ".snakemake" / "slurm_logs").iterdir()}
    assert {"rule_train_adapter", "rule_quantize_gguf", "rule_evaluate_perplexity"} <= kept
    assert not {name for name in kept if name.startswith(("rule_report_", "rule_plan_disk"))}
    code, output = cluster.run(prepared, *arguments)
    assert code == 0 and "Nothing to be done" in output


def test_training_on_two_nodes_has_the_loss_of_two_processes_on_one(
    cluster: Cluster, copied: Path
) -> None:
    recipe = {"max_steps": 3, "epochs": 100, "evaluations": 1, "rows_per_step": 2}
    overlay = {
        "runs": {"spread": RUN, "together": RUN},
        "recipes": {"mistral-lora-demo": recipe},
    }
    arguments = configured(copied, overlay)
    # The profile asks for more GPUs than these nodes have; the demo's model for none by itself.
    extra = "'--signal=TERM@300 --ntasks-per-node=1 --gpus-per-node=1'"
    code, output = cluster.run(
        copied,
        str(adapter_of(copied, "spread").relative_to(copied) / "training_manifest.json"),
        *arguments,
        *("--config", "training={nodes: 2, gpus: 1, parallelism: fsdp2}"),
        *("--set-resources", "train_adapter:gpu=2", f"train_adapter:slurm_extra={extra}"),
        profile="slurm-sharded",
    )
    assert code == 0, output[-8000:]
    log = (copied / "logs" / "runs" / "spread" / "train_adapter.log").read_text()
    assert re.search(r"launched command=srun --nodes 2 .*--rdzv-endpoint 127\.0\.0\.1:", log)
    code, output = cluster.run(
        copied,
        str(adapter_of(copied, "together").relative_to(copied) / "training_manifest.json"),
        *arguments,
        *("--config", "training={gpus: 2, parallelism: fsdp2}"),
    )
    assert code == 0, output[-8000:]
    for run in ("spread", "together"):
        assert manifest_of(copied, run)["n_processes"] == 2
    found, expected = losses(copied, "spread"), losses(copied, "together")
    assert len(found) > 2 and found == pytest.approx(expected, rel=1e-5)
