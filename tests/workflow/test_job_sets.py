"""A change re-runs what depends on it, and nothing else: dry runs against a finished build."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import DEMO, TINY, jobs_of, snakemake_in


def changed(folder: Path, tmp_path: Path, overlay: dict) -> dict[str, int]:
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return jobs_of(snakemake_in(folder)("-n", "--cores", 8, "--configfile", DEMO, TINY, path))


def processor_seconds() -> float:
    """Of this process's children that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_second_run_finds_nothing_to_do_within_five_seconds(tiny: Path) -> None:
    durations = []
    # Processor seconds, and the best of three: the machine may be busy with something else. Of a
    # dry run on a free one they were 4.6, and the clock's 4.6.
    for _ in range(3):
        started = processor_seconds()
        result = snakemake_in(tiny)("--cores", 8, "--configfile", DEMO, TINY)
        durations.append(processor_seconds() - started)
        assert result.returncode == 0
        assert "Nothing to be done" in result.stdout + result.stderr
    assert min(durations) < 5


def test_touching_every_source_file_re_runs_nothing(tiny: Path) -> None:
    for path in (tiny / "workflow_scripts").rglob("*.py"):
        path.touch()
    assert jobs_of(snakemake_in(tiny)("-n", "--cores", 8, "--configfile", DEMO, TINY)) == {}


# What follows a quantization that is made, of both runs.
EVALUATED = {
    "evaluate_quantization": 2,
    "evaluate_text": 2,
    "benchmark_inference": 2,
    "report_overview": 1,
    "report_run": 2,
    "report_comparison": 1,
    "report_chain": 1,
    "collect_metrics": 2,
    "tabulate_metrics": 1,
    "package_release": 2,
}


def test_a_new_quantization_runs_only_what_is_new_and_what_gathers(
    tiny: Path, tmp_path: Path
) -> None:
    jobs = changed(tiny, tmp_path, {"gguf": {"quantizations": ["Q8_0", "Q4_K_M", "Q6_K"]}})
    planned = {"plan_disk": 1, "plan_quantizations": 1, "write_chain": 2}
    assert jobs == {**planned, "quantize_gguf": 2, **EVALUATED}


def test_a_new_mix_runs_what_a_new_quantization_runs(tiny: Path, tmp_path: Path) -> None:
    mix = {"mixes": {"Q4_K_L": {"type": "Q4_K_M", "output": "Q8_0"}}}
    jobs = changed(tiny, tmp_path, {"gguf": {**mix, "quantizations": ["Q8_0", "Q4_K_M", "Q4_K_L"]}})
    planned = {"plan_disk": 1, "plan_quantizations": 1, "write_chain": 2}
    assert jobs == {**planned, "quantize_gguf": 2, **EVALUATED}


def test_another_text_is_scored_by_the_links_it_is_for_and_runs_nothing_else(
    tiny: Path, tmp_path: Path
) -> None:
    scored = {
        "chunk_text": 1,
        "evaluate_text": 1 + 2 * 4,  # the base; merged model and three files of both runs
        "report_chain": 1,
        "report_comparison": 1,
        "report_overview": 1,
        "report_run": 2,
        "collect_metrics": 2,
        "tabulate_metrics": 1,
    }
    overlay = {"evaluation": {"texts": {"data": "data/README.md"}}}
    assert changed(tiny, tmp_path, overlay) == scored | {"write_chain": 2}
    shorter = {"evaluation": {"text_context_tokens": 256}}
    assert changed(tiny, tmp_path, shorter) == scored


def test_usable_context_is_measured_with_the_rest_where_it_is_asked_for(
    tiny: Path, tmp_path: Path
) -> None:
    assert changed(tiny, tmp_path, {"evaluation": {"context": {"use": True}}}) == {
        "evaluate_context": 1 + 2 * 2,  # the base; merged model and smallest file of both runs
        "report_context": 1,
        "report_chain": 1,
        "report_comparison": 1,
        "report_overview": 1,
        "report_run": 2,
        "collect_metrics": 2,
        "tabulate_metrics": 1,
    }
    assert changed(tiny, tmp_path, {"evaluation": {"context": {"n_prompts": 3}}}) == {}


