"""The workflow from another folder than its own: with `--directory`, and as a module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import DEMO, TINY, Snakemake, copy_workflow, jobs_of, snakemake_in

CLEAN = Path("results/data/stdlib-help/clean")

USERS_SNAKEFILE = """
module tramontane:
    snakefile: "{snakefile}"
    config: config
    {prefix}

use rule * from tramontane as tramontane_*

use rule clean_dataset from tramontane as tramontane_clean_dataset with:
    resources:
        mem_mb=4_321

rule count:
    default_target: True
    input: "results/data/stdlib-help/clean/train.parquet"
    output: "count.txt"
    shell:
        "python -c 'import sys, pyarrow.parquet as p; print(p.read_metadata(sys.argv[1]).num_rows)'"
        " {{input}} > {{output}}"
"""


def folders(tmp_path: Path) -> tuple[Path, Snakemake]:
    """The Snakefile of a workflow that nobody may write to, and Snakemake in another."""
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    shipped.mkdir(), own.mkdir()
    copy_workflow(shipped)
    return shipped / "Snakefile", snakemake_in(own)


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_results_lie_where_directory_says_and_the_workflow_stays_as_it_was(tmp_path: Path) -> None:
    snakefile, snakemake = folders(tmp_path)
    before = files_below(snakefile.parent)
    options = ("--cores", 1, "--snakefile", snakefile, "--configfile", DEMO, TINY)

    made = snakemake(*options, "--directory", tmp_path / "scratch", CLEAN / "train.parquet")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "scratch" / CLEAN / "cleaning_report.json").is_file()
    assert files_below(snakefile.parent) == before

    again = snakemake(*options, "--directory", tmp_path / "scratch", CLEAN / "train.parquet")
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_folder_with_a_config_of_its_own_goes_before_the_shipped_one(tmp_path: Path) -> None:
    snakefile, snakemake = folders(tmp_path)
    config = yaml.safe_load(DEMO.read_text())
    (name,) = config["build"][:1]
    own = tmp_path / "own" / "config" / "config.yaml"
    own.parent.mkdir()
    own.write_text(yaml.safe_dump(config | {"build": [name]}))

    assert jobs_of(snakemake("--dry-run", "--snakefile", snakefile))["package_release"] == 1
    own.unlink()
    assert jobs_of(snakemake("--dry-run", "--snakefile", snakefile))["package_release"] == 2


def test_a_module_s_config_is_laid_over_the_catalogue(tmp_path: Path) -> None:
    snakefile, snakemake = folders(tmp_path)
    (tmp_path / "own" / "Snakefile").write_text(
        USERS_SNAKEFILE.format(snakefile=snakefile, prefix="")
    )
    mine = {
        "models": {"demo": {"transplant": {}}},
        "datasets": {"stdlib-help": {"generate": {"n_conversations": 120}}},
        "runs": {
            "mine": {
                "model": "demo",
                "dataset": "stdlib-help",
                "packing": "swa-aware",
                "recipe": "zephyr-sft",
            }
        },
        "build": ["mine"],
    }
    (tmp_path / "own" / "mine.yaml").write_text(yaml.safe_dump(mine))
    planned = jobs_of(snakemake("--configfile", "mine.yaml", "--dry-run", "tramontane_all"))
    assert planned["tramontane_package_release"] == 1


def test_another_workflow_takes_it_as_a_module_and_goes_on_from_its_files(tmp_path: Path) -> None:
    snakefile, snakemake = folders(tmp_path)
    own = tmp_path / "own"
    (own / "Snakefile").write_text(USERS_SNAKEFILE.format(snakefile=snakefile, prefix=""))
    options = ("--cores", 1, "--configfile", DEMO, TINY)

    made = snakemake(*options)
    assert made.returncode == 0, made.stderr
    report = json.loads((own / CLEAN / "cleaning_report.json").read_text())
    assert int((own / "count.txt").read_text()) == report["n_train"]
    assert "mem_mb=4321" in made.stderr
    assert "not present in the Snakefile" not in made.stderr  # of local rules, by their old names
    assert "Nothing to be done" in (again := snakemake(*options)).stdout + again.stderr

    planned = jobs_of(snakemake("--configfile", DEMO, "--dry-run", "tramontane_all"))
    assert planned["tramontane_package_release"] == 2


@pytest.mark.parametrize("prefix", ["prefix: 'tuning'", "replace_prefix: {'results/': 'tuning/'}"])
def test_a_module_with_a_prefix_is_refused_before_anything_runs(
    tmp_path: Path, prefix: str
) -> None:
    snakefile, snakemake = folders(tmp_path)
    text = USERS_SNAKEFILE.format(snakefile=snakefile, prefix=prefix)
    (tmp_path / "own" / "Snakefile").write_text(text)
    refused = snakemake("--dry-run", "--configfile", DEMO)
    assert refused.returncode == 1
    assert "a module with a prefix is not supported" in refused.stdout + refused.stderr
