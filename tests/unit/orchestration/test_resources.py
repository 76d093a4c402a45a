from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from tests.facts import MISTRAL_7B
from tests.unit.orchestration.test_build import wildcards
from workflow_scripts.handover.facts import FileFacts
from workflow_scripts.orchestration.resources import Resources, growing, memory_of_models

OF_RUN = "runs/mistral/evaluation"


def test_a_resource_grows_with_each_attempt():
    amount = growing(500)
    assert [amount(wildcards(), attempt) for attempt in (1, 2, 3)] == [500, 1000, 1500]


def test_memory_follows_the_size_of_the_weights_and_changed_facts(tmp_path):
    path = tmp_path / "facts.json"
    given = SimpleNamespace(facts=str(path))
    megabytes = memory_of_models(2)
    with pytest.raises(FileNotFoundError):  # Snakemake asks again
        megabytes(wildcards(), given, 1)
    for number, size in enumerate((7_000_000_000, 1_000_000_000)):
        files = {
            "config.json": FileFacts(size_bytes=600),
            "a.safetensors": FileFacts(size_bytes=size),
        }
        MISTRAL_7B.changed(files=files).write(path)
        os.utime(path, ns=(number, number))
        assert megabytes(wildcards(), given, 1) == 2 * size // 10**6 + 4_000
        assert megabytes(wildcards(), given, 2) == 2 * (2 * size // 10**6 + 4_000)


def test_the_demo_and_llama_cpp_take_no_gpu_slot(build):
    source = {"models": {"real": {"source": "owner/model"}}}
    runs = {"runs": {"real": {"model": "real", "dataset": "stdlib-help", "merged": "owner/m"}}}
    resources = Resources(build(source | runs))
    for place, link, gpus in (
        (OF_RUN, "merged", 0),
        ("runs/real/evaluation", "merged", 1),
        ("runs/real/evaluation", "F16", 0),
        ("evaluation/real/stdlib-help", "base", 1),
    ):
        assert resources.gpus_of_scoring(wildcards(place=place, link=link)) == gpus
    assert resources.threads_of_link(wildcards(place=OF_RUN, link="F16")) == 1
    assert resources.threads_of_link(wildcards(place="runs/real/evaluation", link="F16")) == 8


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (8, 4), (64, 8), (None, 8)])
def test_trainings_of_the_demo_share_the_cores(build, cores, threads):
    resources = Resources(build(cores=cores))
    assert resources.threads_of_training(wildcards(run="mistral")) == threads
