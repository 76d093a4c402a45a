from __future__ import annotations

import pytest

from workflow_scripts.log import StageError


def test_a_runs_links_go_from_the_base_to_the_smallest_file(results):
    runs = results.read()
    assert [run.name for run in runs] == ["generic", "mistral"]
    for run in runs:
        names = [link.name for link in run.links]
        assert names == ["base", "base NF4", "adapter", "merged", "F16", "Q4_K_M"]
        assert [link.speed is None for link in run.links] == [True, True] + [False] * 4


def test_every_figure_comes_from_its_own_run(results):
    generic, mistral = results.read()
    assert generic.link("merged").scores.perplexity == 5.05
    assert mistral.link("merged").scores.perplexity == 6.05
    assert generic.link("base").scores == mistral.link("base").scores
    assert (generic.manifest.n_steps, mistral.manifest.n_steps) == (7, 8)
    assert mistral.settings.packing == "apart"
    assert mistral.facts.sliding_window == 64


def test_a_missing_measurement_is_a_stage_error_that_names_the_file(results):
    path = results.folder / "runs" / "mistral" / "evaluation" / "Q4_K_M.inference.json"
    path.unlink()
    with pytest.raises(StageError, match="a file is missing") as caught:
        results.read()
    assert str(path) in str(caught.value)


def test_a_run_that_was_not_trained_here_has_no_manifest(results):
    given = {"packing": None, "recipe": None}
    results = results.changed(
        {
            "generic": given | {"adapter": "owner/adapter"},
            "mistral": given | {"merged": "owner/model"},
        }
    )
    for name in ("generic", "mistral"):
        (results.folder / "runs" / name / "adapter" / "training_manifest.json").unlink()
    (results.folder / "runs" / "mistral" / "evaluation" / "adapter.json").unlink()
    generic, mistral = results.read()
    assert generic.manifest is None and mistral.manifest is None
    assert [link.name for link in generic.links][2:4] == ["adapter", "merged"]
    assert [link.name for link in mistral.links][1:3] == ["base NF4", "merged"]


def test_only_measured_links_have_texts_and_context(all_measured):
    _, mistral = all_measured.read()
    by_link = {link.name: link for link in mistral.links}
    with_text = [name for name, link in by_link.items() if link.texts]
    assert with_text == ["base", "merged", "F16", "Q4_K_M"]
    with_context = [name for name, link in by_link.items() if link.context]
    assert with_context == ["base", "merged", "Q4_K_M"]
    assert by_link["F16"].texts["wiki"].perplexity == 22.1
    assert by_link["base"].context.n_prompts == 60
    assert by_link["Q4_K_M"].context.is_measurable is False
    assert mistral.link("AWQ").scores.perplexity == 6.25


def test_only_evaluated_links_have_tasks_and_the_base_is_shared(all_measured):
    generic, mistral = all_measured.read()
    by_link = {link.name: link.tasks for link in mistral.links if link.tasks}
    assert list(by_link) == ["base", "merged", "Q4_K_M"]
    assert [list(tasks) for tasks in by_link.values()] == [["tasks", "references"]] * 3
    assert by_link["merged"]["tasks"].scores[0].score == 0.75
    assert by_link["base"] == generic.link("base").tasks
