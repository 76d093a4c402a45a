from __future__ import annotations

import re

import pytest
from snakemake.exceptions import WorkflowError
from snakemake.iocontainers import Wildcards

from workflow_scripts.log import StageError
from workflow_scripts.orchestration.build import any_of, flagged, output_version, stopping


def wildcards(**names: str) -> Wildcards:
    return Wildcards(fromdict=names)


def test_a_constraint_matches_exactly_its_names():
    pattern = any_of(["a", "a.b", "a-long"])
    for name in ("a", "a.b", "a-long"):
        assert re.fullmatch(pattern, name)
    for name in ("", "aXb", "b", "a-"):
        assert not re.fullmatch(pattern, name)
    assert not re.fullmatch(any_of([]), "")


def test_runs_are_grouped_by_what_they_start_from(build):
    begun = {"model": "demo", "dataset": "stdlib-help"}
    found = build(
        {
            "runs": {
                "lora": {**begun, "adapter": "owner/lora"},
                "whole": {**begun, "merged": "owner/model"},
            },
            "build": ["mistral", "whole"],
            "frozen": ["gen*"],
        }
    )
    assert list(found.runs) == list(found.made_runs) == ["mistral", "whole"]
    assert list(found.adapter_runs) == ["lora"] and list(found.merged_runs) == ["whole"]
    assert not re.fullmatch(found.any_run_of(found.config.runs), "generic")  # frozen
    assert build({"frozen": ["gen*"]}).made_runs.keys() == {"mistral"}


def test_a_place_belongs_to_a_run_or_to_a_base(build):
    found = build()
    for place, owner in (
        ("runs/mistral/evaluation", {"run": "mistral", "model": "demo", "dataset": "stdlib-help"}),
        ("evaluation/demo/stdlib-help", {"model": "demo", "dataset": "stdlib-help"}),
        ("evaluation/demo", {"model": "demo"}),
    ):
        assert re.fullmatch(found.any_place, place)
        named = found.owner(wildcards(place=place))
        assert {key: named[key] for key in owner} == owner
    for place in ("runs/other/evaluation", "runs/mistral", "evaluation/demo/other"):
        assert not re.fullmatch(found.any_place, place)


def test_a_pattern_is_filled_with_the_names_of_its_run_or_place(build):
    found = build()
    path = found.of_run("{run}/{model}/{dataset}/{packing}")(wildcards(run="mistral"))
    assert path == "mistral/demo/stdlib-help/swa-aware-demo"
    of_place = found.of_place("{model}/{text}")
    assert of_place(wildcards(place="runs/mistral/evaluation", text="wiki")) == "demo/wiki"


def test_the_version_of_a_stage_is_read_from_its_file():
    assert output_version("packing/pack_sequences") >= 1
    with pytest.raises(WorkflowError, match="has no OUTPUT_VERSION"):
        output_version("packing/plan")


def test_an_error_of_a_stage_stops_snakemake_with_its_key():
    with pytest.raises(WorkflowError, match="runs.mistral: not right"):
        with stopping("runs.mistral"):
            raise StageError("not right")


def test_a_flag_without_files_is_left_out():
    assert flagged("--texts", ["a", "b"]) == ["--texts", "a", "b"]
    assert flagged("--texts", []) == []
