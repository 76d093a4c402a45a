from __future__ import annotations

import json
import shutil
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest

from tests.unit.chats.generated_chats import ChatGenerator
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.quantize import check_gguf, convert_gguf, gguf_tokens, llama_cpp_source
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.tokens import token_parity
from workflow_scripts.tokens.documents import Document, Documents
from workflow_scripts.tokens.token_parity import Chat


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


def test_the_file_of_another_model_stops_the_chain(chain, tmp_path, ends_with_message):
    unmerged = tmp_path / "unmerged"
    shutil.copytree(chain.merged, unmerged)
    shutil.copyfile(chain.checkpoint / "model.safetensors", unmerged / "model.safetensors")
    gguf = convert(unmerged, chain.facts, tmp_path / "unmerged.gguf")
    check = tmp_path / "gguf_check.json"
    message = ends_with_message(check_gguf.main, arguments(chain, gguf, check))
    for part in (
        "a tensor of the GGUF differs from the merged model's",
        f"where:    {gguf}, blk.0.",
        "elements differ",
        "to fix:   ",
    ):
        assert part in message
    assert not check.exists()


def test_logits_further_apart_than_the_limit_stop_the_chain(chain, tmp_path, ends_with_message):
    check = tmp_path / "gguf_check.json"
    settings = '{"kl_divergence_nats": 1e-30}'
    given = arguments(chain, chain.gguf, check, settings=settings)
    message = ends_with_message(check_gguf.main, given)
    for part in (
        "the GGUF computes something else than the merged model",
        f"where:    {chain.gguf}",
        "found:    KL divergence",
        "expected: at most 1e-30 (evaluation.gates.gguf.kl_divergence_nats)",
        "to fix:   ",
    ):
        assert part in message
    assert not check.exists()


def test_a_file_that_puts_no_bos_in_front_stops_the_chain(chain, tmp_path, official):
    gguf = shutil.copyfile(chain.gguf, tmp_path / "bare.gguf")
    reader = llama_cpp_source.gguf_package().GGUFReader(gguf, "r+")
    field = reader.fields["tokenizer.ggml.add_bos_token"]
    field.parts[field.data[0]][0] = False
    reader.data.flush()
    with LlamaCppModel(gguf, context_tokens=64, n_threads=1) as model:
        with pytest.raises(StageError, match="reads plain text with other control tokens") as error:
            gguf_tokens.check_ends(model, gguf, official)
    assert "tokenizer.ggml.add_bos_token" in str(error.value)


def test_a_file_made_without_the_original_tokenizer_stops_the_chain(
    chain, tmp_path, ends_with_message, official, chats
):
    """llama.cpp's converter then invents scores, and text gets other tokens."""
    bare = tmp_path / "bare"
    shutil.copytree(chain.merged, bare)
    for path in bare.glob("tokenizer.model*"):
        path.unlink()
    gguf = convert(bare, chain.facts, tmp_path / "bare.gguf")
    check = tmp_path / "gguf_check.json"
    message = ends_with_message(check_gguf.main, arguments(chain, gguf, check))
    for part in (
        "the GGUF's tokenizer differs from the merged model's",
        f"where:    {gguf}, token ",
        "-1000.0",
        "keep the base's tokenizer.model in the merged folder",
    ):
        assert part in message
    assert not check.exists()

    # The sample of conversations shows the fault as well.
    with LlamaCppModel(gguf, context_tokens=64, n_threads=1) as model:
        with pytest.raises(StageError, match="reads a conversation as other tokens") as error:
            gguf_tokens.check_tokens(model, gguf, chats, official)
    for part in (
        f"where:    {gguf}, conversation chat/",
        "token 1, after '<s>'",
        "expected: 3='[INST]'",
        "the base's tokenizer files and chat template",
    ):
        assert part in str(error.value)


