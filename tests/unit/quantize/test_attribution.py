from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from workflow_scripts import __version__
from workflow_scripts.quantize import attribution, convert_gguf, llama_cpp_source
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.settings import DatasetSettings, ModelSettings, RunSettings

TRAINED = {"model": "m", "dataset": "d", "packing": "p", "recipe": "r"}


def published(run=TRAINED, source="mistralai/Mistral-7B-v0.3", quantized_by="me"):
    dataset = DatasetSettings(
        sources={
            "a": {"hub": "someone/chats", "revision": "0" * 40},
            "b": {"files": ["/home/me/mine.jsonl"]},
        },
        cleaning={"languages": ["en", "de"]},
    )
    model = ModelSettings(source=source, license="apache-2.0")
    return attribution.published(RunSettings(**run), model, dataset, quantized_by)


def test_the_published_origin_names_the_hub_and_no_folder():
    assert published() == {
        "base_model": "mistralai/Mistral-7B-v0.3",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "datasets": ["someone/chats"],
        "languages": ["en", "de"],
        "quantized_by": "me",
    }
    assert "base_model" not in published(source="./base")
    assert "quantized_by" not in published(quantized_by=None)


def test_a_transplanted_model_names_its_source_and_its_licence():
    run, dataset = RunSettings(**TRAINED), DatasetSettings(generate={})
    model = ModelSettings(transplant={})
    found = attribution.published(run, model, dataset, None)
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found["license"] == "apache-2.0"


def test_a_model_that_was_fine_tuned_elsewhere_is_only_quantized_here():
    given = {"model": "m", "dataset": "d"}
    found = published(given | {"merged": "owner/tuned"})
    assert (found["base_model"], found["base_model_relation"]) == ("owner/tuned", "quantized")
    assert published(given | {"adapter": "owner/lora"}) == published()
    # The name of a folder means nothing to others: the base is named instead.
    assert published(given | {"merged": "/home/me/tuned"}) == published()


def test_the_gguf_has_the_origin_in_llama_cpps_own_keys(chain, tmp_path):
    gguf = tmp_path / "run-F16.gguf"
    convert_gguf.main(
        ["--merged", str(chain.merged), "--facts", str(chain.facts), "--name", "my run"]
        + ["--published", json.dumps(published()), "--gguf", str(gguf)]
    )
    expected = {
        "general.name": "my run",
        "general.description": f"Made with Tramontane {__version__}",
        "general.license": "apache-2.0",
        "general.quantized_by": "me",
        "general.base_model.count": "1",
        "general.base_model.0.name": "Mistral-7B-v0.3",
        "general.base_model.0.organization": "mistralai",
        "general.base_model.0.repo_url": "https://huggingface.co/mistralai/Mistral-7B-v0.3",
        "general.dataset.count": "1",
        "general.dataset.0.name": "chats",
        "general.dataset.0.repo_url": "https://huggingface.co/datasets/someone/chats",
    }
    with LlamaCppModel(gguf, context_tokens=16, n_threads=1) as model:
        assert {key: model.metadata(key) for key in expected} == expected
    languages = llama_cpp_source.gguf_package().GGUFReader(gguf).fields["general.languages"]
    assert languages.contents() == ["en", "de"]


def test_the_version_is_that_of_the_project():
    path = Path(__file__).parents[3] / "pyproject.toml"
    assert tomllib.loads(path.read_text())["project"]["version"] == __version__


def test_importing_it_is_light_enough_for_the_snakefile(run_python):
    done = run_python(
        "import sys, workflow_scripts.quantize.attribution;"
        "assert not {'torch', 'transformers', 'pyarrow'} & sys.modules.keys()"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("key", ["license", "languages", "base_model", "datasets"])
def test_an_unknown_value_is_left_out_of_every_file(key):
    known = published()
    del known[key]
    assert not any(key.rstrip("s") in name for name in attribution.gguf_metadata(known))
