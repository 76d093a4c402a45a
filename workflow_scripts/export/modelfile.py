"""The Ollama Modelfile of a release.

Left to itself Ollama picks a template by likeness, and for Mistral one whose stop words are another
family's; so template, stop words and context are written out. The template is what mistral-common
renders for chats with an optional system prompt; tools are not in it.

Source: https://docs.ollama.com/modelfile, https://docs.ollama.com/template (Go templates).
"""

from __future__ import annotations

from workflow_scripts.log import StageError

# `~` stands for the space that SentencePiece versions put before a text and tekken does not.
# Up to v3 the system prompt goes in front of the last user message (v1: the first).
_LAST_USER = (
    "{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{- if eq .Role "user" }}[INST]~{{ if and $last $.System }}{{ $.System }}\n\n{{ end }}'
    '{{ .Content }}[/INST]{{- else if eq .Role "assistant" }}~{{ .Content }}</s>'
    "{{- end }}{{- end }}"
)
_V1 = (
    '{{- range $i, $_ := .Messages }}{{- if eq .Role "user" }} [INST] '
    "{{ if and (le $i 1) $.System }}{{ $.System }}\n\n{{ end }}{{ .Content }} [/INST]"
    '{{- else if eq .Role "assistant" }} {{ .Content }}</s>'
    "{{- end }}{{- end }}"
)
_V7 = (
    '{{- range .Messages }}{{- if eq .Role "system" }}[SYSTEM_PROMPT]~{{ .Content }}'
    '[/SYSTEM_PROMPT]{{- else if eq .Role "user" }}[INST]~{{ .Content }}[/INST]'
    '{{- else if eq .Role "assistant" }}~{{ .Content }}</s>'
    "{{- end }}{{- end }}"
)


def chat_template(tokenizer_version: str) -> str:
    """Ollama's template for a tokenizer version.

    Raises:
        StageError: none is known for it.
    """
    match tokenizer_version:
        case "v1":
            return _V1
        case "v2" | "v3":
            return _LAST_USER.replace("~", " ")
        case "v7":
            return _V7.replace("~", " ")
        case "tekken":
            return _LAST_USER.replace("~", "")
    raise StageError("no Ollama template is known for the tokenizer", found=tokenizer_version)


def modelfile(gguf: str, *, tokenizer_version: str, context_tokens: int) -> str:
    """The whole file.

    Args:
        gguf: file name, beside the Modelfile.
        tokenizer_version: of facts.json.
        context_tokens: what the GGUF may be run with.
    """
    return (
        f"FROM ./{gguf}\n"
        f'TEMPLATE """{chat_template(tokenizer_version)}"""\n'
        'PARAMETER stop "</s>"\n'
        'PARAMETER stop "[INST]"\n'
        f"PARAMETER num_ctx {context_tokens}\n"
    )
