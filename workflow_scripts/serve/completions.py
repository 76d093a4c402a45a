"""An answer of the model in OpenAI's shape: text, or the tool calls that it writes.

llama-cpp-python's own handler answers with tool calls only where one tool was forced, and then in
no form that the model was trained on. A Mistral model opens them with a control token and writes
them as JSON, so that is what is read here.
"""

from __future__ import annotations

import itertools
import json
import secrets
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from workflow_scripts.chats.messages import CALL_ID
from workflow_scripts.serve.prompts import Message, Prompts, UnusableChat

if TYPE_CHECKING:
    from llama_cpp import Llama
    from llama_cpp.llama_grammar import LlamaGrammar
    from llama_cpp.llama_types import (
        ChatCompletionMessageToolCall,
        ChatCompletionMessageToolCallChunk,
        ChatCompletionNamedToolChoice,
        ChatCompletionRequestResponseFormat,
        ChatCompletionResponseMessage,
        ChatCompletionStreamResponseChoice,
        ChatCompletionStreamResponseDelta,
        ChatCompletionTool,
        CreateChatCompletionResponse,
        CreateChatCompletionStreamResponse,
        CreateCompletionResponse,
    )

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


def chat_handler(
    prompts: Prompts,
) -> Callable[..., CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]]:
    """What `Llama.create_chat_completion` calls."""

    def answer(
        *,
        llama: Llama,
        messages: Sequence[Message],
        tools: Sequence[ChatCompletionTool] | None = None,
        tool_choice: str | ChatCompletionNamedToolChoice | None = None,
        response_format: ChatCompletionRequestResponseFormat | None = None,
        grammar: LlamaGrammar | None = None,
        stream: bool = False,
        **sampling: Any,
    ) -> CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]:
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
        if isinstance(completion, Iterator):
            return _streamed(completion, begins, prompts, reads_calls=bool(tools))
        return _whole(completion, begins, prompts, reads_calls=bool(tools))

    return answer


def forced_tools(
    tools: Sequence[ChatCompletionTool] | None,
    tool_choice: str | ChatCompletionNamedToolChoice | None,
) -> list[ChatCompletionTool]:
    """The tools of which one must be called; none where the model is free to answer.

    Raises:
        UnusableChat: a tool is to be called that is not offered.
    """
    if tool_choice is None or tool_choice in ("none", "auto"):
        return []
    if isinstance(tool_choice, str):
        chosen = list(tools or []) if tool_choice == "required" else []
    else:
        name = tool_choice["function"]["name"]
        chosen = [tool for tool in tools or [] if tool["function"]["name"] == name]
    if not chosen:
        raise UnusableChat(f"tool_choice names no tool that is offered: {tool_choice}")
    return chosen


def calls_grammar(tools: Sequence[ChatCompletionTool], prompts: Prompts) -> LlamaGrammar:
    """One call of one of the tools, spelled as in training."""
    calls = []
    for tool in tools:
        function = tool["function"]
        properties: dict[str, object] = {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters") or {"type": "object"},
        }
        if prompts.version != "v2":
            properties["id"] = {"type": "string", "pattern": f"^{CALL_ID.pattern}$"}
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


def json_grammar(schema: object, prompts: Prompts) -> LlamaGrammar:
    """JSON of a schema, after the space that a SentencePiece model begins every answer with.

    Args:
        schema: JSON Schema; None is any object.
    """
    from llama_cpp.llama_grammar import LlamaGrammar, json_schema_to_gbnf

    rules = json_schema_to_gbnf(json.dumps(schema or {"type": "object"}))
    if prompts.has_leading_space:
        rules = rules.replace("root ::= ", "answer ::= ", 1) + '\nroot ::= " " answer\n'
    return LlamaGrammar.from_string(rules, verbose=False)


def parse_calls(text: str) -> list[ChatCompletionMessageToolCall] | None:
    """Tool calls in OpenAI's shape; None where the text is no list of calls.

    Args:
        text: what follows the token that opens them.
    """
    try:
        written = json.loads(text)
        calls: list[ChatCompletionMessageToolCall] = [
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


def _id_of(call: Mapping[str, Any]) -> str:  # untyped: written by a model
    """The id the model wrote (v3 and later), or a fresh one."""
    written = call.get("id")
    if isinstance(written, str) and CALL_ID.fullmatch(written):
        return written
    alphabet = string.ascii_letters + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(9))


def _whole(
    completion: CreateCompletionResponse, begins: str, prompts: Prompts, *, reads_calls: bool
) -> CreateChatCompletionResponse:
    choice = completion["choices"][0]
    said, calls = _split(begins + choice["text"], prompts, reads_calls=reads_calls)
    message: ChatCompletionResponseMessage = {"role": "assistant", "content": said}
    if calls:
        message = {"role": "assistant", "content": said or None, "tool_calls": calls}
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
) -> tuple[str, list[ChatCompletionMessageToolCall] | None]:
    """What was said, and the calls after it. Text after the token that is no call stays text."""
    if prompts.has_leading_space:
        text = text.removeprefix(" ")
    said, opened, written = text.partition(OPENS_CALLS)
    calls = parse_calls(written) if opened and reads_calls else None
    return (said, calls) if calls else (said + written, None)


def _streamed(
    chunks: Iterable[CreateCompletionResponse],
    begins: str,
    prompts: Prompts,
    *,
    reads_calls: bool,
) -> Iterator[CreateChatCompletionStreamResponse]:
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
            yield _delta(chunk, {"tool_calls": list(map(_numbered, itertools.count(), calls))})
        elif written:
            yield _delta(chunk, {"content": written})
        yield _delta(chunk, {}, "tool_calls" if calls else choice["finish_reason"])


def _numbered(
    index: int, call: ChatCompletionMessageToolCall
) -> ChatCompletionMessageToolCallChunk:
    """A call as a stream carries it."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    return {
        "index": index,
        "id": call["id"],
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _delta(
    chunk: CreateCompletionResponse,
    delta: ChatCompletionStreamResponseDelta,
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None,
) -> CreateChatCompletionStreamResponse:
    choice: ChatCompletionStreamResponseChoice = {
        "index": 0,
        "delta": delta,
        "logprobs": None,
        "finish_reason": finish_reason,
    }
    return {
        "id": "chat" + chunk["id"],
        "object": "chat.completion.chunk",
        "created": chunk["created"],
        "model": chunk["model"],
        "choices": [choice],
    }
