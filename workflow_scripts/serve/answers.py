"""An answer of the model in OpenAI's shape: text, or the tool calls that it writes.

llama-cpp-python's own handler answers with tool calls only where one tool was forced, and then in
no form that the model was trained on. A Mistral model opens them with a control token and writes
them as JSON, so that is what is read here.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workflow_scripts.serve.prompts import CALL_ID, Prompts, UnusableChat

if TYPE_CHECKING:
    from llama_cpp import Llama, LlamaGrammar

OPENS_CALLS = "[TOOL_CALLS]"
# What llama-cpp-python hands a chat handler and its `create_completion` does not know.
_NOT_SAMPLING = ("functions", "function_call", "logprobs", "top_logprobs")


def install(llama: Llama, prompts: Prompts) -> None:
    """Let a loaded model answer chats as it was trained to."""
    from llama_cpp.llama_tokenizer import LlamaTokenizer

    opens_calls = prompts.tool_calls_id

    class VisibleCalls(LlamaTokenizer):
        """llama.cpp's text of control tokens is nothing; the one that opens tool calls is kept."""

        def detokenize(
            self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
        ) -> bytes:
            pieces, begin = [], 0
            for at, token in enumerate(tokens):
                if token == opens_calls:
                    pieces.append(self._model.detokenize(tokens[begin:at], special=special))
                    begin = at + 1
            pieces.append(self._model.detokenize(tokens[begin:], special=special))
            return OPENS_CALLS.encode().join(pieces)

    llama.tokenizer_ = VisibleCalls(llama)
    llama.chat_handler = chat_handler(prompts)


def chat_handler(prompts: Prompts) -> Callable[..., dict[str, Any] | Iterator[dict[str, Any]]]:
    """What `Llama.create_chat_completion` calls."""

    def answer(
        *,
        llama: Llama,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: LlamaGrammar | None = None,
        stream: bool = False,
        **sampling: Any,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        for name in _NOT_SAMPLING:
            sampling.pop(name, None)
        tools = None if tool_choice == "none" else tools
        prompt = prompts.render(messages, tools)
        callable_tools = forced_tools(tools, tool_choice)
        if callable_tools:
            assert prompts.tool_calls_id is not None  # else rendering had refused the tools
            prompt.append(prompts.tool_calls_id)
            grammar = calls_grammar(callable_tools, prompts)
        elif grammar is None and response_format and response_format["type"] == "json_object":
            grammar = json_grammar(response_format.get("schema"), prompts)
        completion = llama.create_completion(
            prompt=prompt, grammar=grammar, stream=stream, **sampling
        )
        begins = OPENS_CALLS if callable_tools else ""
        if stream:
            return _streamed(completion, begins, prompts, reads_calls=bool(tools))
        return _whole(completion, begins, prompts, reads_calls=bool(tools))

    return answer


def forced_tools(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: str | Mapping[str, Any] | None
) -> list[Mapping[str, Any]]:
    """The tools of which one must be called; none where the model is free to answer.

    Raises:
        UnusableChat: a tool is to be called that is not offered.
    """
    if tool_choice in (None, "none", "auto"):
        return []
    if tool_choice == "required":
        chosen = list(tools or [])
    else:
        name = tool_choice["function"]["name"]
        chosen = [tool for tool in tools or [] if tool["function"]["name"] == name]
    if not chosen:
        raise UnusableChat(f"tool_choice names no tool that is offered: {tool_choice}")
    return chosen


def calls_grammar(tools: Sequence[Mapping[str, Any]], prompts: Prompts) -> LlamaGrammar:
    """One call of one of the tools, spelled as in training."""
    calls = []
    for tool in tools:
        function = tool["function"]
        properties = {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters") or {"type": "object"},
        }
        if prompts.version != "v2":
            properties["id"] = {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return json_grammar({"type": "array", "items": items, "minItems": 1, "maxItems": 1}, prompts)


def json_grammar(schema: Mapping[str, Any] | None, prompts: Prompts) -> LlamaGrammar:
    """JSON of a schema, after the space that a SentencePiece model begins every answer with."""
    from llama_cpp import LlamaGrammar
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    rules = json_schema_to_gbnf(json.dumps(schema or {"type": "object"}))
    if prompts.has_leading_space:
        rules = rules.replace("root ::= ", "answer ::= ", 1) + '\nroot ::= " " answer\n'
    return LlamaGrammar.from_string(rules, verbose=False)


def parse_calls(text: str) -> list[dict[str, Any]] | None:
    """Tool calls in OpenAI's shape; None where the text is no list of calls.

    Args:
        text: what follows the token that opens them.
    """
    try:
        written = json.loads(text)
        calls = [
            {
                "id": _id_of(call),
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": json.dumps(call["arguments"], ensure_ascii=False),
                },
            }
            for call in written
        ]
    # What the model writes may be any JSON, or none.
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return calls or None


def _id_of(call: Mapping[str, Any]) -> str:
    """The id the model wrote (v3 and later), or a fresh one."""
    written = call.get("id")
    if isinstance(written, str) and CALL_ID.fullmatch(written):
        return written
    alphabet = string.ascii_letters + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(9))