@pytest.fixture(scope="module")
def model(chain):
    with LlamaCppModel(chain.gguf, context_tokens=64, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def official(chain):
    return load_mistral_tokenizer(chain.tokenizer, for_training=True)


@pytest.fixture(scope="module")
def chats(chain):
    return list(token_parity.sample(chain.clean, Documents(chain.tokens), None))


@pytest.fixture
def check(model, chain, official):
    return lambda chats: gguf_tokens.check_tokens(model, chain.gguf, chats, official)


def test_every_conversation_gets_the_tokens_of_training(check, chats, chain):
    assert len(chats) == len(Documents(chain.tokens))
    assert check(chats) == (len(chats), 0, 0)


def test_no_more_conversations_are_compared_than_the_config_says(chain, tmp_path):
    check = tmp_path / "gguf_check.json"
    settings = '{"parity_conversations": 2}'
    check_gguf.main([str(part) for part in arguments(chain, chain.gguf, check, settings=settings)])
    assert files.read_json(check)["n_conversations_token_parity"] == 2


def changed(chat, input_ids):
    return chat._replace(document=Document(chat.document.id, input_ids, None))


@pytest.mark.parametrize("at", [0, 4, -1])
def test_a_token_that_differs_is_named_by_its_place_and_text(check, chats, official, at):
    ids = chats[0].document.input_ids.copy()
    right = ids[at]
    ids[at] = 17
    with pytest.raises(StageError) as caught:
        check([changed(chats[0], ids)])
    position = at % len(ids)
    text = official.decode([int(right)], special_token_policy="keep")
    assert f"conversation chat/0, token {position}, after " in str(caught.value)
    assert f"found:    {right}={text!r}" in str(caught.value)
    assert "expected: 17=" in str(caught.value)


@pytest.mark.parametrize("change", [-1, 1], ids=["shorter", "longer"])
def test_a_document_that_differs_only_in_length_is_found(check, chats, change):
    original = chats[0].document.input_ids
    ids = np.append(original, 17)[: len(original) + change]
    with pytest.raises(StageError, match=f"token {min(len(ids), len(original))},.*"):
        check([changed(chats[0], ids)])


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "[INST] what?"}, {"role": "assistant", "content": "!"}],
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That. "}],
    ],
    ids=["control token", "space at the end"],
)
def test_chats_that_no_template_can_render_are_left_out_and_counted(check, chats, messages):
    assert check([Chat(messages, None, chats[0].document)]) == (0, 1, 0)


def test_tools_and_plain_texts_are_compared_too(check, official):
    call = {"name": "look", "arguments": '{"b":1,"a":["<é>"]}'}
    parameters = {"type": "object", "properties": {"b": {}, "a": {}}}
    with_tools = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": call}]},
        {"role": "tool", "content": "It's <7> & more.", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "That."},
    ]
    tools = json.dumps(
        [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    )
    conversations = [(with_tools, tools), ([{"role": "text", "content": "Once  upon.\n"}], None)]
    chats = []
    for messages, offered in conversations:
        ids = np.array(token_parity.official_tokens(official, messages, offered))
        chats.append(Chat(messages, offered, Document("chat/x", ids, None)))
    assert check(chats) == (2, 0, 0)


def test_a_template_that_refuses_is_a_stage_error():
    template = "{{ raise_exception('odd roles') }}"
    with pytest.raises(StageError, match="the chat template refuses") as caught:
        gguf_tokens.render_template(template, [], None, bos="<s>", eos="</s>")
    assert "odd roles" in str(caught.value)


@pytest.fixture(scope="module")
def tekken_model(exported_tokenizer, make_checkpoint, tmp_path_factory):
    """A GGUF with only the vocabulary of a tekken model, by llama.cpp's converter."""
    staged = make_checkpoint(tmp_path_factory.mktemp("tekken") / "model", vocab_size=131_072)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(exported_tokenizer("tekken") / name, staged / name)
    gguf = staged.parent / "vocabulary.gguf"
    converter = [sys.executable, str(llama_cpp_source.converter()), str(staged), "--vocab-only"]
    done = subprocess.run([*converter, "--outfile", str(gguf)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    yield model
    model.close()


def test_llama_cpp_tokenizes_texts_with_tekken_as_mistral_does(tekken_model, exported_tokenizer):
    folder = exported_tokenizer("tekken")
    official = load_mistral_tokenizer(folder, for_training=True).instruct_tokenizer.tokenizer
    assert tekken_model.metadata["tokenizer.ggml.pre"] == "tekken"
    generator = ChatGenerator(seed=2)
    n_misread = 0
    for _ in range(2000):
        text = generator.text()
        expected = official.encode(text, bos=False, eos=False)
        found = tekken_model.tokenize(text.encode(), add_bos=False, special=False)
        # llama.cpp splits at combining marks, as if they were punctuation: the only known
        # difference.
        assert found == expected or gguf_tokens.has_mark(text), text
        n_misread += found != expected
    assert 0 < n_misread < 20


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.quantize.check_gguf")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp"}
