from __future__ import annotations

import shutil

import pytest

from workflow_scripts import files
from workflow_scripts.data.documents import Document, Documents
from workflow_scripts.export import check_gguf, convert_gguf
from workflow_scripts.log import StageError
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel


def arguments(chain, gguf, check, *, settings="{}"):
    return (
        ["--gguf", gguf, "--merged", chain.merged, "--facts", chain.facts, "--threads", 1]
        + ["--clean", chain.clean, "--tokens", chain.tokens, "--settings", settings]
        + ["--check", check]
    )


def convert(merged, facts, gguf):
    convert_gguf.main(
        ["--merged", str(merged), "--facts", str(facts), "--name", "t", "--gguf", str(gguf)]
    )
    return gguf


def test_the_file_converted_from_the_merged_model_passes(chain, tmp_path):
    check = tmp_path / "gguf_check.json"
    check_gguf.main([str(argument) for argument in arguments(chain, chain.gguf, check)])
    report = files.read_json(check)
    assert report["n_conversations_token_parity"] == 3
    assert 0 <= report["kl_divergence_nats"] <= report["max_kl_divergence_nats"] < 1e-5
    assert report["top1_agreement_fraction"] > 0.95
    documents = Documents(chain.tokens)
    assert report["n_scored_tokens"] == sum(documents[at].is_supervised.sum() for at in range(3))


def test_a_file_of_another_model_stops_the_chain(chain, tmp_path, ends_with_message):
    unmerged = tmp_path / "unmerged"
    shutil.copytree(chain.merged, unmerged)
    shutil.copyfile(chain.checkpoint / "model.safetensors", unmerged / "model.safetensors")
    gguf = convert(unmerged, chain.facts, tmp_path / "unmerged.gguf")
    check = tmp_path / "gguf_check.json"
    message = ends_with_message(check_gguf.main, arguments(chain, gguf, check))
    for part in (
        "the GGUF computes something else than the merged model",
        f"where:    {gguf}",
        "found:    KL divergence",
        "expected: at most 1e-05 (evaluation.gates.gguf_kl_divergence_nats)",
        "to fix:   ",
    ):
        assert part in message
    assert not check.exists()


def test_a_file_made_without_the_original_tokenizer_stops_the_chain(
    chain, tmp_path, ends_with_message
):
    """llama.cpp's converter then makes scores up, and text is read as other tokens."""
    bare = tmp_path / "bare"
    shutil.copytree(chain.merged, bare)
    for path in bare.glob("tokenizer.model*"):
        path.unlink()
    gguf = convert(bare, chain.facts, tmp_path / "bare.gguf")
    check = tmp_path / "gguf_check.json"
    message = ends_with_message(check_gguf.main, arguments(chain, gguf, check))
    for part in (
        "the GGUF reads a conversation as other tokens than training did",
        f"where:    {gguf}, conversation chat/",
        "found:    [",
        "expected: [",
        "the base's tokenizer.model and chat template",
    ):
        assert part in message
    assert not check.exists()


@pytest.fixture(scope="module")
def model(chain):
    with LlamaCppModel(chain.gguf, context_tokens=64, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def messages(chain):
    chats = files.read_parquet(chain.clean).to_pylist()
    return {chat["id"]: chat["messages"] for chat in chats}


def test_every_conversation_is_read_as_in_training(model, chain, messages):
    documents = Documents(chain.tokens)
    assert check_gguf.check_tokens(model, chain.gguf, documents, messages) == len(documents)


@pytest.mark.parametrize("at", [0, 4, -1])
def test_a_token_that_differs_is_named_by_its_place(model, chain, messages, at):
    document = Documents(chain.tokens)[0]
    ids = document.input_ids.copy()
    ids[at] = 17
    changed = Document(document.id, ids, document.is_supervised)
    with pytest.raises(StageError) as caught:
        check_gguf.check_tokens(model, chain.gguf, [changed], messages)
    position = at % len(ids)
    assert f"conversation chat/0, token {position}" in str(caught.value)
    assert str(ids[position : position + 8].tolist()) in str(caught.value)


@pytest.mark.parametrize("change", [-1, 1], ids=["shorter", "longer"])
def test_a_document_that_only_ends_elsewhere_is_found(model, chain, messages, change):
    document = Documents(chain.tokens)[0]
    ids = [*document.input_ids.tolist(), 17][: len(document.input_ids) + change]
    changed = Document(document.id, document.input_ids.__class__((len(ids),), "int32"), None)
    changed.input_ids[:] = ids
    with pytest.raises(StageError, match=f"token {min(len(ids), len(ids) - change)}"):
        check_gguf.check_tokens(model, chain.gguf, [changed], messages)


def test_a_conversation_that_spells_a_control_token_is_left_out(model, chain):
    spelled = [{"role": "user", "content": "[INST] what?"}, {"role": "assistant", "content": "!"}]
    document = Documents(chain.tokens)[0]
    found = check_gguf.check_tokens(model, chain.gguf, [document], {"chat/0": spelled})
    assert found == 0


def test_a_template_that_refuses_is_a_stage_error():
    with pytest.raises(StageError, match="the chat template refuses") as caught:
        check_gguf.render_template("{{ raise_exception('odd roles') }}", [], bos="<s>", eos="</s>")
    assert "odd roles" in str(caught.value)


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.export.check_gguf")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp"}
