"""The Ollama Modelfile of a release.

Without a template Ollama picks a similar one, for Mistral one with another family's stop words. So
this file states template, stop words, context and sampling. The template renders what
mistral-common does, with system prompt and tools, except for two things that a Go template cannot
do: Ollama writes the JSON of a tool's parameters and of a call's arguments in its own way (no
spaces, its own order of keys), and a tool's result that is JSON stays text. Call ids need an Ollama
whose templates have them (`.ID`, `.ToolCallID`: since November 2025).

Source: https://docs.ollama.com/modelfile, https://docs.ollama.com/template (Go templates).
"""

from __future__ import annotations

from workflow_scripts.log import StageError

# Default context: all 128,000 tokens of a 12B would take 21 GB for keys and values alone.
DEFAULT_CONTEXT_TOKENS = 8192
# Default sampling, stated in full: Ollama and llama-cpp-python default to a repetition penalty of
# 1.1, which the figures on the model card were not measured with.
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "repeat_penalty": 1.0}

# `~` stands for the space that SentencePiece versions put before a text and tekken does not.
# Up to v3 the system prompt precedes the last user message (v1: the first). From v2 on the tools
# precede the last user message; v2 forgets the tool calls of earlier turns. Ollama takes the first
# text under `.ToolCalls` as the text that announces a call, so that text is nothing else.
_TOOLS = (
    "{{ if and (eq $i $last) $.Tools }}[AVAILABLE_TOOLS]~["
    "{{ range $n, $_ := $.Tools }}{{ if $n }}, {{ end }}"
    '{"type": "function", "function": {"name": {{ json .Function.Name }}, '
    '"description": {{ json .Function.Description }}, '
    '"parameters": {{ json .Function.Parameters }}}}'
    "{{ end }}][/AVAILABLE_TOOLS]{{ end }}"
)
_CALLS = (
    '{{ if .ToolCalls }}[TOOL_CALLS]{{ "~[" }}'
    "{{ range $n, $_ := .ToolCalls }}{{ if $n }}, {{ end }}"
    '{"name": {{ json .Function.Name }}, "arguments": {{ json .Function.Arguments }}'
    '{{ if .ID }}, "id": {{ json .ID }}{{ end }}}'
    "{{ end }}]{{ end }}"
)
_LAST_USER = (
    "{{- $last := -1 }}{{- range $i, $_ := .Messages }}"
    '{{- if eq .Role "user" }}{{- $last = $i }}{{- end }}{{- end }}'
    "{{- range $i, $_ := .Messages }}"
)
_USER = (
    '{{- if eq .Role "user" }}' + _TOOLS + "[INST]~"
    "{{ if and (eq $i $last) $.System }}{{ $.System }}\n\n{{ end }}{{ .Content }}[/INST]"
)
_V1 = (
    '{{- range $i, $_ := .Messages }}{{- if eq .Role "user" }} [INST] '
    "{{ if and (le $i 1) $.System }}{{ $.System }}\n\n{{ end }}{{ .Content }} [/INST]"
    '{{- else if eq .Role "assistant" }} {{ .Content }}</s>'
    "{{- end }}{{- end }}"
)
_V2 = (
    _LAST_USER
    + _USER
    + '{{- else if eq .Role "assistant" }}'
    + "{{ if and .ToolCalls (gt $i $last) }}"
    + _CALLS.replace('{{ if .ID }}, "id": {{ json .ID }}{{ end }}', "")
    + "</s>{{ else if .Content }}~{{ .Content }}</s>{{ end }}"
    + '{{- else if and (eq .Role "tool") (gt $i $last) }}[TOOL_RESULTS]~'
    '[{"name": {{ if .ToolName }}{{ json .ToolName }}{{ else }}null{{ end }}, '
    '"content": {{ json .Content }}}][/TOOL_RESULTS]'
    "{{- end }}{{- end }}"
)
_V3 = (
    _LAST_USER
    + _USER
    + '{{- else if eq .Role "assistant" }}'
    + _CALLS
    + "{{ if and .Content (not .ToolCalls) }}~{{ .Content }}{{ end }}</s>"
    '{{- else if eq .Role "tool" }}[TOOL_RESULTS]~'
    '{"content": {{ json .Content }}, "call_id": {{ json .ToolCallID }}}[/TOOL_RESULTS]'
    "{{- end }}{{- end }}"
)
_V7 = (
    _LAST_USER
    + '{{- if eq .Role "system" }}[SYSTEM_PROMPT]~{{ .Content }}[/SYSTEM_PROMPT]'
    + '{{- else if eq .Role "user" }}'
    + _TOOLS
    + "[INST]~{{ .Content }}[/INST]"
    '{{- else if eq .Role "assistant" }}{{ if .Content }}~{{ .Content }}{{ end }}' + _CALLS + "</s>"
    '{{- else if eq .Role "tool" }}[TOOL_RESULTS]~{{ .ToolCallID }}'
    "[TOOL_CONTENT]~{{ .Content }}[/TOOL_RESULTS]"
    "{{- end }}{{- end }}"
)


TEMPLATES = {
    "v1": _V1,
    "v2": _V2.replace("~", " "),
    "v3": _V3.replace("~", " "),
    "v7": _V7.replace("~", " "),
    "tekken": _V3.replace("~", ""),
}


def chat_template(tokenizer_version: str) -> str:
    """Ollama's template for a tokenizer version.

    Raises:
        StageError: there is none for it.
    """
    if tokenizer_version not in TEMPLATES:
        raise StageError(
            "there is no Ollama template for the tokenizer",
            found=tokenizer_version,
            expected=", ".join(TEMPLATES),
        )
    return TEMPLATES[tokenizer_version]


def modelfile(gguf: str, *, tokenizer_version: str, context_tokens: int) -> str:
    """The whole file.

    Args:
        gguf: file name, in the folder of the Modelfile.
        tokenizer_version: from facts.json.
        context_tokens: the longest context that the GGUF supports.
    """
    return (
        f"FROM ./{gguf}\n"
        f'TEMPLATE """{chat_template(tokenizer_version)}"""\n'
        'PARAMETER stop "</s>"\n'
        'PARAMETER stop "[INST]"\n'
        f"PARAMETER num_ctx {min(context_tokens, DEFAULT_CONTEXT_TOKENS)}\n"
        + "".join(f"PARAMETER {name} {value:g}\n" for name, value in SAMPLING.items())
    )
