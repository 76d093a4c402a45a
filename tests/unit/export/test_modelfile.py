from __future__ import annotations

import re

import pytest
from jinja2 import Environment

from workflow_scripts.export.modelfile import chat_template, modelfile
from workflow_scripts.log import StageError

VERSIONS = ["v1", "v2", "v3", "v7", "tekken"]
ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)
# Every Go action of our templates as Jinja; another one is a KeyError here.
AS_JINJA = {
    "range .Messages": "{% for message in messages %}",
    "range $i, $_ := .Messages": "{% for message in messages %}",
    "$last := eq (len (slice $.Messages $i)) 1": "",
    'if eq .Role "system"': '{% if message.role == "system" %}',
    'if eq .Role "user"': '{% if message.role == "user" %}',
    'else if eq .Role "user"': '{% elif message.role == "user" %}',
    'else if eq .Role "assistant"': '{% elif message.role == "assistant" %}',
    "if and $last $.System": "{% if loop.last and system %}",
    "if and (le $i 1) $.System": "{% if loop.index0 <= 1 and system %}",
    "$.System": "{{ system }}",
    ".Content": "{{ message.content }}",
}


def rendered(template, messages):
    """What Ollama makes of a Go template (https://pkg.go.dev/text/template: a minus sign in an
    action's delimiter trims all white space beside it), through Jinja."""
    parts, blocks, trims, at = [], [], False, 0
    for action in ACTION.finditer(template):
        text = template[at : action.start()]
        text = text.lstrip() if trims else text
        parts.append(text.rstrip() if action.group(1) else text)
        trims, at = bool(action.group(3)), action.end()
        go = action.group(2)
        if go == "end":
            parts.append(f"{{% end{blocks.pop()} %}}")
            continue
        parts.append(AS_JINJA[go])
        if go.startswith(("range", "if")):
            blocks.append("for" if go.startswith("range") else "if")
    parts.append(template[at:].lstrip() if trims else template[at:])
    assert not blocks
    environment = Environment(keep_trailing_newline=True)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return environment.from_string("".join(parts)).render(messages=messages, system=system)


def by_mistral_common(path, messages):
    """mistral-common's own text of the prompt, BOS left out as the GGUF's tokenizer adds it."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.from_file(str(path))
    request = ChatCompletionRequest.from_openai(messages=messages)
    text = tokenizer.encode_chat_completion(request).text
    return text.removeprefix("<s>").replace("▁", " ").replace("<0x0A>", "\n")


@pytest.fixture(scope="module")
def published(official_tokenizer):
    """The official tokenizer file of a version."""

    def path(version):
        if version == "tekken":
            return official_tokenizer("v3").parent / "tekken_240911.json"
        return official_tokenizer(version)

    return path


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


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("version", VERSIONS)
def test_ollamas_prompt_is_the_one_mistral_common_renders(published, version, chat):
    found = rendered(chat_template(version), chat)
    assert found == by_mistral_common(published(version), chat)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_template_closes_what_it_opens_and_names_no_other_familys_tokens(version):
    template = chat_template(version)
    n_open = len(re.findall(r"\{\{-? (?:range|if) ", template))
    assert template.count("{{- end }}") + template.count("{{ end }}") == n_open
    for control in ("[INST]", "[/INST]", "</s>", ".Content"):
        assert control in template
    assert ("[SYSTEM_PROMPT]" in template) == ("[/SYSTEM_PROMPT]" in template) == (version == "v7")
    assert ("$.System" in template) == (version != "v7")
    for foreign in ("<|im_start|>", "<|im_end|>", "<<SYS>>", "~"):
        assert foreign not in template
    # It stands between three quotes in the Modelfile.
    assert '"""' not in template


def test_v2_and_v3_share_a_template_and_the_others_do_not():
    templates = {version: chat_template(version) for version in VERSIONS}
    assert templates["v2"] == templates["v3"]
    assert len(set(templates.values())) == 4


@pytest.mark.parametrize("version", VERSIONS)
def test_the_modelfile_says_file_template_stops_and_context(version):
    text = modelfile("run-Q4_K_M.gguf", tokenizer_version=version, context_tokens=4096)
    assert text.startswith("FROM ./run-Q4_K_M.gguf\n")
    assert f'TEMPLATE """{chat_template(version)}"""\n' in text
    parameters = re.findall(r"^PARAMETER (\w+) (.*)$", text, re.MULTILINE)
    assert parameters == [("stop", '"</s>"'), ("stop", '"[INST]"'), ("num_ctx", "4096")]


def test_an_unknown_tokenizer_version_is_a_stage_error():
    with pytest.raises(StageError, match="no Ollama template") as caught:
        chat_template("v11")
    assert "v11" in str(caught.value)
