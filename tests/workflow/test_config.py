"""Configs: every overlay dry-runs, and a wrong one stops with one clear message before any job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import DEMO, REPOSITORY, jobs_of
from workflow_scripts import settings_documents

MODELS = sorted((REPOSITORY / "config" / "models").glob("*.yaml"))
EXPERIMENTS = [
    path
    for path in sorted((REPOSITORY / "config" / "experiments").glob("*.yaml"))
    if "sweep: true" not in path.read_text()  # test_sweep.py's
]


def own_data(run: str) -> dict[str, object]:
    """What a user writes to train a real model on their own chats."""
    return {
        "datasets": {"my-chats": {"files": ["data/sample-chats.jsonl"]}},
        "runs": {run: {"dataset": "my-chats"}},
    }


@pytest.mark.parametrize("overlay", MODELS, ids=lambda path: path.stem)
def test_the_overlay_of_a_real_model_builds_one_run(workflow, tmp_path, overlay: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(own_data(overlay.stem)))
    jobs = jobs_of(workflow("-n", "--cores", 8, "--configfile", overlay, mine))
    assert jobs["train_adapter"] == jobs["fetch_base_model"] == jobs["package_release"] == 1
    assert "build_demo_model" not in jobs


def test_there_is_an_overlay_for_every_model_that_is_promised() -> None:
    wanted = {
        f"mistral-7b-{kind}{version}"
        for kind in ("", "instruct-")
        for version in ("v0.1", "v0.2", "v0.3")
    } | {"mistral-nemo-base-2407", "mixtral-8x7b-v0.1"}
    assert wanted <= {path.stem for path in MODELS}


@pytest.mark.parametrize("overlay", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_trains_its_runs_and_exports_nothing(workflow, overlay: Path) -> None:
    jobs = jobs_of(workflow("experiment", "-n", "--cores", 8, "--configfile", DEMO, overlay))
    assert jobs["train_adapter"] == jobs["evaluate_positions"] >= 6
    recalls = overlay.stem != "recipe"  # which leaves it out
    assert jobs.get("evaluate_recall", 0) == (jobs["train_adapter"] if recalls else 0)
    assert jobs["report_experiment"] == 1
    assert not {"merge_adapter", "convert_gguf", "package_release"} & jobs.keys()


def test_a_base_to_merge_into_is_measured_for_the_runs_that_ask(workflow) -> None:
    result = workflow("-n", "-p", "--cores", 8, "--config", "runs={mistral: {merge_base: auto}}")
    jobs = jobs_of(result)
    assert jobs["choose_merge_base"] == 1
    assert jobs["merge_adapter"] == 2
    assert "--merge-base results/runs/mistral/merge_base.json" in result.stdout
    assert "--merge-base original" in result.stdout


@pytest.mark.parametrize("use", [True, False])
def test_the_overview_shows_answers_where_the_config_asks_for_them(workflow, tmp_path, use) -> None:
    overlay = {"evaluation": {"samples": {"use": use}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(overlay))
    result = workflow("-n", "-p", "--cores", 8, "--configfile", DEMO, tmp_path / "mine.yaml")
    jobs = jobs_of(result)
    # Of both runs the tuned model and the smallest file, by llama.cpp; of their base once.
    assert jobs.get("answer_prompts", 0) == (5 if use else 0)
    answered = set(re.findall(r"--answers (\S+)", result.stdout))
    assert answered == {
        f"results/{place}.answers.json"
        for place in (
            "evaluation/demo/stdlib-help/base",
            *(
                f"runs/{run}/evaluation/{link}"
                for run in ("generic", "mistral")
                for link in ("F16", "Q4_0")
            ),
        )
        if use
    }
    shown = "--sampled generic mistral --samples base F16 Q4_0"
    assert (shown in result.stdout) == use
    assert ("mistral/evaluation/Q4_0.answers.json" in result.stdout) == use


def test_an_overlay_with_own_data_builds_its_run_alone(workflow) -> None:
    jobs = jobs_of(workflow("-n", "--cores", 8, "--configfile", DEMO, "config/own-data.yaml"))
    assert jobs["train_adapter"] == jobs["clean_dataset"] == 1
    assert "build_demo_dataset" not in jobs


def test_nothing_of_the_demo_reaches_a_run_of_a_real_model(workflow, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own_data("mistral-7b-v0.3")))
    overlay = "config/models/mistral-7b-v0.3.yaml"
    result = workflow("-n", "-p", "--cores", 8, "--configfile", overlay, "mine.yaml")
    jobs = jobs_of(result)
    assert not {"answer_prompts", "report_context"} & jobs.keys()
    assert '"perplexity_increase_fraction":0.005' in result.stdout
    assert "0.02" not in result.stdout and "stdlib" not in result.stdout


def test_a_config_without_a_model_says_which_file_to_name_first(workflow) -> None:
    result = workflow("-n", "--configfile", "config/own-data.yaml")
    assert result.returncode == 1
    assert "config/demo.yaml my-data.yaml" in result.stdout + result.stderr
    (overlay,) = [path for path in MODELS if path.stem == "mistral-7b-v0.3"]
    result = workflow("-n", "--configfile", overlay)
    assert result.returncode == 1
    said = "runs.mistral-7b-v0.3.dataset: missing (name a dataset of yours"
    assert said in result.stdout + result.stderr


def test_own_data_goes_into_the_run_of_a_real_model(workflow, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own_data("mistral-7b-v0.3")))
    overlay = "config/models/mistral-7b-v0.3.yaml"
    jobs = jobs_of(workflow("-n", "--cores", 8, "--configfile", overlay, "mine.yaml"))
    assert jobs["clean_dataset"] == 1
    assert "build_demo_dataset" not in jobs


def test_a_dataset_of_several_sources_fetches_what_the_hub_has(workflow, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("a.jsonl.gz", "b.csv"):
        (tmp_path / "more" / name).touch()
    mixed = {
        "sources": {
            "ours": {"files": ["data/sample-chats.jsonl", str(tmp_path / "more")], "weight": 2},
            "web": {"hub": "owner/chats", "revision": "0" * 40, "split": "train_sft"},
        }
    }
    overlay = {"datasets": {"mixture": mixed}, "runs": {"my-run": {"dataset": "mixture"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(overlay))
    result = workflow(
        *("preview", "-n", "-p", "--cores", 8),
        *("--configfile", DEMO, "config/own-data.yaml", tmp_path / "mine.yaml"),
    )
    jobs = jobs_of(result)
    assert jobs["fetch_dataset"] == jobs["clean_dataset"] == jobs["report_cleaning"] == 1
    assert jobs["preview_chats"] == 1
    assert jobs["report_packing"] == 1
    assert "train_adapter" not in jobs
    assert (
        f"--source ours data/sample-chats.jsonl {tmp_path}/more/a.jsonl.gz {tmp_path}/more/b.csv"
        " --source web results/data/mixture/hub/web/rows.parquet"
    ) in result.stdout


def test_a_pattern_without_a_file_stops_before_any_job(workflow, tmp_path: Path) -> None:
    overlay = {"datasets": {"my-chats": {"files": ["data/none-*.jsonl"]}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(overlay))
    result = workflow(
        *("-n", "--cores", 8, "--configfile", DEMO, "config/own-data.yaml", tmp_path / "mine.yaml")
    )
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "datasets.my-chats: a dataset's pattern matches no file" in output
    assert "data/none-*.jsonl" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("overlay", "parts"),
    [
        (
            {"recipes": {"mistral-lora-demo": {"learning_rat": 1e-4}}},
            ["recipes.mistral-lora-demo.learning_rat", "unknown key", "learning_rate"],
        ),
        (
            {"recipes": {"mistral-lora-demo": {"rank": "many"}}},
            ["recipes.mistral-lora-demo.rank", "'many'"],
        ),
        (
            {"runs": {"mistral": {"recipe": "mistral-lorra-demo"}}},
            ["runs.mistral.recipe", "mistral-lorra-demo", "did you mean 'mistral-lora-demo'"],
        ),
        (
            {"gguf": {"quantizations": ["Q8_0", "Q4_KM"]}},
            ["gguf.quantizations.1", "'Q4_KM'", "did you mean 'Q4_K_M'"],
        ),
    ],
    ids=["unknown key", "wrong type", "missing recipe", "no such quantization"],
)
def test_a_wrong_config_is_one_message_before_any_job(
    workflow, tmp_path: Path, overlay: dict, parts: list[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(overlay))
    result = workflow("--cores", 1, "--configfile", DEMO, "wrong.yaml")
    text = result.stdout + result.stderr
    assert result.returncode != 0
    for part in parts:
        assert part in text
    assert "Traceback" not in text
    assert "Job stats" not in text
    assert not (tmp_path / "results").exists()


def test_a_number_that_yaml_takes_for_text_is_a_number(workflow, tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_text("recipes: {mistral-lora-demo: {learning_rate: 2e-4}}\n")
    assert isinstance(
        yaml.safe_load((tmp_path / "text.yaml").read_text())["recipes"]["mistral-lora-demo"][
            "learning_rate"
        ],
        str,
    )
    result = workflow("-n", "-p", "--cores", 8, "--configfile", DEMO, "text.yaml")
    assert '"learning_rate":0.0002' in result.stdout + result.stderr


def test_the_smoke_setting_caps_every_training(workflow) -> None:
    result = workflow("-n", "-p", "--cores", 8, "--config", "max_steps=2")
    text = result.stdout + result.stderr
    trained = [line for line in text.splitlines() if "train.train_adapter" in line]
    # Each once: a stage's log, set up in the Snakefile, would say everything again.
    assert len(trained) == 2 and all('"max_steps":2' in line for line in trained)
    assert '"n_healing_steps":2' in text


def test_schema_and_option_tables_are_those_of_the_settings() -> None:
    repair = "run `make schema` and commit what it wrote"
    schema = (REPOSITORY / settings_documents.SCHEMA).read_text(encoding="utf-8")
    page = (REPOSITORY / settings_documents.PAGE).read_text(encoding="utf-8")
    assert schema == settings_documents.schema_text(), repair
    assert page == settings_documents.page(), repair


def test_dynamic_scaling_is_refused_where_gguf_is_made_and_nowhere_else(workflow, tmp_path) -> None:
    scaled = {"models": {"demo": {"rope_scaling": {"type": "dynamic", "factor": 2}}}}
    (tmp_path / "dynamic.yaml").write_text(yaml.safe_dump(scaled))
    command = ("-n", "--cores", 2, "--configfile", DEMO, "dynamic.yaml")
    assert jobs_of(workflow("train", *command))["train_adapter"] == 2
    result = workflow("export", *command)
    assert result.returncode == 1
    for part in ("GGUF has no form of dynamic NTK", "models.demo.rope_scaling.type", "use yarn"):
        assert part in result.stdout + result.stderr
