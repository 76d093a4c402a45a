"""Runs that begin with what is there already: an adapter, or a model that was merged elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import DEMO, TINY, copy_workflow, jobs_of, snakemake_in
from workflow_scripts import files

TRAINED = {"train_adapter", "plan_memory", "pack_sequences", "report_loss", "report_packing"}
BASE = {"model": "demo", "dataset": "stdlib-help"}


@pytest.fixture(scope="module")
def given(tiny: Path, tmp_path_factory) -> tuple[Path, Path]:
    """A fresh checkout beside a finished build, and an overlay with that build's mistral run given:
    its adapter, and its merged model. Base and tokens are the build's, linked."""
    folder = tmp_path_factory.mktemp("given")
    copy_workflow(folder)
    for part in ("models", "data"):
        shutil.copytree(tiny / "results" / part, folder / "results" / part, symlinks=True)
    shutil.copytree(tiny / ".snakemake" / "metadata", folder / ".snakemake" / "metadata")
    run = tiny / "results" / "runs" / "mistral"
    adapter, merged = folder.parent / "my-adapter", folder.parent / "my-model"
    shutil.copytree(run / "adapter", adapter, dirs_exist_ok=True)
    merged.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(run / "merged" / name, merged / name)
    overlay = folder / "given.yaml"
    runs = {
        "lora": BASE | {"adapter": str(adapter), "precision": "nf4"},
        "whole": BASE | {"merged": str(merged)},
    }
    gguf = {"quantizations": ["Q8_0"], "imatrix": {"use": "never"}}
    retention = {"merged": False, "f16": False}
    content = {"runs": runs, "build": ["lora", "whole"], "gguf": gguf, "retention": retention}
    overlay.write_text(yaml.safe_dump(content))
    return folder, overlay


@pytest.fixture(scope="module")
def built(given: tuple[Path, Path]) -> Path:
    folder, overlay = given
    run = snakemake_in(folder)
    arguments = ("--cores", os.cpu_count() or 1, "--configfile", DEMO, TINY, overlay)
    assert not TRAINED & jobs_of(run("-n", *arguments)).keys()
    result = run(*arguments)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return folder


def test_they_are_converted_and_measured_as_the_run_they_came_from(built: Path, tiny: Path) -> None:
    expected = tiny / "results" / "runs" / "mistral" / "evaluation"
    for run, links in (
        ("lora", ["adapter", "merged", "F16", "Q8_0"]),
        ("whole", ["merged", "F16"]),
    ):
        for link in links:
            found = files.read_json(
                built / "results" / "runs" / run / "evaluation" / f"{link}.json"
            )
            of_mistral = files.read_json(expected / f"{link}.json")
            assert found["perplexity"] == pytest.approx(of_mistral["perplexity"], rel=1e-6)
    assert not (built / "results" / "runs" / "whole" / "adapter").exists()
    header = (built / "results" / "report" / "comparison.tsv").read_text().splitlines()[0]
    assert header == "\tlora\twhole"


def test_what_need_not_stay_is_gone_and_nothing_asks_for_it(
    built: Path, given: tuple[Path, Path]
) -> None:
    for run in ("lora", "whole"):
        folder = built / "results" / "runs" / run
        assert not (folder / "merged").exists()
        assert [path.name for path in (folder / "gguf").glob("*.gguf")] == [f"{run}-Q8_0.gguf"]
        assert [path.name for path in (folder / "release").glob("*.gguf")] == [f"{run}-Q8_0.gguf"]
        assert (folder / "evaluation" / "F16.json").exists()
    run = snakemake_in(built)
    assert jobs_of(run("-n", "--cores", 8, "--configfile", DEMO, TINY, given[1])) == {}


def test_a_changed_adapter_is_fetched_again(built: Path, given: tuple[Path, Path]) -> None:
    adapter = yaml.safe_load(given[1].read_text())["runs"]["lora"]["adapter"]
    config = Path(adapter) / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    jobs = jobs_of(snakemake_in(built)("-n", "--cores", 8, "--configfile", DEMO, TINY, given[1]))
    assert jobs["fetch_adapter"] == jobs["merge_adapter"] == jobs["package_release"] == 1


@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        ({"adapter": "./nowhere"}, "runs.lora: the adapter is missing or incomplete"),
        ({"merged": "./nowhere"}, "runs.lora: the merged model is missing or incomplete"),
    ],
)
def test_what_is_not_there_stops_before_the_first_job(workflow, tmp_path, beginning, message):
    overlay = {"runs": {"lora": BASE | beginning}, "build": ["lora"]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(overlay))
    result = workflow("-n", "--cores", 8, "--configfile", DEMO, "own.yaml")
    assert result.returncode == 1
    said = result.stdout + result.stderr  # a dry run speaks to standard output
    assert message in said
    assert "Traceback" not in said