def test_the_base_s_own_gguf_is_converted_and_scored_once_for_both_runs(
    tiny: Path, tmp_path: Path
) -> None:
    jobs = changed(tiny, tmp_path, {"evaluation": {"base_gguf": True}})
    own = {"convert_gguf_base": 1, "evaluate_perplexity": 1, "evaluate_text": 1, "write_chain": 2}
    assert jobs.items() >= own.items()
    made_again = jobs.keys() - own.keys()
    assert made_again == {
        *("collect_metrics", "tabulate_metrics", "package_release"),
        *("report_chain", "report_comparison", "report_overview", "report_run"),
    }


def test_another_text_to_calibrate_on_makes_anew_what_is_made_with_the_imatrix(
    tiny: Path, tmp_path: Path
) -> None:
    jobs = changed(tiny, tmp_path, {"gguf": {"imatrix": {"n_tokens": 999}}})
    # Q4_K_M of both runs; Q8_0 is the same with one as without.
    assert jobs == {"compute_imatrix": 2, "quantize_gguf": 2, **EVALUATED}


def test_without_an_imatrix_what_was_made_with_one_is_made_anew_and_the_imatrix_is_not(
    tiny: Path, tmp_path: Path
) -> None:
    jobs = changed(tiny, tmp_path, {"gguf": {"imatrix": {"use": "auto"}}})
    assert jobs == {"plan_quantizations": 1, "quantize_gguf": 2, **EVALUATED}


def test_a_type_that_needs_an_imatrix_asks_for_it_by_itself(workflow, tmp_path: Path) -> None:
    for kind, n_matrices in (("Q4_K_M", 0), ("IQ2_XS", 2)):
        (tmp_path / "own.yaml").write_text(
            yaml.safe_dump({"gguf": {"quantizations": [kind], "imatrix": {"use": "auto"}}})
        )
        jobs = jobs_of(workflow("-n", "--cores", 8, "--configfile", DEMO, "own.yaml"))
        assert jobs.get("compute_imatrix", 0) == n_matrices


def test_the_imatrix_is_computed_on_training_text_alone(workflow) -> None:
    result = workflow("-n", "-p", "--cores", 8)
    commands = [line for line in result.stdout.splitlines() if "quantize.compute_imatrix" in line]
    assert len(commands) == 2
    for line in commands:
        assert "tokens/train.arrow" in line
        assert "validation" not in line and "test.arrow" not in line


def test_adapters_alone_need_no_merged_model_and_one_base(tiny: Path, tmp_path: Path) -> None:
    result = snakemake_in(tiny)("adapter_gguf", "-n", "--cores", 8, "--configfile", DEMO, TINY)
    jobs = jobs_of(result)
    jobs.pop("adapter_gguf")
    assert jobs == {"convert_adapter": 2, "convert_gguf_base": 1}


def test_how_training_runs_on_a_machine_runs_nothing_again(tiny: Path, tmp_path: Path) -> None:
    overlay = {"training": {"gpus": 2, "checkpoint_steps": 7, "trackers": []}}
    assert changed(tiny, tmp_path, overlay) == {}


def test_a_new_learning_rate_trains_that_run_only_and_touches_no_data(
    tiny: Path, tmp_path: Path
) -> None:
    overlay = {"recipes": {"mistral-lora-demo": {"learning_rate": 9e-4}}}
    assert changed(tiny, tmp_path, overlay) == {
        "check_recipe": 1,
        "plan_memory": 1,
        "train_adapter": 1,
        "merge_adapter": 1,
        "check_merged": 1,
        "convert_gguf": 1,
        "check_gguf": 1,
        "compute_imatrix": 1,
        "quantize_gguf": 2,
        "evaluate_perplexity": 3,  # adapter, merged, F16
        "evaluate_quantization": 2,
        "evaluate_text": 4,
        "benchmark_inference": 5,
        "report_overview": 1,
        "report_run": 1,
        "report_comparison": 1,
        "report_chain": 1,
        "report_loss": 1,
        "collect_metrics": 1,
        "tabulate_metrics": 1,
        "package_release": 1,
    }


