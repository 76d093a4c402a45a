"""What every rule asks of a machine or a cluster: memory, time, GPUs; and where it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.facts import MISTRAL_7B
from tests.workflow.conftest import REPOSITORY, copy_workflow
from workflow_scripts.handover.facts import FileFacts

# A real model, of two files of 7 GB, whose training takes two nodes of four GPUs.
OWN_DATA = {
    "datasets": {"my-chats": {"files": ["data/sample-chats.jsonl"]}},
    "runs": {"mistral-7b-v0.3": {"dataset": "my-chats"}},
}
OVERLAY = OWN_DATA | {"training": {"gpus": 4, "nodes": 2}, "awq": {"use": True}}
WEIGHTS = FileFacts(size_bytes=7_000_000_000)
FACTS = MISTRAL_7B.changed(files={"1.safetensors": WEIGHTS, "2.safetensors": WEIGHTS})
# Every rule that runs a program, as Snakemake has it, for a job of that model.
READ = """
import inspect, json
from pathlib import Path
from types import SimpleNamespace
from snakemake.api import SnakemakeApi
from snakemake.iocontainers import Wildcards
from snakemake.settings.types import ConfigSettings, ResourceSettings

names = Wildcards(fromdict={
    "run": "mistral-7b-v0.3", "model": "mistral-7b-v0.3", "dataset": "my-chats",
    "packing": "swa-aware", "quant": "Q4_K_M", "text": "text", "source": "source",
    "place": "runs/mistral-7b-v0.3/evaluation", "link": "",
})

def asked(value, link, attempt):
    if not callable(value):
        return value
    given = {"input": SimpleNamespace(facts="facts.json"), "attempt": attempt}
    asks_for = inspect.signature(value).parameters
    names.link = link
    return value(names, **{name: given[name] for name in given if name in asks_for})

with SnakemakeApi() as api:
    workflow = api.workflow(
        resource_settings=ResourceSettings(cores=8),
        config_settings=ConfigSettings(
            configfiles=[Path("config/models/mistral-7b-v0.3.yaml"), Path("overlay.yaml")]
        ),
        snakefile=Path("Snakefile"),
    )._workflow
    print(json.dumps({
        (f"{rule.name} of {link}" if "link" in rule.wildcard_names else rule.name): {
            "shell": rule.shellcmd,
            "is_local": rule.name in workflow._localrules,
            **{
                name: [asked(resource._value, link, attempt) for attempt in (1, 2)]
                for name, resource in rule.resources.items()
                if name != "tmpdir"
            },
        }
        for rule in workflow.rules
        if rule.shellcmd
        for link in ("adapter", "merged", "F16")
    }))
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resources")
    copy_workflow(folder)
    (folder / "overlay.yaml").write_text(yaml.safe_dump(OVERLAY))
    FACTS.write(folder / "facts.json")
    done = subprocess.run(
        [sys.executable, "-c", READ], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_rule_says_what_memory_and_time_it_takes_and_asks_for_more_when_tried_again(
    rules,
) -> None:
    for name, rule in rules.items():
        if name == "push_release":  # asks the Hub, by hand
            continue
        first, second = rule["mem_mb"]
        assert second == pytest.approx(2 * first, abs=1) and first >= 500, name
        first, second = rule["runtime"]
        # Training goes on where the attempt before ended.
        assert second == (first if name == "train_adapter" else 2 * first), name
        assert rule["_cores"][0] >= 1, name


def test_what_holds_a_model_asks_for_memory_by_its_size(rules) -> None:
    # 14 GB of weights, 4 GB beside.
    assert rules["evaluate_perplexity of merged"]["mem_mb"][0] == 2 * 14_000 + 4_000
    # llama.cpp maps its file.
    assert rules["evaluate_perplexity of F16"]["mem_mb"][0] == 1.1 * 14_000 + 4_000
    assert rules["train_adapter"]["mem_mb"][0] == 4 * 14_000 + 4_000  # a process a GPU of the node
    # Tensor by tensor, whatever the size.
    assert rules["merge_adapter"]["mem_mb"][0] == 4_000


def test_every_job_with_a_gpu_takes_it_from_those_that_are_free(rules) -> None:
    with_gpu = {name for name, rule in rules.items() if rule.get("gpu", [0])[0]}
    assert {"train_adapter", "check_merged", "evaluate_perplexity of adapter"} <= with_gpu
    assert "evaluate_perplexity of F16" not in with_gpu  # llama.cpp, on the CPU
    for name in with_gpu:
        assert (
            rules[name]["shell"]
            .removeprefix("exec ")
            .startswith("python -m workflow_scripts.take_gpus {resources.gpu} python -m")
        ), name
        assert not rules[name]["is_local"], name
    assert rules["check_merged"]["gpu"][0] == 1


def test_training_on_several_nodes_is_a_task_a_node(rules) -> None:
    train = rules["train_adapter"]
    assert (train["nodes"][0], train["tasks"][0], train["mpi"][0]) == (2, 2, "srun")
    assert train["gpu"][0] == 8 and rules["plan_memory"]["gpu"][0] == 4  # planned on one of them
    assert all("mpi" not in rule for name, rule in rules.items() if name != "train_adapter")


def test_what_takes_seconds_or_downloads_asks_a_cluster_for_no_node(rules) -> None:
    local = {name for name, rule in rules.items() if rule["is_local"]}
    reports = {name for name in rules if name.startswith("report_")}
    downloads = {name for name in rules if name.startswith("fetch_")}
    others = {"plan_disk", "plan_quantizations", "check_recipe"}
    others |= {"preview_chats", "push_release", "link_base_model"}
    others |= {"write_chain", "collect_metrics", "tabulate_metrics"}
    assert local == reports | downloads | others
    for name in local - {"push_release"}:
        assert rules[name]["mem_mb"][0] <= 4_000 and rules[name]["_cores"][0] == 1, name


def test_the_slurm_profiles_know_every_partition_s_gpus() -> None:
    partitions = yaml.safe_load((REPOSITORY / "profiles/slurm/partitions.yaml").read_text())
    gpus = {name: limits["max_gpu"] for name, limits in partitions["partitions"].items()}
    assert gpus["cpu"] == 0 < gpus["gpu"]


@pytest.mark.parametrize(
    ("n_cores", "overlay", "n_threads"),
    [
        (1, [], 1),
        (2, [], 1),
        (8, [], 4),
        (8, ["config/models/mistral-7b-v0.3.yaml", "mine.yaml"], 8),  # one at a time, on its GPU
    ],
)
def test_trainings_of_the_demo_share_the_cores(tmp_path, n_cores, overlay, n_threads) -> None:
    copy_workflow(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(OWN_DATA))
    shown = subprocess.run(
        [sys.executable, "-m", "snakemake", "train", "-n", "--cores", str(n_cores)]
        + (["--configfile", *overlay] if overlay else []),
        cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    trainings = re.findall(r"^(?:local)?rule train_adapter:\n((?: +.*\n)+)", shown, re.MULTILINE)
    assert trainings
    for about in trainings:  # Snakemake says nothing of a single one
        (said,) = re.findall(r"threads: (\d+)", about) or ["1"]
        assert int(said) == n_threads
