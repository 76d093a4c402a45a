"""Tool calls, their results and the tools on offer, in the form that mistral-common accepts."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any

from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.utils.json_utils import validate_json_schema_by_draft7
from pydantic import ValidationError

from workflow_scripts.chats import schemas
from workflow_scripts.chats.message_text import (
    Corrections,
    check_json,
    encodable,
    is_text_part,
    joined_parts,
    json_content,
    shown,
)
from workflow_scripts.chats.messages import CALL_ID, Function, Message, ToolCall
from workflow_scripts.chats.rejections import Rejected

FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # as in mistral-common
NO_ID = (None, "", "null")  # mistral-common writes "null" if there is no id
ALPHANUMERIC = string.digits + string.ascii_uppercase + string.ascii_lowercase


def read_calls(message: schemas.Json, corrections: Corrections) -> list[ToolCall]:
    """Return an answer's tool calls, their ids unchanged."""
    calls = message.get("tool_calls")
    if not calls and message.get("function_call"):
        calls = [schemas.parsed(message["function_call"])]
        corrections["function_call made tool_calls"] = None
    calls = schemas.parsed(calls) or []
    if not isinstance(calls, list):
        raise Rejected("tool calls are not a list", schemas.json_type(calls))
    return [_call(call, corrections) for call in calls]


def _call(call: Any, corrections: Corrections) -> ToolCall:
    if not isinstance(call, dict):
        raise Rejected("a tool call is not an object", schemas.json_type(call))
    given = call.get("function", call)  # some records leave out the layer between
    if call.get("type") not in (None, "function") or not isinstance(given, dict):
        raise Rejected("a tool call is not a function call", shown(call.get("type")))
    name, arguments = _function_name(given.get("name")), given.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
        corrections["tool arguments written as JSON"] = None
    elif arguments in (None, ""):
        arguments = "{}"  # as mistral-common does
    if not isinstance(arguments, str) or not isinstance(json_content(arguments), dict):
        raise Rejected("tool arguments are not a JSON object", shown(arguments))
    function: Function = {"name": name, "arguments": encodable(arguments, corrections)}
    return {"id": _given_id(call.get("id")), "type": "function", "function": function}


def read_result(message: schemas.Json, corrections: Corrections) -> Message:
    """Return the message of a tool's result.

    Its text is not repaired, because a program wrote it, not a person.
    """
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    if content is None:
        content = ""
    elif not isinstance(content, str) and not any(is_text_part(part) for part in parts):
        content = json.dumps(content, ensure_ascii=False)
        corrections["tool result written as JSON"] = None
    content = encodable(joined_parts(content), corrections)
    json_content(content)
    read: Message = {
        "role": "tool",
        "content": content,
        "tool_call_id": _given_id(message.get("tool_call_id")),
    }
    if message.get("name"):
        read["name"] = _function_name(message["name"])
    if message["role"] == "function":
        corrections["function_call made tool_calls"] = None
    return read


def _given_id(given: Any) -> str | None:
    return None if given in NO_ID else str(given)


def _function_name(name: Any) -> str:
    """Return the name, if mistral-common accepts it."""
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise Rejected("a function name that is refused", shown(name))
    return name


def match_results(messages: Sequence[Message], corrections: Corrections) -> None:
    """Give every call and its result the same valid id, in place.

    The calls of the last answer need no results, because what a tool says afterwards is not
    trained on.
    """
    taken = {call["id"] for message in messages for call in message.get("tool_calls") or ()}
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        calls = message.get("tool_calls") or []
        rest = messages[at + 1 :]
        results = list(itertools.takewhile(lambda other: other["role"] == "tool", rest))
        detail = f"message {at + 1}: {len(calls)} calls, {len(results)} results"
        if len(results) > len(calls):
            raise Rejected("a tool result without its call", detail)
        if len(results) < len(calls) and rest:
            raise Rejected("a tool call without its result", detail)
        here: set[str] = set()
        for call, result in _pairs(calls, results):
            of_result = None if result is None else result["tool_call_id"]
            given = call["id"] or of_result
            if call["id"] is None or (result is not None and of_result is None):
                corrections["tool call ids filled in"] = None
            if given is not None and CALL_ID.fullmatch(given) and given not in here:
                valid = given
            else:
                if given is not None:
                    corrections["tool call ids replaced"] = None
                valid = _new_id(given or "", taken)
            call["id"] = valid
            here.add(valid)
            taken.add(valid)
            if result is not None:
                result["tool_call_id"] = valid


def _pairs(
    calls: Sequence[ToolCall], results: Sequence[Message]
) -> Iterator[tuple[ToolCall, Message | None]]:
    """Yield each call with its result: matched by id, or by order if one of them has no id."""
    waiting = list(calls)
    without_call: list[Message] = []
    for result in results:
        given = result["tool_call_id"]
        of = [at for at, call in enumerate(waiting) if given is not None and call["id"] == given]
        if of:
            yield waiting.pop(of[0]), result
        else:
            without_call.append(result)
    for call, same_place in itertools.zip_longest(waiting, without_call):
        if same_place is not None:
            named = same_place.get("name", call["function"]["name"])
            has_ids = None not in (call["id"], same_place["tool_call_id"])
            if has_ids or named != call["function"]["name"]:
                detail = shown(same_place["tool_call_id"] or named)
                raise Rejected("a tool result without its call", detail)
        yield call, same_place


def _new_id(given: str, taken: set[str | None]) -> str:
    """Return an id in mistral-common's form, a hash of the given one, that is not taken."""
    texts = (f"{attempt} {given}".encode(errors="surrogatepass") for attempt in itertools.count())
    digests = (hashlib.sha256(text).digest()[:9] for text in texts)
    ids = ("".join(ALPHANUMERIC[byte % len(ALPHANUMERIC)] for byte in nine) for nine in digests)
    return next(made for made in ids if made not in taken)


def read_tools(tools: Any) -> str | None:
    """Return the tools on offer as JSON text, OpenAI's list; None if there are none."""
    tools = schemas.parsed(tools)
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Rejected("tools are not a list of objects", schemas.json_type(tools))
    wrapped = [_wrapped(tool) if "name" in tool else tool for tool in tools]
    try:
        text = json.dumps(wrapped, ensure_ascii=False)
    except RecursionError as error:
        raise Rejected("JSON that cannot be rendered", "nested too deeply") from error
    return _checked_tools(text)


def _wrapped(tool: schemas.Json) -> schemas.Json:
    """Wrap a bare function, as OpenAI's `functions` and ShareGPT write it."""
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": tool.get("type", "function"), "function": function}


@functools.lru_cache(maxsize=1024)  # a check takes 0.3 ms per tool, and chats share their tools
def _checked_tools(text: str) -> str:
    """Return the text, if mistral-common accepts its tools."""
    check_json(tools := json.loads(text))
    for number, tool in enumerate(tools, start=1):
        try:
            function = Tool.from_openai(tool).function
            validate_json_schema_by_draft7(function.parameters)
        except (ValueError, TypeError, RecursionError) as error:
            found = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            detail = f"tool {number}: {found}"[:200]
            raise Rejected("a tool that mistral-common refuses", detail) from error
        _function_name(function.name)
    return text
