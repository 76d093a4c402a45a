"""The Modelfile, with its template rendered by Go's own engine.

Without Ollama itself this cannot test that `ollama create` accepts the file, how its runner
tokenizes the prompt (it adds BOS and parses control tokens from text, as llama.cpp's own tokenizer
does in the gate check_gguf), and that its parser finds the calls in an answer.
"""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import OFFICIAL_TOKENIZERS
from workflow_scripts.log import StageError
from workflow_scripts.release.modelfile import SAMPLING, chat_template, modelfile

VERSIONS = list(OFFICIAL_TOKENIZERS)
WITH_TOOLS = [version for version in VERSIONS if version != "v1"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city, in °C",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}


def call(name, arguments, call_id):
    spelled = json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": spelled}}


def result(name, content, call_id):
    # Ollama reads `tool_name`, mistral-common `name`.
    named = {"name": name, "tool_name": name}
    return {"role": "tool", "content": content, "tool_call_id": call_id, **named}


@pytest.fixture(scope="session")
def ollama_prompts(tmp_path_factory):
    """`ollama_prompts([(template, messages, tools), …])`: the prompts, by Go's text/template."""
    program = tmp_path_factory.mktemp("go") / "ollama_prompt"
    source = Path(__file__).parent / "ollama_prompt"
    command = ["go", "build", "-o", str(program), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def render(cases):
        keys = ("template", "messages", "tools")
        given = json.dumps([dict(zip(keys, case, strict=True)) for case in cases])
        done = subprocess.run([str(program)], input=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return render


@pytest.fixture(scope="module")
def official(exported_tokenizer):
    """mistral-common's tokenizer of a version, in its mode for prompts."""
    from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer

    return cache(
        lambda version: load_mistral_tokenizer(exported_tokenizer(version), for_training=False)
    )


def encoded(official, messages, tools=None):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    known = [
        {key: value for key, value in message.items() if key != "tool_name"} for message in messages
    ]
    request = ChatCompletionRequest.from_openai(messages=known, tools=tools)
    return official.encode_chat_completion(request).tokens


def with_json_as_values(prompt):
    """A prompt with its JSON in one canonical form: sorted keys."""

    def spelled(match):
        value = json.loads(match.group(2))
        return match.group(1) + json.dumps(value, sort_keys=True) + match.group(3)

    for opens, closes in (
        (r"\[AVAILABLE_TOOLS\]", r"\[/AVAILABLE_TOOLS\]"),
        (r"\[TOOL_CALLS\]", "</s>"),
        (r"\[TOOL_RESULTS\]", r"\[/TOOL_RESULTS\]"),
    ):
        prompt = re.sub(f"({opens} ?)([\\[{{].*?)({closes})", spelled, prompt)
    return prompt


CHATS = {
    "a question": [{"role": "user", "content": "What is a list?"}],
    "turns": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ],
    "a system prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
    ],
    "a system prompt and turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ],
}


TOOL_CHATS = {
    "tools": CHATS["a system prompt and turns"],
    "a call": [
        {"role": "user", "content": "Paris?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call("get_weather", {"city": "Paris", "days": 2}, "abc123XYZ")],
        },
        result("get_weather", 'Sun & "wind"', "abc123XYZ"),
    ],
}
TOOL_CHATS["a call of an earlier turn"] = [
    *TOOL_CHATS["a call"],
    {"role": "assistant", "content": "Windy."},
    {"role": "user", "content": "And now?"},
]
TWO_CALLS = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "Weather and time?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("get_weather", {"city": "Rom"}, "a" * 9), call("clock", {}, "b" * 9)],
    },
    result("get_weather", "Rain", "a" * 9),
    result("clock", "noon", "b" * 9),
]


@pytest.mark.parametrize("version", VERSIONS)
def test_ollamas_prompt_has_the_tokens_that_mistral_common_renders(
    ollama_prompts, official, exported_tokenizer, version
):
    from tokenizers import Tokenizer

    # It parses control tokens from text and adds BOS, as llama.cpp does for Ollama.
    tokenizer = Tokenizer.from_file(str(exported_tokenizer(version) / "tokenizer.json"))
    prompts = ollama_prompts([(chat_template(version), chat, None) for chat in CHATS.values()])
    for chat, prompt in zip(CHATS.values(), prompts, strict=True):
        assert tokenizer.encode(prompt).ids == encoded(official(version), chat)


@pytest.mark.parametrize("version", WITH_TOOLS)
def test_tools_calls_and_results_are_where_mistral_common_puts_them(
    ollama_prompts, official, version
):
    """JSON, which Go writes in its own way, is compared as values; all other text exactly."""
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

    chats = list(TOOL_CHATS.values()) + ([TWO_CALLS] if version != "v2" else [])
    tools = [WEATHER, CLOCK]
    prompts = ollama_prompts([(chat_template(version), chat, tools) for chat in chats])
    for chat, prompt in zip(chats, prompts, strict=True):
        tokens = encoded(official(version), chat, tools)
        expected = official(version).decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)
        # SentencePiece shows its raw pieces.
        expected = expected.replace("▁", " ").replace("<0x0A>", "\n")
        assert with_json_as_values("<s>" + prompt) == with_json_as_values(expected)


@pytest.mark.parametrize("version", WITH_TOOLS)
def test_ollama_finds_the_text_that_announces_a_call(version):
    """It takes the first text under the first `if` on .ToolCalls, up to the first action."""
    under = re.search(r"\{\{ if \.ToolCalls \}\}(.*?)\{\{", chat_template(version))
    assert under.group(1) == "[TOOL_CALLS]"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_template_is_balanced_and_has_no_tokens_of_other_families(version):
    template = chat_template(version)
    n_open = len(re.findall(r"\{\{-? (?:range|if) ", template))
    assert template.count("{{- end }}") + template.count("{{ end }}") == n_open
    for control in ("[INST]", "[/INST]", "</s>", ".Content"):
        assert control in template
    assert ("[SYSTEM_PROMPT]" in template) == ("[/SYSTEM_PROMPT]" in template) == (version == "v7")
    assert ("$.System" in template) == (version != "v7")
    for foreign in ("<|im_start|>", "<|im_end|>", "<<SYS>>", "~"):
        assert foreign not in template
    # The Modelfile puts it between triple quotes.
    assert '"""' not in template


@pytest.mark.parametrize("version", VERSIONS)
def test_the_modelfile_has_file_template_stop_words_and_context(version):
    text = modelfile("run-Q4_K_M.gguf", tokenizer_version=version, context_tokens=4096)
    assert text.startswith("FROM ./run-Q4_K_M.gguf\n")
    assert f'TEMPLATE """{chat_template(version)}"""\n' in text
    parameters = re.findall(r"^PARAMETER (\w+) (.*)$", text, re.MULTILINE)
    assert parameters[:3] == [("stop", '"</s>"'), ("stop", '"[INST]"'), ("num_ctx", "4096")]
    assert {name: float(value) for name, value in parameters[3:]} == SAMPLING
    roomy = modelfile("run-Q4_K_M.gguf", tokenizer_version=version, context_tokens=128_000)
    assert "PARAMETER num_ctx 8192\n" in roomy


def test_an_unknown_tokenizer_version_is_a_stage_error():
    with pytest.raises(StageError, match="no Ollama template for the tokenizer") as caught:
        chat_template("v11")
    assert "v11" in str(caught.value)