def test_another_base_to_merge_into_merges_again_and_trains_nothing(
    tiny: Path, tmp_path: Path
) -> None:
    jobs = changed(tiny, tmp_path, {"runs": {"mistral": {"merge_base": "auto"}}})
    assert jobs["choose_merge_base"] == jobs["merge_adapter"] == jobs["check_merged"] == 1
    assert jobs["convert_gguf"] == 1
    assert not {"train_adapter", "plan_memory"} & jobs.keys()
    assert jobs["evaluate_perplexity"] == 2  # merged and F16, not the adapter


@pytest.mark.parametrize(
    ("gate", "settings", "jobs"),
    [
        ("tokens", {"n_conversations": 7}, {"check_tokens": 1}),
        ("merge", {"perplexity_increase_fraction": 0.3}, {"check_merged": 2}),
        ("merge", {"n_conversations": 5}, {"check_merged": 2}),
        ("gguf", {"kl_divergence_nats": 1e-3}, {"check_gguf": 2}),
        ("gguf", {"n_conversations": 5}, {"check_gguf": 2}),
        ("gguf", {"parity_conversations": 7}, {"check_gguf": 2}),
        ("merge_base", {"n_conversations": 7}, {}),  # no run asks for the choice
    ],
)
def test_settings_of_a_gate_run_that_gate_alone(
    tiny: Path, tmp_path: Path, gate: str, settings: dict, jobs: dict
) -> None:
    assert changed(tiny, tmp_path, {"evaluation": {"gates": {gate: settings}}}) == jobs


@pytest.mark.parametrize(
    ("retention", "gone"),
    [
        ({}, set()),
        ({"merged": False}, {"merged"}),
        ({"f16": False}, {"gguf/{run}-F16.gguf"}),
        ({"merged": False, "f16": False}, {"merged", "gguf/{run}-F16.gguf"}),
    ],
)
def test_what_need_not_stay_goes_and_nothing_else(
    workflow, tmp_path: Path, retention: dict, gone: set
) -> None:
    """That it does go, and is not asked for again, test_given_models.py sees in a build."""
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"retention": retention}))
    result = workflow("-n", "--cores", 8, "--configfile", DEMO, "own.yaml")
    assert result.returncode == 0, result.stderr
    said = re.findall(r"Would remove temporary output (.+)", result.stdout + result.stderr)
    assert set(said) == {
        f"results/runs/{run}/{file.format(run=run)}"
        for run in ("generic", "mistral")
        for file in gone
    }


def test_a_longer_preview_makes_the_previews_alone(tiny: Path, tmp_path: Path) -> None:
    overlay = {"datasets": {"stdlib-help": {"preview": {"n_conversations": 3}}}}
    assert changed(tiny, tmp_path, overlay) == {"preview_chats": 2}


def test_answers_on_the_overview_are_all_that_they_add(tiny: Path, tmp_path: Path) -> None:
    jobs = changed(tiny, tmp_path, {"evaluation": {"samples": {"use": True}}})
    assert jobs == {"answer_prompts": 1 + 2 * 2, "report_overview": 1}


TASKS = {
    "fetch_tasks": 1,
    "evaluate_tasks": 1 + 2 * 2,
}
REFERENCES = {"match_references": 1 + 2 * 2}


def asked_for_tasks(folder: Path, tmp_path: Path, **tasks: object) -> dict[str, int]:
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump({"evaluation": {"tasks": tasks}}))
    jobs = jobs_of(snakemake_in(folder)("-n", "tasks", "--configfile", DEMO, TINY, path))
    return {name: n for name, n in jobs.items() if name != "tasks"}


