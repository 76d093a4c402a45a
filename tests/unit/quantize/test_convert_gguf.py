from __future__ import annotations

import shutil

import pytest

from tests.facts import MISTRAL_7B
from workflow_scripts import files
from workflow_scripts.handover.facts import Facts
from workflow_scripts.quantize import convert_gguf
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel


def arguments(merged, facts, gguf):
    return ["--merged", merged, "--facts", facts, "--name", "my run", "--gguf", gguf]


@pytest.fixture
def other_facts(chain, tmp_path):
    """`other_facts(**changes)`: the facts with these changes."""

    def write(**changes):
        path = tmp_path / "facts.json"
        Facts.read(chain.facts).changed(**changes).write(path)
        return path

    return write


@pytest.mark.parametrize(
    ("window", "context", "expected"),
    [(4096, 32768, 4096), (None, 32768, 32768), (4096, 1024, 1024), (512, 512, 512)],
)
def test_the_served_context_ends_at_the_window(window, context, expected):
    facts = MISTRAL_7B.changed(sliding_window=window, context_tokens=context)
    assert facts.served_context_tokens == expected


def test_the_file_advertises_the_window_as_its_context(chain):
    config = files.read_json(chain.merged / "config.json")
    assert (config["max_position_embeddings"], config["sliding_window"]) == (512, 300)
    with LlamaCppModel(chain.gguf, context_tokens=16, n_threads=1) as model:
        assert model.metadata("llama.context_length") == "300"
        assert model.metadata("general.file_type") == "1"  # mostly F16
        assert model.metadata("tokenizer.ggml.add_space_prefix") == "false"
        template = model.metadata("tokenizer.chat_template")
    assert template == (chain.merged / "chat_template.jinja").read_text()


def test_without_a_window_it_advertises_the_whole_context(chain, other_facts, tmp_path):
    gguf = tmp_path / "full.gguf"
    facts = other_facts(sliding_window=None)
    convert_gguf.main([str(a) for a in arguments(chain.merged, facts, gguf)])
    with LlamaCppModel(gguf, context_tokens=16, n_threads=1) as model:
        assert model.metadata("llama.context_length") == "512"
        assert model.metadata("general.name") == "my run"
    # The merged model itself is unchanged.
    assert files.read_json(chain.merged / "config.json")["max_position_embeddings"] == 512
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.json", "full.gguf"]


@pytest.mark.parametrize("rows", [32_000, 32_832], ids=["fewer rows", "more rows"])
def test_a_vocabulary_that_does_not_fit_the_embeddings_is_refused(
    chain, other_facts, tmp_path, ends_with_message, rows
):
    gguf = tmp_path / "m.gguf"
    message = ends_with_message(
        convert_gguf.main, arguments(chain.merged, other_facts(vocabulary_size=rows), gguf)
    )
    for part in (
        "the tokenizer does not fit the model",
        f"where:    {chain.merged}",
        "found:    32768 tokens",
        f"expected: {rows} rows of embeddings",
    ):
        assert part in message
    assert not gguf.exists()


def test_a_model_the_converter_cannot_read_leaves_no_file(chain, tmp_path, ends_with_message):
    broken = tmp_path / "broken"
    shutil.copytree(chain.merged, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    gguf = tmp_path / "out" / "m.gguf"
    message = ends_with_message(convert_gguf.main, arguments(broken, chain.facts, gguf))
    assert "llama.cpp's converter failed" in message and str(broken) in message
    assert list((tmp_path / "out").iterdir()) == []


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.quantize.convert_gguf")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers"}
