"""A changed tolerance runs its gate again and nothing else; a failed gate stops what follows it, in
the same start and in the next, though the verdict of an earlier pass is still there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.workflow.conftest import DEMO, TINY, jobs_of, snakemake_in

RUNS = ("generic", "mistral")
TIGHT = {"gguf": {"kl_divergence_nats": 1e-30}}
WIDE = {"gguf": {"kl_divergence_nats": 1e-2}}
TOO_FAR = "the GGUF computes something else than the merged model"

Start = Callable[..., "object"]


@pytest.fixture(scope="module")
def built(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny build, times included: what fails here must not reach other tests."""
    folder = tmp_path_factory.mktemp("gates") / "built"
    return shutil.copytree(tiny, folder, symlinks=True)


@pytest.fixture
def start(built: Path, tmp_path: Path) -> Start:
    """Snakemake in that copy, with these gates."""

    def run(gates: dict, *arguments: object, **others: object):
        overlay = tmp_path / "gates.yaml"
        overlay.write_text(yaml.safe_dump({"evaluation": {"gates": gates}, **others}))
        cores = ["--cores", os.cpu_count() or 1]
        return snakemake_in(built)(*arguments, *cores, "--configfile", DEMO, TINY, overlay)

    return run


def text_of(result) -> str:
    return result.stdout + result.stderr


def files_of(folder: Path) -> dict[str, float]:
    """Everything below a folder with its time, but what gates and Snakemake's own marks are."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.match("*_check.*")
    }


def refused(result, gate: str) -> bool:
    return result.returncode != 0 and f"Error in rule {gate}:" in text_of(result)


def test_a_gate_that_is_tightened_fails_until_it_is_loosened_and_runs_alone_each_time(
    built: Path, start
) -> None:
    gates = {"check_gguf": len(RUNS)}
    before = files_of(built / "results")
    assert jobs_of(start({}, "-n")) == {}

    assert jobs_of(start(TIGHT, "-n")) == gates
    for _ in range(2):  # a second start does not take the verdict of before for a pass
        failed = start(TIGHT)
        assert refused(failed, "check_gguf")
        assert TOO_FAR in text_of(failed)
        assert "(evaluation.gates.gguf.kl_divergence_nats)" in text_of(failed)
        assert files_of(built / "results") == before
        assert jobs_of(start(TIGHT, "-n")) == gates

    # Nor does a start that asks for one file behind the gate alone.
    asked = start(
        TIGHT,
        "results/runs/mistral/gguf/mistral-Q6_K.gguf",
        gguf={"quantizations": ["Q8_0", "Q4_K_M", "Q6_K"]},
    )
    assert refused(asked, "check_gguf")
    assert not (built / "results/runs/mistral/gguf/mistral-Q6_K.gguf").exists()

    for wide in (WIDE, {}):  # another value, and the one it first passed with
        assert jobs_of(start(wide, "-n")) == gates
        passed = start(wide)
        assert passed.returncode == 0, text_of(passed)[-4000:]
        assert files_of(built / "results") == before
        assert jobs_of(start(wide, "-n")) == {}


def test_what_else_was_changed_is_made_in_the_same_start(built: Path, start) -> None:
    """Snakemake itself would leave it for the next one, and say that all is done."""
    quantized = "results/runs/mistral/gguf/mistral-Q5_0.gguf"
    types = {"quantizations": ["Q8_0", "Q4_K_M", "Q5_0"]}
    passed = start({"gguf": {"kl_divergence_nats": 2e-2}}, quantized, gguf=types)
    assert passed.returncode == 0, text_of(passed)[-4000:]
    assert (built / quantized).exists()
    assert start({}).returncode == 0


def test_a_gate_that_never_passed_stops_what_follows_in_every_start(built: Path, start) -> None:
    folder = built / "results" / "runs" / "mistral"
    behind = [folder / "gguf" / f"mistral-{kind}.gguf" for kind in ("Q8_0", "Q4_K_M")]
    for path in [folder / "gguf_check.json", folder / "gguf_check.passed", *behind]:
        path.unlink()
    for _ in range(2):
        assert refused(start(TIGHT, "export"), "check_gguf")
        assert not (folder / "gguf_check.json").exists()
        assert not any(path.exists() for path in behind)
        assert (folder / "gguf" / "mistral-F16.gguf").exists()
    assert start({}, "export").returncode == 0
    assert all(path.exists() for path in behind)
    assert jobs_of(start({}, "-n")) == {}


def test_a_damaged_merge_is_kept_for_inspection_and_nothing_is_made_of_it(
    built: Path, start
) -> None:
    folder = built / "results" / "runs" / "mistral"
    weights = folder / "merged" / "model.safetensors"
    right = shutil.copy2(weights, built / "right.safetensors")
    before = files_of(built / "results")
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 50.0
    save_file(tensors, weights, metadata={"format": "pt"})

    # Another tolerance, so that the gate runs again.
    asked = {"merge": {"perplexity_increase_fraction": 0.9}}
    assert jobs_of(start(asked, "-n")) == {"check_merged": 2}
    for _ in range(2):
        failed = start(asked)
        assert refused(failed, "check_merged")
        assert "results/runs/mistral/merged" in text_of(failed)
        assert weights.exists()
        after = files_of(built / "results")
        after["runs/mistral/merged/model.safetensors"] = before[
            "runs/mistral/merged/model.safetensors"
        ]
        assert after == before
        assert jobs_of(start(asked, "-n")) == {"check_merged": 1}

    shutil.copy2(right, weights)
    assert jobs_of(start({}, "-n")) == {"check_merged": 2}
    assert start({}).returncode == 0
    assert jobs_of(start({}, "-n")) == {}