def test_tasks_are_asked_of_base_merged_and_smallest_file_and_by_nothing_else(
    tiny: Path, tmp_path: Path
) -> None:
    # Without names there are the reference answers of the chats.
    assert asked_for_tasks(tiny, tmp_path) == {**REFERENCES, "report_tasks": 1}
    named = asked_for_tasks(tiny, tmp_path, names=["mmlu", "hellaswag@0"])
    assert named == {**TASKS, **REFERENCES, "report_tasks": 1}
    assert changed(tiny, tmp_path, {"evaluation": {"tasks": {"names": ["mmlu"]}}}) == {}


def test_tasks_are_scored_with_the_rest_where_that_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    gathers = {
        "report_tasks": 1,
        "report_chain": 1,
        "report_comparison": 1,
        "report_overview": 1,
        "report_run": 2,
        "collect_metrics": 2,
        "tabulate_metrics": 1,
    }
    overlay = {"evaluation": {"tasks": {"use": True}}}
    assert changed(tiny, tmp_path, overlay) == {**REFERENCES, **gathers}
    overlay["evaluation"]["tasks"]["names"] = ["mmlu"]
    assert changed(tiny, tmp_path, overlay) == {**TASKS, **REFERENCES, **gathers}


def test_a_folder_without_task_files_stops_before_any_job(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump({"evaluation": {"tasks": {"include": str(tmp_path / "no")}}}))
    result = snakemake_in(tiny)("-n", "tasks", "--configfile", DEMO, TINY, path)
    assert result.returncode != 0
    assert "evaluation.tasks.include" in result.stdout + result.stderr


def test_how_a_release_is_published_runs_nothing_again(tiny: Path, tmp_path: Path) -> None:
    publishing = {"push": {"owner": "me", "private": False, "dry_run": False}}
    assert changed(tiny, tmp_path, publishing) == {}


@pytest.mark.parametrize(
    "overlay", [{"models": {"demo": {"license": "psfl"}}}, {"gguf": {"quantized_by": "me"}}]
)
def test_what_the_files_themselves_say_makes_them_anew_and_trains_nothing(
    tiny: Path, tmp_path: Path, overlay: dict
) -> None:
    jobs = changed(tiny, tmp_path, overlay)
    assert jobs["convert_gguf"] == jobs["package_release"] == 2
    assert not {"train_adapter", "merge_adapter", "check_merged"} & jobs.keys()


@pytest.mark.parametrize("target", ["data", "train", "export", "evaluate", "report"])
def test_every_stage_target_is_finished_once_all_is(tiny: Path, target: str) -> None:
    assert jobs_of(snakemake_in(tiny)("-n", target, "--cores", 8, "--configfile", DEMO, TINY)) == {}


def test_forcing_training_runs_it_and_what_follows(tiny: Path) -> None:
    jobs = jobs_of(
        snakemake_in(tiny)("-n", "--cores", 8, "--configfile", DEMO, TINY, "-R", "train_adapter")
    )
    assert jobs["train_adapter"] == 2
    assert jobs["package_release"] == 2
    assert "pack_sequences" not in jobs


def test_both_runs_share_one_tokenized_dataset(workflow) -> None:
    jobs = jobs_of(workflow("-n", "--cores", 8))
    assert jobs["train_adapter"] == 2
    assert jobs["render_chats"] == jobs["clean_dataset"] == jobs["build_demo_model"] == 1
    assert jobs["pack_sequences"] == 2


def test_a_build_with_fewer_runs_plans_the_disk_and_makes_nothing_of_theirs(
    tiny: Path, tmp_path: Path
) -> None:
    jobs = changed(tiny, tmp_path, {"build": ["mistral"]})
    gathers = ("report_overview", "report_comparison", "report_chain", "report_loss")
    assert jobs == dict.fromkeys([*gathers, "tabulate_metrics", "plan_disk"], 1)
