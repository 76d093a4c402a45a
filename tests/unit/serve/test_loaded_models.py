from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.unit.serve.conftest import CHATS
from workflow_scripts.log import StageError
from workflow_scripts.serve import loaded_models, release
from workflow_scripts.serve.devices import Device
from workflow_scripts.serve.prompts import Prompts


@pytest.fixture(scope="module")
def parrot(released):
    return release.read(released)


@pytest.mark.parametrize("n_ahead", [1, 5])
def test_a_draft_guesses_the_model_s_tokens_and_saves_it_steps(parrot, n_ahead):
    """A draft that is the model itself always guesses right."""
    prompts = Prompts(parrot.tokenizer)
    device = Device(n_threads=1)
    small = loaded_models.load(parrot, prompts, device)
    draft = loaded_models.DraftModel(small, n_ahead=n_ahead)
    steps = {}
    for name, runs_ahead in (("alone", None), ("drafted", draft)):
        llama = loaded_models.load(parrot, prompts, device, draft=runs_ahead)
        prompt = prompts.render(CHATS["question"][0][:-1])
        n_evaluated = []
        evaluate = llama.eval
        llama.eval = lambda tokens, e=evaluate, n=n_evaluated: (n.append(len(tokens)), e(tokens))
        text = llama.create_completion(prompt, temperature=0.0, max_tokens=30)["choices"][0]["text"]
        steps[name] = (text, len(n_evaluated))
        llama.close()
    small.close()
    assert steps["drafted"][0] == steps["alone"][0] == " " + CHATS["question"][0][-1]["content"]
    assert steps["drafted"][1] <= -(-steps["alone"][1] // (n_ahead + 1)) + 1


def test_a_draft_guesses_nothing_beyond_its_context(parrot):
    llama = loaded_models.load(parrot, Prompts(parrot.tokenizer), Device(n_ctx=32, n_threads=1))
    draft = loaded_models.DraftModel(llama, n_ahead=4)
    tokens = np.ones(40, dtype=np.intc)
    assert [len(draft(tokens[:n])) for n in (10, 30, 31, 32, 40)] == [4, 2, 1, 0, 0]
    llama.close()


def test_an_answer_ends_with_the_context_although_llama_cpp_has_more(parrot):
    """llama.cpp rounds up to a multiple of 256."""
    prompts = Prompts(parrot.tokenizer)
    messages = CHATS["question"][0][:-1]
    n_ctx = len(prompts.render(messages)) + 5
    llama = loaded_models.load(parrot, prompts, Device(n_ctx=n_ctx, n_threads=1))
    assert llama.n_ctx() > loaded_models.context_of(llama) == n_ctx
    answer = llama.create_chat_completion(messages, temperature=0.0)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == n_ctx
    llama.close()


def test_values_computed_with_one_adapter_are_not_used_with_another(parrot, formal_adapter):
    """Greedy answers hide this: the last token alone can distinguish the models."""
    prompt = Prompts(parrot.tokenizer).render(CHATS["question"][0][:-1])
    served = loaded_models.Models(
        [parrot], Device(n_threads=1), adapters={"formal": formal_adapter}
    )

    def logits(name):
        llama = served(name)
        llama.create_completion(prompt, max_tokens=1, temperature=0.0)
        read = llama._ctx.get_logits_ith(-1)
        return np.ctypeslib.as_array(read, shape=(llama.n_vocab(),)).copy()

    plain, formal, again = logits("parrot"), logits("formal"), logits("parrot")
    assert np.abs(plain - formal).max() > 0.1
    np.testing.assert_array_equal(again, plain)
    np.testing.assert_array_equal(logits("formal"), formal)
    served.close()


def test_a_draft_with_another_tokenizer_is_refused(parrot, released, official_tokenizer, tmp_path):
    for path in released.glob("*.gguf"):
        shutil.copyfile(path, tmp_path / path.name)
    shutil.copyfile(official_tokenizer("v2"), tmp_path / "tokenizer.model.v2")
    with pytest.raises(StageError, match="another tokenizer"):
        loaded_models.check_draft(parrot, release.read(tmp_path))


def test_a_release_has_the_name_of_its_run_or_of_the_named_file(released, tmp_path):
    found = release.read(released)
    assert (found.name, found.gguf.name) == ("parrot", "parrot-F16.gguf")
    assert found.context_tokens == 256
    assert release.read(found.gguf).name == "parrot-F16"
    # Without a Modelfile there must be one file, or it must be named.
    for name in ("a.gguf", "b.gguf"):
        shutil.copyfile(found.gguf, tmp_path / name)
    shutil.copyfile(released / "tokenizer.model.v3", tmp_path / "tokenizer.model.v3")
    with pytest.raises(StageError, match="a.gguf, b.gguf"):
        release.read(tmp_path)
    assert release.read(tmp_path / "b.gguf").name == "b"


def test_a_file_that_is_not_a_gguf_is_refused(released, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not one")
    shutil.copyfile(released / "tokenizer.model.v3", tmp_path / "tokenizer.model.v3")
    with pytest.raises(StageError, match="cannot read the GGUF"):
        release.read(tmp_path / "x.gguf")
