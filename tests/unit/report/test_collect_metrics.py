from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.report import collect_metrics, tabulate_metrics


@pytest.fixture
def collect(results, tmp_path):
    def run(results=results):
        paths = {name: tmp_path / f"{name}.json" for name in results.settings}
        for name, path in paths.items():
            collect_metrics.main([*results.by_run[name], "--metrics", str(path)])
        table = tmp_path / "all_metrics.parquet"
        tabulate_metrics.main(["--metrics", *map(str, paths.values()), "--table", str(table)])
        return paths, pq.read_table(table).to_pylist()

    return run


@pytest.fixture(params=["results", "all_measured"])
def described(request):
    """Results with and without optional measurements."""
    return request.getfixturevalue(request.param)


def number_at(content, key):
    """The number at a key, which is a path of names and list indices."""
    for name in key.split("."):
        content = content[int(name) if isinstance(content, list) else name]
    return content


def test_every_number_is_in_its_file_under_its_key(collect, described):
    _, rows = collect(described)
    assert len(rows) > 80
    for row in rows:
        content = files.read_json(Path(row["file"]))
        assert number_at(content, row["key"]) == row["value"], row
        # The error and the count are next to it.
        beside = number_at(content, row["key"].rpartition(".")[0]) if "." in row["key"] else content
        if row["error"] is not None:
            assert row["error"] in beside.values() and row["error_is"], row
        if row["n"] is not None:
            assert row["n"] in beside.values(), row


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


def test_optional_measurements_have_their_figures(collect, all_measured):
    _, rows = collect(all_measured)
    found = {
        (row["run"], row["link"], row["name"]): (row["value"], row["n"], row["file"])
        for row in rows
    }
    assert len(found) == len(rows)
    place = "results/runs/mistral/evaluation"
    assert found["mistral", "AWQ", "perplexity"] == (6.25, 34_567, f"{place}/awq.json")
    assert found["mistral", "AWQ", "size"][0] == 3 * 2**20
    wiki = (22.1, 34_567, f"{place}/texts/wiki/F16.json")
    assert found["mistral", "F16", "wiki: perplexity"] == wiki
    base = (1024, 60, "results/evaluation/tiny/chats/base.context.json")
    assert found["mistral", "base", "effective context, RULER"] == base
    assert found["generic", "merged", "gain of long context"][0] == 0.0123
    task = (0.75, 4, f"{place}/merged.tasks.json")
    assert found["mistral", "merged", "hellaswag acc_norm, 10-shot"] == task
    task = (0.25, 4, "results/evaluation/tiny/base.tasks.json")
    assert found["mistral", "base", "hellaswag acc_norm, 10-shot"] == task
    matched = (0.2, 5, "results/evaluation/tiny/chats/base.references.json")
    assert found["generic", "base", "reference answers exact_match"] == matched
    matched = (0.1, 5, f"{place}/Q4_K_M.references.json")
    assert found["mistral", "Q4_K_M", "reference answers exact_match, 2.5 %"] == matched
    # The ends of an interval have no error.
    ends = [row for row in rows if row["name"].endswith(" %")]
    assert len(ends) > 20 and {row["error"] for row in ends} == {None}
    # A context that is not measurable has no row.
    assert ("generic", "Q4_K_M", "effective context, RULER") in found
    assert ("mistral", "Q4_K_M", "effective context, RULER") not in found


def test_the_json_of_a_run_contains_its_rows_by_link(collect):
    paths, rows = collect()
    metrics = files.read_json(paths["mistral"])
    assert metrics["settings"]["packing"] == "apart"
    for row in rows:
        if row["run"] == "mistral":
            kept = metrics["links"][row["link"] or "run"][row["name"]]
            assert kept == {key: row[key] for key in kept}
    read = {row["file"] for row in rows if row["run"] == "mistral"}
    assert read <= metrics["files"].keys()


def test_a_change_of_a_file_outside_its_metrics_changes_the_json_of_the_run(collect, results):
    """Reports of all runs are rebuilt only if this file changes."""
    before, _ = collect()
    said = before["mistral"].read_bytes()
    path = results.folder / "runs" / "mistral" / "evaluation" / "merged.json"
    files.write_json(path, files.read_json(path) | {"by_position": []})
    after, _ = collect()
    assert after["mistral"].read_bytes() != said


def test_figures_without_a_measurement_have_no_row(collect, results):
    given = {"packing": None, "recipe": None, "merged": "owner/model"}
    (results.folder / "runs" / "mistral" / "adapter" / "training_manifest.json").unlink()
    _, rows = collect(results.changed({"mistral": given}))
    of_run = {row["name"] for row in rows if row["run"] == "mistral" and not row["link"]}
    assert "fill of the rows" not in of_run and "steps of training" not in of_run
    assert not any(row["link"] == "adapter" for row in rows if row["run"] == "mistral")


def test_a_missing_file_is_named(collect, results):
    path = results.folder / "runs" / "mistral" / "gguf_check.json"
    path.unlink()
    with pytest.raises(StageError, match="a file is missing") as caught:
        collect()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("stage", ["collect_metrics", "tabulate_metrics"])
def test_help_starts_without_torch(ask_for_help, stage):
    done, imported = ask_for_help(f"workflow_scripts.report.{stage}")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib"}
