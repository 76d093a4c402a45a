from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.unit.orchestration.test_build import wildcards
from workflow_scripts.orchestration.links import Links

RUN, BASE = "runs/mistral/evaluation", "evaluation/demo/stdlib-help"
CHECKPOINT = "results/models/demo/checkpoint"
ADAPTER = "results/runs/mistral/adapter/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("place", "link", "files", "arguments"),
    [
        (BASE, "base", {"checkpoint": CHECKPOINT}, ["--precision", "native"]),
        (BASE, "base-nf4", {"checkpoint": CHECKPOINT}, ["--precision", "nf4"]),
        (
            RUN,
            "adapter",
            {"checkpoint": CHECKPOINT, "adapter": ADAPTER},
            ["--adapter", "results/runs/mistral/adapter", "--precision", "nf4"],
        ),
        (
            RUN,
            "merged",
            {
                "checkpoint": "results/runs/mistral/merged",
                "gate": "results/runs/mistral/merged_check.json",
            },
            [],
        ),
        (
            RUN,
            "Q8_0",
            {
                "gguf": "results/runs/mistral/gguf/mistral-Q8_0.gguf",
                "gate": "results/runs/mistral/gguf_check.json",
            },
            [],
        ),
        (BASE, "base-F16", {"gguf": "results/models/demo/gguf/demo-F16.gguf"}, []),
    ],
)
def test_a_link_has_its_files_and_the_arguments_that_name_it(build, place, link, files, arguments):
    links = Links(build())
    values = wildcards(place=place, link=link)
    assert links.files(values) == files
    weights = [("--checkpoint" if "checkpoint" in files else "--gguf")]
    weights.append(files.get("checkpoint") or files["gguf"])
    assert links.arguments(values, SimpleNamespace(**files)) == weights + arguments


def test_a_gate_is_an_input_that_re_runs_nothing(build):
    files = Links(build()).files(wildcards(place=RUN, link="merged"))
    assert files["gate"].flags["ancient"] is True
    assert not getattr(files["checkpoint"], "flags", {})


def test_a_quantization_is_compared_with_the_file_it_is_made_from(build):
    links = Links(build())
    source = links.source(wildcards(place=RUN, link="Q8_0"))
    assert source == "results/runs/mistral/gguf/mistral-F16.gguf"


def test_runs_on_one_base_share_its_scores(build):
    links = Links(build())
    scores = links.files_of(links.build.runs, lambda link: [link.scores])
    bases = [path for path in scores if "/base" in path]
    assert len(bases) == 2 and len(scores) == len(set(scores)) == 2 + 2 * 5


@pytest.mark.parametrize(
    ("tasks", "arguments"),
    [
        ({}, []),
        ({"names": ["mmlu"]}, []),
        ({"use": True}, ["--tasks", "base", "merged", "Q4_0", "--kinds", "references"]),
        (
            {"use": True, "names": ["mmlu"]},
            ["--tasks", "base", "merged", "Q4_0", "--kinds", "tasks", "references"],
        ),
    ],
)
def test_reports_get_the_measurements_that_the_config_requests(build, tasks, arguments):
    links = Links(build({"evaluation": {"tasks": tasks, "context": {"use": False}}}))
    assert links.also_measured() == arguments


@pytest.mark.parametrize("of_merged", [True, False])
def test_usable_context_includes_the_merged_model_on_request(build, of_merged):
    context = {"use": True, "of_merged": of_merged}
    found = Links(build({"evaluation": {"context": context}})).also_measured()
    assert found == ["--context", "base", *(["merged"] if of_merged else []), "Q4_0"]


def test_requested_measurements_are_not_part_of_the_chain(build):
    """So a further measurement re-runs nothing else."""
    chains = [
        Links(build({"evaluation": evaluation})).chain_settings("mistral")
        for evaluation in (
            {},
            {"tasks": {"use": True, "names": ["mmlu"]}},
            {"context": {"use": False, "of_merged": True}},
            {"samples": {"use": False}},
        )
    ]
    assert chains == [chains[0]] * 4