def _whole(
    completion: Mapping[str, Any], begins: str, prompts: Prompts, *, reads_calls: bool
) -> dict[str, Any]:
    choice = completion["choices"][0]
    said, calls = _split(begins + choice["text"], prompts, reads_calls=reads_calls)
    message: dict[str, Any] = {"role": "assistant", "content": said}
    if calls:
        message |= {"content": said or None, "tool_calls": calls}
    return {
        "id": "chat" + completion["id"],
        "object": "chat.completion",
        "created": completion["created"],
        "model": completion["model"],
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": None,
                "finish_reason": "tool_calls" if calls else choice["finish_reason"],
            }
        ],
        "usage": completion["usage"],
    }


def _split(
    text: str, prompts: Prompts, *, reads_calls: bool
) -> tuple[str, list[dict[str, Any]] | None]:
    """What was said, and the calls after it. Text after the token that is no call stays text."""
    if prompts.has_leading_space:
        text = text.removeprefix(" ")
    said, opened, written = text.partition(OPENS_CALLS)
    calls = parse_calls(written) if opened and reads_calls else None
    return (said, calls) if calls else (said + written, None)


def _streamed(
    chunks: Iterable[Mapping[str, Any]], begins: str, prompts: Prompts, *, reads_calls: bool
) -> Iterator[dict[str, Any]]:
    """Text as it comes; tool calls at the end, whole."""
    opened = begins
    has_begun = has_text = False
    for chunk in chunks:
        choice = chunk["choices"][0]
        if not has_begun:
            yield _delta(chunk, {"role": "assistant", "content": ""})
            has_begun = True
        text = choice["text"]
        if text and not has_text:
            text = text.removeprefix(" ") if prompts.has_leading_space else text
            has_text = True
        if opened:
            opened += text
            text = ""
        elif OPENS_CALLS in text:
            text, _, written = text.partition(OPENS_CALLS)
            opened = OPENS_CALLS + written
        if text:
            yield _delta(chunk, {"content": text})
        if choice["finish_reason"] is None:
            continue
        written = opened.removeprefix(OPENS_CALLS)
        calls = parse_calls(written) if reads_calls else None
        if calls:
            calls = [{"index": at, **call} for at, call in enumerate(calls)]
            yield _delta(chunk, {"tool_calls": calls})
        elif written:
            yield _delta(chunk, {"content": written})
        yield _delta(chunk, {}, "tool_calls" if calls else choice["finish_reason"])


def _delta(
    chunk: Mapping[str, Any], delta: dict[str, Any], finish_reason: str | None = None
) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {
        "id": "chat" + chunk["id"],
        "object": "chat.completion.chunk",
        "created": chunk["created"],
        "model": chunk["model"],
        "choices": [choice],
    }
