"""An answer of the model in OpenAI's shape: text, or the tool calls that the model writes.

llama-cpp-python's own handler answers with tool calls only if one tool is forced, and in a format
that the model was not trained on. A Mistral model opens calls with a control token and writes them
as JSON; this module parses that.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from llama_cpp import Llama
from llama_cpp.llama_grammar import LlamaGrammar, json_schema_to_gbnf
from llama_cpp.llama_tokenizer import LlamaTokenizer
from llama_cpp.llama_types import (
    ChatCompletionMessageToolCall,
    ChatCompletionMessageToolCallChunk,
    ChatCompletionNamedToolChoice,
    ChatCompletionRequestResponseFormat,
    ChatCompletionResponseMessage,
    ChatCompletionStreamResponseDelta,
    ChatCompletionTool,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
    CreateCompletionResponse,
)

from workflow_scripts.chats.messages import CALL_ID, Message
from workflow_scripts.serve.prompts import Prompts, UnusableChat

OPENS_CALLS = "[TOOL_CALLS]"


def install(llama: Llama, prompts: Prompts) -> None:
    """Make a loaded model answer chats in the format that it was trained on."""
    opens_calls = prompts.tool_calls_id

    class VisibleCalls(LlamaTokenizer):
        """llama.cpp omits the text of control tokens; this keeps the one that opens tool calls."""

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
    """The function that `Llama.create_chat_completion` calls."""

    def answer(
        *,
        llama: Llama,
        messages: Sequence[Message],
        tools: Sequence[ChatCompletionTool] | None = None,
        tool_choice: str | ChatCompletionNamedToolChoice | None = None,
        response_format: ChatCompletionRequestResponseFormat | None = None,
        grammar: LlamaGrammar | None = None,
        stream: bool = False,
        # llama-cpp-python passes these on, but `create_completion` does not know them.
        functions: object = None,
        function_call: object = None,
        logprobs: object = None,
        top_logprobs: object = None,
        **sampling: Any,
    ) -> CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]:
        tools = None if tool_choice == "none" else tools
        prompt = prompts.render(messages, tools)
        callable_tools = forced_tools(tools, tool_choice)
        if callable_tools:
            assert prompts.tool_calls_id is not None  # otherwise rendering refuses tools
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
    """The tools of which one must be called; empty if the model may answer freely.

    Raises:
        UnusableChat: a tool must be called that is not offered.
    """
    if tool_choice is None or tool_choice in ("none", "auto"):
        return []
    if isinstance(tool_choice, str):
        chosen = list(tools or []) if tool_choice == "required" else []
    else:
        name = tool_choice["function"]["name"]
        chosen = [tool for tool in tools or [] if tool["function"]["name"] == name]
    if not chosen:
        raise UnusableChat(f"tool_choice names a tool that is not offered: {tool_choice}")
    return chosen


def calls_grammar(tools: Sequence[ChatCompletionTool], prompts: Prompts) -> LlamaGrammar:
    """A grammar for one call of one of the tools, written as in training."""
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
    """A grammar for JSON of a schema, after the space that starts every SentencePiece answer.

    Args:
        schema: JSON Schema; None is any object.
    """
    rules = json_schema_to_gbnf(json.dumps(schema or {"type": "object"}))
    if prompts.has_leading_space:
        rules = rules.replace("root ::= ", "answer ::= ", 1) + '\nroot ::= " " answer\n'
    return LlamaGrammar.from_string(rules, verbose=False)


def parse_calls(text: str) -> list[ChatCompletionMessageToolCall] | None:
    """Tool calls in OpenAI's shape; None if the text is not a list of calls.

    Args:
        text: the text after the token that opens calls.
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
    # The model may write any JSON, or none.
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return calls or None


def _id_of(call: Mapping[str, Any]) -> str:  # untyped: written by a model
    """The id that the model wrote (v3 and later), or a random one."""
    written = call.get("id")
    if isinstance(written, str) and CALL_ID.fullmatch(written):
        return written
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def _whole(
    completion: CreateCompletionResponse, begins: str, prompts: Prompts, *, reads_calls: bool
) -> CreateChatCompletionResponse:
    choice = completion["choices"][0]
    text = begins + choice["text"]
    if prompts.has_leading_space:
        text = text.removeprefix(" ")
    content, opened, written = text.partition(OPENS_CALLS)
    calls = parse_calls(written) if opened and reads_calls else None
    # Text after the token that is not a call stays text.
    message: ChatCompletionResponseMessage = {"role": "assistant", "content": content + written}
    if calls:
        message = {"role": "assistant", "content": content or None, "tool_calls": calls}
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


def _streamed(
    chunks: Iterable[CreateCompletionResponse],
    begins: str,
    prompts: Prompts,
    *,
    reads_calls: bool,
) -> Iterator[CreateChatCompletionStreamResponse]:
    """Text as it is generated; tool calls as a whole at the end."""
    opened = begins
    has_text = False
    for number, chunk in enumerate(chunks):
        choice = chunk["choices"][0]
        if number == 0:
            yield _delta(chunk, {"role": "assistant", "content": ""})
        text = choice["text"]
        if text and not has_text:
            text = text.removeprefix(" ") if prompts.has_leading_space else text
            has_text = True
        if opened:
            opened, text = opened + text, ""
        else:
            text, token, written = text.partition(OPENS_CALLS)
            opened = token + written
        if text:
            yield _delta(chunk, {"content": text})
        if choice["finish_reason"] is None:
            continue
        written = opened.removeprefix(OPENS_CALLS)
        calls = parse_calls(written) if reads_calls else None
        if calls:
            numbered: list[ChatCompletionMessageToolCallChunk] = [
                {
                    "index": index,
                    "id": call["id"],
                    "type": "function",
                    "function": {**call["function"]},
                }
                for index, call in enumerate(calls)
            ]
            yield _delta(chunk, {"tool_calls": numbered})
        elif written:
            yield _delta(chunk, {"content": written})
        yield _delta(chunk, {}, "tool_calls" if calls else choice["finish_reason"])


def _delta(
    chunk: CreateCompletionResponse,
    delta: ChatCompletionStreamResponseDelta,
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None,
) -> CreateChatCompletionStreamResponse:
    return {
        "id": "chat" + chunk["id"],
        "object": "chat.completion.chunk",
        "created": chunk["created"],
        "model": chunk["model"],
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
    }
