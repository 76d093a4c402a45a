"""The links of the chain, and the paths made of them."""

from __future__ import annotations

import pytest

from workflow_scripts.handover.chain import Chain, ChainSettings, chain_of
from workflow_scripts.report import write_chain

TRAINED = {"model": "m", "dataset": "d", "packing": "p", "recipe": "r"}
MERGED = {"model": "m", "dataset": "d", "merged": "owner/model"}


def chain(run=TRAINED, **settings):
    return chain_of("x", ChainSettings(run=run, quantizations=["Q8_0", "Q4_0"], **settings))


def test_each_link_is_made_from_one_before_it():
    found = chain(awq=True).links
    assert {link.name: link.source for link in found} == {
        "base": None,
        "base-nf4": "base",
        "adapter": "base-nf4",
        "merged": "adapter",
        "F16": "merged",
        "Q8_0": "F16",
        "Q4_0": "F16",
        "awq": "merged",
    }
    assert [link.name for link in found if link.is_aside] == ["awq"]
    assert [link.name for link in found if link.is_product] == ["F16", "Q8_0", "Q4_0", "awq"]


def test_the_base_s_own_gguf_is_a_link_where_it_is_asked_for():
    found = chain(base_gguf=True, texts=["wiki"])
    assert [link.name for link in found.links][:4] == ["base", "base-F16", "base-nf4", "adapter"]
    link = found.link("base-F16")
    assert (link.source, found.link("base-nf4").source) == ("base", "base")
    assert link.scores == "results/evaluation/m/d/base-F16.json"
    assert link.texts == {"wiki": "results/evaluation/m/texts/wiki/base-F16.json"}
    assert link.speed is None and not link.is_product


def test_a_model_merged_elsewhere_has_no_adapter_and_nothing_of_a_training():
    found = chain(MERGED)
    assert [link.name for link in found.links] == [
        "base",
        "base-nf4",
        "merged",
        "F16",
        "Q8_0",
        "Q4_0",
    ]
    assert found.link("merged").source == "base-nf4"
    nothing = (found.packing_report, found.history, found.training_manifest, found.memory_plan)
    assert nothing == (None,) * 4


def test_a_base_is_measured_once_for_all_runs_of_a_model_and_dataset():
    found = chain(texts=["wiki"])
    base = found.base
    assert base.scores == "results/evaluation/m/d/base.json"
    assert base.token_scores == "results/evaluation/m/d/base.tokens.parquet"
    assert base.context == "results/evaluation/m/d/base.context.json"
    # Tasks and texts have nothing to do with the dataset; reference answers are of its chats.
    assert base.texts == {"wiki": "results/evaluation/m/texts/wiki/base.json"}
    assert base.tasks == {
        "tasks": "results/evaluation/m/base.tasks.json",
        "references": "results/evaluation/m/d/base.references.json",
    }
    other = chain_of("y", ChainSettings(run=TRAINED, quantizations=["Q2_K"], texts=["wiki"]))
    assert other.base.scores == base.scores and other.base.texts == base.texts


def test_a_quantization_has_all_its_measurements_in_the_folder_of_its_run():
    link = chain(texts=["wiki"]).link("Q4_0")
    place = "results/runs/x/evaluation"
    assert link.model_dump() == {
        "name": "Q4_0",
        "title": "Q4_0",
        "source": "F16",
        "is_aside": False,
        "is_product": True,
        "scores": f"{place}/Q4_0.json",
        "token_scores": f"{place}/Q4_0.tokens.parquet",
        "divergence": f"{place}/Q4_0.divergence.json",
        "speed": f"{place}/Q4_0.inference.json",
        "texts": {"wiki": f"{place}/texts/wiki/Q4_0.json"},
        "context": f"{place}/Q4_0.context.json",
        "answers": f"{place}/Q4_0.answers.json",
        "tasks": {kind: f"{place}/Q4_0.{kind}.json" for kind in ("tasks", "references")},
    }


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("base-nf4", {"divergence", "speed", "context", "answers"}),
        ("adapter", {"divergence", "context", "answers"}),
        ("merged", {"divergence"}),
        ("awq", {"divergence", "speed", "context", "answers"}),
    ],
)
def test_what_is_not_measured_of_a_link_has_no_path(name, lacks):
    link = chain(awq=True, texts=["wiki"]).link(name)
    assert {key for key, value in link.model_dump().items() if value is None} == lacks
    assert bool(link.texts) == bool(link.tasks) == (name == "merged")


def test_the_program_writes_what_reports_read(tmp_path):
    settings = ChainSettings(run=TRAINED, quantizations=["Q4_0"])
    path = tmp_path / "chain.json"
    write_chain.main(["--run", "x", "--settings", settings.model_dump_json(), "--chain", str(path)])
    assert Chain.read(path) == chain_of("x", settings)
