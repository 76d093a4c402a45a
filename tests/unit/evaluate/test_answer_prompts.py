from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from workflow_scripts import files
from workflow_scripts.evaluate import answer_prompts
from workflow_scripts.evaluate.greedy import by_llama_cpp, by_transformers
from workflow_scripts.evaluate.prompts import before_first_answer
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.tokens.documents import Document, Documents

NO_EOS = -1


def arguments(chain, answers, *model, settings='{"n_prompts": 2, "max_tokens": 6}'):
    return [
        *map(str, model),
        *("--facts", str(chain.facts), "--tokenizer", str(chain.tokenizer)),
        *("--tokens", str(chain.tokens), "--settings", settings, "--threads", "1"),
        *("--answers", str(answers)),
    ]


def test_a_prompt_ends_where_the_first_answer_begins():
    supervised = np.array([0, 0, 0, 1, 1, 0, 0, 1, 1, 1], dtype=bool)
    document = Document("chat/1", np.arange(10, dtype=np.int32), supervised)
    (asked,) = before_first_answer([document], longest=5)
    assert asked.prompt.tolist() == [0, 1, 2] and asked.reference.tolist() == [3, 4]
    assert list(before_first_answer([document], longest=2)) == []
    nothing = Document("chat/2", document.input_ids, np.zeros(10, dtype=bool))
    assert list(before_first_answer([nothing], longest=5)) == []


def test_the_prompts_with_the_lowest_ids_come_first():
    supervised = np.array([0, 1, 1], dtype=bool)
    documents = [Document(name, np.arange(3, dtype=np.int32), supervised) for name in "cab"]
    asked = before_first_answer(documents, longest=5)
    assert [one.conversation for one in asked] == ["a", "b", "c"]


def test_transformers_gives_the_likeliest_tokens_of_its_logits_without_a_cache(checkpoint):
    model = load_model(checkpoint, window=8, precision="float32")
    prompt = np.random.default_rng(0).integers(3, 300, size=20).astype(np.int32)
    tokens = torch.from_numpy(prompt.astype("int64"))[None]
    with torch.no_grad():
        for _ in range(6):
            likeliest = model(tokens, use_cache=False).logits[0, -1].argmax()
            tokens = torch.cat([tokens, likeliest[None, None]], dim=1)
    expected = tokens[0, 20:].tolist()
    greedy = by_transformers(model, NO_EOS)
    assert greedy(prompt, 6) == expected
    # The answer ends with the token that ends it.
    assert by_transformers(model, expected[2])(prompt, 6) == expected[:3]


def test_llama_cpp_gives_the_likeliest_tokens_of_its_logits_without_a_cache(chain):
    # Longer than a batch.
    prompt = np.random.default_rng(0).integers(3, 30_000, size=270).astype(np.int32)
    with LlamaCppModel(chain.gguf, context_tokens=300, n_threads=1) as model:
        expected = prompt.tolist()
        for _ in range(4):
            tokens = np.array(expected, dtype=np.int32)
            (logits,) = model.logit_blocks(tokens, np.array([len(tokens) - 1]))
            expected.append(int(logits[0].argmax()))
        given = by_llama_cpp(model, NO_EOS)(prompt, 4)
        assert given == expected[270:]
        assert by_llama_cpp(model, given[1])(prompt, 4) == given[:2]


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
def test_every_answer_comes_with_its_prompt_and_reference(chain, tmp_path, engine):
    model = {
        "transformers": ("--checkpoint", chain.merged),
        "llama.cpp": ("--gguf", chain.gguf),
    }[engine]
    path = tmp_path / "answers.json"
    answer_prompts.main(arguments(chain, path, *model))
    answers = files.read_json(path)["answers"]
    assert [one["conversation"] for one in answers] == sorted(Documents(chain.tokens).ids)[:2]
    assert "What does len do?" in answers[0]["prompt"]
    assert answers[0]["reference"] == "It counts the items of a container."
    assert answers[1]["reference"] == "28 – mostly."
    assert all(one["n_tokens"] == 6 and not one["is_ended"] for one in answers)


def test_both_engines_give_the_same_answers(chain, tmp_path):
    found = []
    for model in (("--checkpoint", chain.merged), ("--gguf", chain.gguf)):
        path = tmp_path / "answers.json"
        answer_prompts.main(arguments(chain, path, *model))
        found.append([one["answer"] for one in files.read_json(path)["answers"]])
    assert found[0] == found[1]


def test_prompts_without_room_for_an_answer_are_refused(chain, tmp_path, ends_with_message):
    given = arguments(
        chain, tmp_path / "a.json", "--gguf", chain.gguf, settings=json.dumps({"max_tokens": 299})
    )
    message = ends_with_message(answer_prompts.main, given)
    assert "there is no prompt to answer" in message and "evaluation.samples" in message


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.evaluate.answer_prompts")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp"}
