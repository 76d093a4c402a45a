"""Tokens of a GGUF, by its chat template and by llama.cpp, compared with those of training."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.sandbox import ImmutableSandboxedEnvironment
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from workflow_scripts.log import StageError
from workflow_scripts.quantize import gguf_contents
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.tokens import token_parity
from workflow_scripts.tokens.token_parity import Chat


def check_ends(model: LlamaCppModel, gguf: Path, official: MistralTokenizer) -> None:
    """Check that plain text gets BOS in front and no EOS at the end when a program requests both.

    Raises:
        StageError: it does not.
    """
    tokenizer = official.instruct_tokenizer.tokenizer
    tokens = model.tokenize("text", adds_bos=True, parses_control=False)
    if tokens[0] != tokenizer.bos_id or tokens[1] == tokenizer.bos_id:
        problem = "BOS once, in front"
    elif tokens[-1] == tokenizer.eos_id:
        problem = "no EOS at the end"
    else:
        return
    raise StageError(
        "the GGUF reads plain text with other control tokens than Mistral's tokenizer",
        where=f"{gguf}, tokenizer.ggml.add_bos_token, .add_eos_token",
        found=tokens,
        expected=problem,
        to_fix=gguf_contents.TO_FIX,
    )


class Parity(NamedTuple):
    """Numbers of conversations that were compared, and that could not be."""

    n_compared: int
    n_left_out: int
    """The template renders them differently, or their text spells a control token."""
    n_misread: int
    """They have combining marks, which llama.cpp is known to split differently for tekken."""


def check_tokens(
    model: LlamaCppModel, gguf: Path, chats: Iterable[Chat], official: MistralTokenizer
) -> Parity:
    """Compare the file's own rendering of each conversation with the ids of training.

    Args:
        official: tokenizer of the model.
    Raises:
        StageError: the first difference.
    """
    decode = partial(official.decode, special_token_policy=SpecialTokenPolicy.KEEP)
    is_tekken = model.metadata("tokenizer.ggml.model") == "gpt2"
    n_compared = n_left_out = n_misread = 0
    for chat in chats:
        texts = list(token_parity.texts_of(chat.messages, chat.tools))
        if token_parity.why_template_differs(chat.messages, chat.tools, official=official) or any(
            spells_control_token(model, text) for text in texts
        ):
            n_left_out += 1
            continue
        found = render(model, chat)
        expected = chat.document.input_ids.tolist()
        # llama.cpp splits tekken's text at a combining mark, as if it were punctuation.
        if found != expected and is_tekken and any(map(has_mark, texts)):
            n_misread += 1
            continue
        token_parity.compare(
            found,
            expected,
            what="the GGUF reads a conversation as other tokens than training did",
            where=f"{gguf}, conversation {chat.document.id}",
            decode=decode,
            to_fix="the merged folder must hold the base's tokenizer files and chat template",
        )
        n_compared += 1
    return Parity(n_compared, n_left_out, n_misread)


def spells_control_token(model: LlamaCppModel, text: str) -> bool:
    as_control = model.tokenize(text, adds_bos=False, parses_control=True)
    return as_control != model.tokenize(text, adds_bos=False, parses_control=False)


def has_mark(text: str) -> bool:
    return any(unicodedata.category(character).startswith("M") for character in text)


def render(model: LlamaCppModel, chat: Chat) -> list[int]:
    """Return a conversation's token ids by the template and the tokenizer inside the file."""
    bos, eos = model.control_text("bos"), model.control_text("eos")
    if token_parity.is_text(chat.messages):
        # A GGUF made from SentencePiece adds no space in front: its template writes it.
        space = " " if model.metadata("tokenizer.ggml.model") == "llama" else ""
        text = f"{bos}{space}{chat.messages[0]['content']}{eos}"
    else:
        messages, tools = token_parity.template_arguments(chat.messages, chat.tools)
        template = model.metadata("tokenizer.chat_template")
        text = render_template(template, messages, tools, bos=bos, eos=eos)
    return model.tokenize(text, adds_bos=False, parses_control=True)


def render_template(
    template: str,
    messages: list[dict[str, Any]],  # untyped: chat templates' messages
    tools: list[dict[str, Any]] | None,  # untyped: the same
    *,
    bos: str,
    eos: str,
) -> str:
    """Apply a chat template as transformers does: sandboxed Jinja, plain JSON."""

    def raise_exception(message: str) -> None:
        raise StageError("the chat template refuses a conversation", found=message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda _: ""
    # Jinja's own filter sorts keys and escapes for HTML.
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(
        messages=messages,
        tools=tools,
        bos_token=bos,
        eos_token=eos,
        add_generation_prompt=False,
    )
