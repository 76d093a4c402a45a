from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from tests.unit.report.conftest import write_link
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.report import collect_metrics


@pytest.fixture
def collect(results, tmp_path):
    def run(runs=results.runs):
        names = json.loads(runs)["runs"]
        paths = [tmp_path / f"{name}.json" for name in names]
        table = tmp_path / "all_metrics.parquet"
        collect_metrics.main(
            ["--runs", runs, "--results", str(results.folder), "--metrics", *map(str, paths)]
            + ["--table", str(table)]
        )
        return dict(zip(names, paths, strict=True)), pq.read_table(table).to_pylist()

    return run


def test_every_number_stands_in_its_file_under_its_key(collect, results):
    _, rows = collect()
    assert len(rows) > 80
    for row in rows:
        content = files.read_json(results.folder / row["file"])
        assert content[row["key"]] == row["value"], row
        if row["error"] is not None:
            assert row["error"] in content.values() and row["error_is"], row
        if row["n"] is not None:
            assert row["n"] in content.values(), row


def test_each_link_of_each_run_has_its_figures(collect):
    _, rows = collect()
    found = {(row["run"], row["link"], row["name"]) for row in rows}
    assert len(found) == len(rows)
    for run in ("generic", "mistral"):
        for link in ("base", "base NF4", "adapter", "merged", "F16", "Q4_K_M"):
            assert (run, link, "perplexity") in found
        assert (run, "Q4_K_M", "KL divergence to F16") in found
        assert (run, "F16", "KL divergence to F16") not in found
        assert (run, "", "memory of training, measured") in found
    values = {
        (row["run"], row["link"]): row["value"] for row in rows if row["name"] == "perplexity"
    }
    assert (values["generic", "merged"], values["mistral", "merged"]) == (5.05, 6.05)


def test_awq_has_its_scores_where_it_was_made(collect, results):
    for run in ("generic", "mistral"):
        write_link(results.folder / "runs" / run / "evaluation" / "awq.json", 5.25, place=4)
    _, rows = collect(json.dumps(json.loads(results.runs) | {"awq": True}))
    found = [row for row in rows if row["link"] == "AWQ" and row["name"] == "perplexity"]
    assert [(row["run"], row["value"]) for row in found] == [("generic", 5.25), ("mistral", 5.25)]
    assert found[0]["file"] == "runs/generic/evaluation/awq.json"


def test_a_run_s_json_is_its_rows_by_link(collect):
    paths, rows = collect()
    metrics = files.read_json(paths["mistral"])
    assert metrics["settings"]["packing"] == "apart"
    for row in rows:
        if row["run"] == "mistral":
            kept = metrics["links"][row["link"] or "run"][row["name"]]
            assert kept == {key: row[key] for key in kept}


def test_what_was_not_measured_is_no_row(collect, results):
    wanted = json.loads(results.runs)
    wanted["runs"]["mistral"] |= {"packing": None, "recipe": None, "merged": "owner/model"}
    (results.folder / "runs" / "mistral" / "adapter" / "training_manifest.json").unlink()
    _, rows = collect(json.dumps(wanted))
    of_run = {row["name"] for row in rows if row["run"] == "mistral" and not row["link"]}
    assert "fill of the rows" not in of_run and "steps of training" not in of_run
    assert not any(row["link"] == "adapter" for row in rows if row["run"] == "mistral")


def test_a_file_that_is_missing_is_named(collect, results):
    path = results.folder / "runs" / "mistral" / "gguf_check.json"
    path.unlink()
    with pytest.raises(StageError, match="a file is missing") as caught:
        collect()
    assert str(path) in str(caught.value)


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.collect_metrics")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib"}
