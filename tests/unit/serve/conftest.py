"""A release of a tiny model that has memorized a few chats: its answer shows which prompt it got.

Greedy decoding gives the memorized answer only for the prompt of training.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import release_server
from workflow_scripts import files

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "abc123XYZ",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}
LEN = "What does len do?"
DOCUMENTS = {
    "sort": "The method sort orders a list in place.",
    "open": "The function open opens a file.",
}
RAG_SYSTEM = "Answer from this text: "


def said(*turns: str, system: str | None = None) -> list[dict]:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


QUESTION = said("How is the weather in Paris?")
CALLED = [*QUESTION, {"role": "assistant", "tool_calls": [CALL]}]
ANSWERED = [*CALLED, {"role": "tool", "tool_call_id": CALL["id"], "content": "21 degrees"}]
CHATS: dict[str, tuple[list[dict], list[dict] | None]] = {
    "question": (said(LEN, "It counts the items of a container."), None),
    "system": (said("Size of int?", "28 – mostly.", system="Answer in one word."), None),
    "history": (said(LEN, "It counts the items of a container.", "And of «str»?", "Größe."), None),
    "spelled": (said("What are [INST] and </s>?", "Texts like any other."), None),
    "call": (CALLED, [WEATHER]),
    "result": ([*ANSWERED, {"role": "assistant", "content": "It is 21 degrees."}], [WEATHER]),
    "rag": (said("How do I sort?", "With sort.", system=RAG_SYSTEM + DOCUMENTS["sort"]), None),
}
# Only words that the output layer has learned: an adapter does not change that layer.
FORMAL = {"question": (said(LEN, "Texts like any other."), None)}
CONTEXT_TOKENS = 256


@pytest.fixture(scope="session")
def learned(make_checkpoint, tokenizer_v3, tmp_path_factory) -> Path:
    """A checkpoint that has memorized the chats, with the v3 tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("learned")
    shape = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 32_768}
    shape |= {"max_position_embeddings": CONTEXT_TOKENS, "sliding_window": None}
    make_checkpoint(folder, dtype="float32", **shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    learn(model, CHATS, tokenizer_v3, learning_rate=1e-2)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer.model.v3", "tokenizer.json"):
        shutil.copyfile(tokenizer_v3 / name, folder / name)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer_v3 / name, folder / name)
    return folder


def learn(model, chats, tokenizer: Path, *, learning_rate: float) -> None:
    """Train until every answer is by far the most likely one."""
    import torch

    from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
    from workflow_scripts.tokens.rendering import Renderer

    renderer = Renderer(load_mistral_tokenizer(tokenizer, for_training=True))
    renderings = [
        # Tools as clean_dataset writes them.
        renderer.render(messages, json.dumps(tools) if tools else None)
        for messages, tools in chats.values()
    ]
    n_tokens = max(len(rendering.input_ids) for rendering in renderings)
    # Padded on the right, which a causal model ignores.
    input_ids = torch.zeros(len(renderings), n_tokens, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    for row, rendering in enumerate(renderings):
        input_ids[row, : len(rendering.input_ids)] = torch.tensor(rendering.input_ids)
        begin, end = rendering.supervised_spans[-1]
        labels[row, begin:end] = input_ids[row, begin:end]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], learning_rate)
    model.train()
    decoder = model.get_decoder()
    is_learned = labels[:, 1:] >= 0
    loss = float("inf")
    for _ in range(200):
        optimizer.zero_grad()
        # The output layer takes nearly all of the time: only for answers.
        states = decoder(input_ids=input_ids).last_hidden_state[:, :-1]
        logits = model.get_output_embeddings()(states[is_learned])
        mean = torch.nn.functional.cross_entropy(logits, labels[:, 1:][is_learned])
        mean.backward()
        optimizer.step()
        loss = mean.item()
        if loss < 0.01:
            break
    assert loss < 0.01, loss
    model.eval()


@pytest.fixture(scope="session")
def released(learned, tokenizer_v3, tmp_path_factory) -> Path:
    """The files of package_release that serving reads."""
    from workflow_scripts.models import read_model_facts
    from workflow_scripts.quantize import convert_gguf

    folder = tmp_path_factory.mktemp("released") / "release"
    folder.mkdir()
    facts = folder.parent / "facts.json"
    read_model_facts.main(["--checkpoint", str(learned), "--facts", str(facts)])
    gguf = folder / "parrot-F16.gguf"
    convert_gguf.main(
        ["--merged", str(learned), "--facts", str(facts), "--name", "parrot", "--gguf", str(gguf)]
    )
    shutil.copyfile(tokenizer_v3 / "tokenizer.model.v3", folder / "tokenizer.model.v3")
    files.write_json(folder / "provenance.json", {"run": "parrot"})
    files.write_text(folder / "Modelfile", f"FROM ./{gguf.name}\n")
    return folder


@pytest.fixture(scope="session")
def formal_adapter(learned, tokenizer_v3, tmp_path_factory) -> Path:
    """A GGUF LoRA that answers one of the chats differently, made by llama.cpp's own converter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from workflow_scripts.quantize import llama_cpp_source

    folder = tmp_path_factory.mktemp("formal")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(learned, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base, config)
    learn(model, FORMAL, tokenizer_v3, learning_rate=5e-3)
    model.save_pretrained(folder / "adapter")
    converter = llama_cpp_source.converter().with_name("convert_lora_to_gguf.py")
    path = folder / "formal.gguf"
    command = [sys.executable, str(converter), str(folder / "adapter"), "--base", str(learned)]
    command += ["--outtype", "f16", "--outfile", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert path.is_file(), done.stderr
    return path


@pytest.fixture(scope="session")
def serving(tmp_path_factory) -> Callable[..., object]:
    """`with serving(release, "--port", …) as served`: the server, in a separate process."""
    return lambda *arguments, **environment: release_server.serving(
        tmp_path_factory.mktemp("server") / "log", *arguments, **environment
    )


def answer_of(chats: Sequence[dict]) -> str:
    return chats[-1]["content"]
