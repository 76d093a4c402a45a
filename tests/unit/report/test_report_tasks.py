from __future__ import annotations

from pathlib import Path

import pytest

from tests.tasks import reference_scores, task_scores
from tests.unit.evaluate.test_task_scores import rows_of, score_of
from tests.unit.report.conftest import chain_settings
from workflow_scripts.evaluate.task_scores import Samples, write_samples
from workflow_scripts.handover.chain import chain_of
from workflow_scripts.report import report_tasks, task_table


def asked(links, kinds):
    """Arguments for a run whose base and links have scores in tasks."""
    path = Path("results", "chain.json")
    chain_of("r", chain_settings("mistral")).write(path)
    return ["--chains", str(path), "--tasks", "base", *links, "--kinds", *kinds]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = Path("results")
    of_base, of_merged, of_file = [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]
    name = "reference answers"
    marked = {"asked": name, "task": name, "subtasks": [name], "metric": "exact_match"}
    marked |= {"low": 0.1, "high": 0.9}
    for kind, where, values, more in (
        ("tasks", "evaluation/tiny/base", of_base, {"standard_error": 0.25}),
        ("tasks", "runs/r/evaluation/merged", of_merged, {"standard_error": 0.2886}),
        ("tasks", "runs/r/evaluation/Q4_K_M", of_file, {"n_truncated": 3}),
        ("references", "evaluation/tiny/chats/base", [], None),
        ("references", "runs/r/evaluation/merged", of_merged, marked),
        ("references", "runs/r/evaluation/Q4_K_M", of_file, marked),
    ):
        path = results / f"{where}.{kind}"
        scores = [] if more is None else [score_of(values, **more)]
        report = task_scores(*scores) if kind == "tasks" else reference_scores(*scores)
        report.write(path.with_name(f"{path.name}.json"))
        rows = rows_of(values, "t" if kind == "tasks" else "reference answers")
        for row in rows:
            row["asked"] = row["task"]
            row["metric"] = "acc" if kind == "tasks" else "exact_match"
        write_samples(path.with_name(f"{path.name}.parquet"), rows)
    paths = [tmp_path / f"tasks.{form}" for form in ("tsv", "md", "html")]
    report_tasks.main(
        [*asked(["merged", "Q4_K_M"], ["tasks", "references"])]
        + ["--tsv", str(paths[0]), "--markdown", str(paths[1]), "--html", str(paths[2])]
    )
    return paths


def test_every_link_has_its_score_and_its_change(write):
    header, *rows = [line.split("\t") for line in write[0].read_text().splitlines()]
    assert header == ["Task, run and link", "Examples", "Score", "Difference", "n", "cut"]
    assert rows == [
        ["t acc: r: base", "0", "25.00 ± 25.00", "–", "4", "0"],
        # One of four documents changes: sd 0.5, ÷ √4.
        ["t acc: r: merged", "0", "50.00 ± 28.86", "+25.00 ± 25.00", "4", "0"],
        ["t acc: r: Q4_K_M", "0", "75.00", "+25.00 ± 25.00", "4", "3"],
        # The base has no such score to compare with.
        ["reference answers exact_match: r: merged", "0", "50.00 [10.00, 90.00]", "–", "4", "0"],
        ["reference answers exact_match: r: Q4_K_M", "0", "75.00 [10.00, 90.00]",
         "+25.00 ± 25.00", "4", "0"],
    ]  # fmt: skip


def link_of(**scored):
    """A link with the given scores of documents, by `task_metric`."""
    scores, rows = [], []
    for name, values in scored.items():
        task, _, metric = name.partition("_")
        of_task = {"asked": task, "task": task, "metric": metric, "subtasks": [task]}
        scores.append(score_of(values, **of_task))
        rows += [row | {"metric": metric} for row in rows_of(values, task, asked=task)]
    kinds = ["tasks"] * len(scores)
    return task_table.Link("link", scores, {"tasks": Samples(rows)}, kinds)


def changes(above, link):
    return [cells[2] for _, one, cells in task_table.cells_of([above, link]) if one is link]


def test_a_score_is_compared_with_the_same_task_and_metric():
    above = link_of(a_acc=[0.0, 0.0], a_acc_norm=[1.0, 1.0], b_acc=[1.0, 0.0])
    link = link_of(a_acc=[1.0, 1.0], a_acc_norm=[1.0, 1.0], b_acc=[0.0, 0.0])
    assert changes(above, link) == ["+100.00 ± 0.00", "0.00 ± 0.00", "−50.00 ± 50.00"]
    assert changes(link_of(a_acc=[0.0, 0.0]), link) == ["+100.00 ± 0.00", "–", "–"]


def test_a_task_requested_alone_and_in_a_group_has_two_names():
    scored = score_of([1.0], task="b", asked="b@2", n_examples=2)
    assert task_table.name_of(scored, "tasks") == "b acc, 2-shot"
    assert task_table.name_of(scored.changed(asked="all@2"), "tasks") == "b acc, 2-shot (all)"
    assert task_table.name_of(scored, "references") == "b acc"


def test_a_difference_that_rounds_to_zero_has_no_sign():
    above, link = link_of(a_acc=[0.50001, 0.50001]), link_of(a_acc=[0.5, 0.5])
    assert changes(above, link) == changes(link, above) == ["0.00 ± 0.00"]


def test_only_fractions_are_printed_in_per_cent():
    above, link = link_of(a_word_perplexity=[12.5, 13.5]), link_of(a_word_perplexity=[12.5, 12.5])
    assert task_table.shown(link.scores[0]) == "12.50"
    assert changes(above, link) == ["−0.50 ± 0.50"]
    assert task_table.shown(link_of(a_f1=[0.25]).scores[0]) == "25.00"


def test_without_tasks_the_table_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = Path("results")
    for where in ("evaluation/tiny/chats/base", "runs/r/evaluation/merged"):
        reference_scores().write(results / f"{where}.references.json")
        write_samples(results / f"{where}.references.parquet", [])
    report_tasks.main(
        [*asked(["merged"], ["references"])]
        + [f"--{form}={tmp_path / form}" for form in ("tsv", "markdown", "html")]
    )
    assert "There are no tasks" in (tmp_path / "html").read_text()


def test_the_forms_have_the_same_content(write):
    for path in write[1:]:
        text = path.read_text()
        assert "75.00 [10.00, 90.00]" in text and "+25.00 ± 25.00" in text


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_tasks")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp", "lm_eval"}
