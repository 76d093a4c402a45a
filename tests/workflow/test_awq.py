"""AWQ where it is asked for: which jobs it adds, what it is calibrated on, what the chain shows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import DEMO, TINY, jobs_of, snakemake_in
from workflow_scripts import files

SETTINGS = {"use": True, "group_size": 32, "n_tokens": 2048}


@pytest.fixture
def overlay(tmp_path: Path):
    def write(**config) -> Path:
        path = tmp_path / "awq.yaml"
        path.write_text(yaml.safe_dump({"awq": SETTINGS, **config}))
        return path

    return write


def test_it_adds_quantizing_and_scoring_and_what_gathers(tiny: Path, overlay) -> None:
    jobs = jobs_of(snakemake_in(tiny)("-n", "--cores", 8, "--configfile", DEMO, TINY, overlay()))
    assert jobs == {
        "plan_disk": 1,
        "quantize_awq": 2,
        "evaluate_perplexity": 2,
        "write_chain": 2,
        "report_overview": 1,
        "report_run": 2,
        "report_comparison": 1,
        "report_chain": 1,
        "collect_metrics": 2,
        "tabulate_metrics": 1,
        "package_release": 2,
    }


def test_the_target_export_makes_it(tiny: Path, overlay) -> None:
    result = snakemake_in(tiny)("export", "-n", "--cores", 8, "--configfile", DEMO, TINY, overlay())
    assert jobs_of(result) == {"plan_disk": 1, "quantize_awq": 2, "export": 1}


def test_other_settings_without_its_use_run_nothing(tiny: Path, overlay) -> None:
    unused = overlay(awq={"use": False, "group_size": 64})
    assert jobs_of(snakemake_in(tiny)("-n", "--cores", 8, "--configfile", DEMO, TINY, unused)) == {}


def test_it_is_calibrated_on_training_text_alone(workflow, overlay) -> None:
    result = workflow("export", "-n", "-p", "--cores", 8, "--configfile", DEMO, overlay())
    commands = [line for line in result.stdout.splitlines() if "quantize.quantize_awq" in line]
    assert len(commands) == 2
    for line in commands:
        assert "tokens/train.arrow" in line
        assert "validation" not in line and "test.arrow" not in line


@pytest.fixture(scope="module")
def built(tiny: Path, tmp_path_factory) -> Path:
    """The tiny build with AWQ of one of its runs, in a folder of its own: Snakemake writes its
    records in place, so that none may be shared."""
    folder = tmp_path_factory.mktemp("awq") / "tiny"
    shutil.copytree(tiny, folder, symlinks=True)
    path = folder / "awq.yaml"
    path.write_text(yaml.safe_dump({"awq": SETTINGS, "build": ["mistral"]}))
    cores = os.cpu_count() or 1
    result = snakemake_in(folder)("report", "--cores", cores, "--configfile", DEMO, TINY, path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return folder


def test_it_scores_the_same_tokens_and_is_close_to_the_merged_model(built: Path) -> None:
    evaluation = built / "results" / "runs" / "mistral" / "evaluation"
    awq, merged = (files.read_json(evaluation / f"{link}.json") for link in ("awq", "merged"))
    for key in ("n_scored_tokens", "n_conversations", "piece_tokens"):
        assert awq[key] == merged[key]
    # Measured −0.004 %, Q4_K_M +0.16 %: twelve steps of pre-training leave little to lose.
    assert awq["perplexity"] != merged["perplexity"]
    assert awq["perplexity"] == pytest.approx(merged["perplexity"], rel=0.01)


def test_it_is_the_last_link_of_the_report_measured_against_the_merged_one(built: Path) -> None:
    lines = (built / "results" / "report" / "chain.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    assert [row[0] for row in rows[-2:]] == ["mistral: Q4_K_M", "mistral: AWQ"]
    evaluation = built / "results" / "runs" / "mistral" / "evaluation"
    awq, merged = (
        files.read_json(evaluation / f"{link}.json")["perplexity"] for link in ("awq", "merged")
    )
    # In %, with its paired error; a minus sign is typeset.
    change = float(rows[-1][2].partition(" ± ")[0].replace("−", "-"))
    assert change == pytest.approx(100 * (awq / merged - 1), abs=0.01)
    assert rows[-1][-4:-1] == ["", "", ""]  # its kernels are not what was run
    size = sum(path.stat().st_size for path in (evaluation.parent / "awq").glob("*.safetensors"))
    assert rows[-1][-1] == f"{size / 2**20:.1f} MiB"
