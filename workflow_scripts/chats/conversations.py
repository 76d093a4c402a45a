"""Conversations: what a record says, corrected where that is safe, else rejected with a reason.

What passes here, mistral-common renders, whatever the tokenizer's version; but for tools before v3,
and for text beside tool calls in one answer before v7, which `render_chats` rejects. The rules are
those of its validator and normalizer in fine-tuning mode.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_scripts.chats import schemas
from workflow_scripts.chats.messages import CALL_ID, Function, Message, ToolCall
from workflow_scripts.chats.rejections import Rejected

if TYPE_CHECKING:
    import pyarrow as pa

    from workflow_scripts.settings import ReadingSettings

FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # mistral-common's
NO_ID = (None, "", "null")  # "null" is what mistral-common puts for none
ALPHANUMERIC = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# Far below the depth at which Python's recursion ends, for the JSON that rendering reads again.
MAX_NESTING = 100
# Roles a role may come after; a tool's result is held to its call, which is stricter.
FOLLOWS = {
    "system": ("system", "user"),
    "user": ("system", "user", "assistant", "tool"),
    "assistant": ("system", "user", "assistant", "tool"),
    "tool": ("assistant", "tool"),
}
BETWEEN_JOINED = "\n\n"  # as mistral-common joins


def clean_schema() -> pa.Schema:
    """A kept conversation; `messages` and `tools` in OpenAI's shape.

    A message of a plain text has the role `text`. `weight` is null, 0 or 1, and an answer's alone.
    """
    import pyarrow as pa

    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    message = pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("tool_calls", pa.list_(call)),
            ("tool_call_id", pa.string()),
            ("name", pa.string()),
            ("weight", pa.int8()),
        ]
    )
    return pa.schema(
        [
            ("id", pa.string()),
            ("messages", pa.list_(message)),
            ("tools", pa.string()),  # JSON: a tool's parameters are a schema of any shape
            ("references", pa.list_(pa.string())),  # right answers to the last question, or null
            ("n_copies", pa.int32()),  # times it is seen an epoch, of its source's weight
            ("corrections", pa.list_(pa.string())),
            ("source", pa.string()),
            ("source_file", pa.string()),
            ("source_line", pa.int64()),
        ]
    )


def rejected_schema() -> pa.Schema:
    """What was not kept: a `reason` to count by, a `detail` of this one, and the row as read."""
    import pyarrow as pa

    return pa.schema(
        [
            ("source", pa.string()),
            ("source_file", pa.string()),
            ("source_line", pa.int64()),
            ("reason", pa.string()),
            ("detail", pa.string()),
            ("raw", pa.string()),
        ]
    )


class RejectedRow(NamedTuple):
    """A row of `rejected_schema`."""

    source: str
    source_file: str
    source_line: int
    reason: str
    detail: str | None
    raw: str | None
    """The row as read."""


@dataclass(frozen=True)
class Conversation:
    """A chat that mistral-common renders, or a plain text."""

    messages: list[Message]
    """Null fields left out."""
    tools: str | None
    """JSON: OpenAI's list of tools."""
    references: list[str] | None
    """Right answers to the last question; None where the record marks none."""
    fields: schemas.Json
    """The record it came from."""
    corrections: list[str]
    """What was mended, each phrase once."""


def parse(content: Any, reading: ReadingSettings, mend: Callable[[str], str]) -> Conversation:
    """A record as a conversation, corrected where that is safe.

    Args:
        content: the record, which is left as it is.
        mend: repairs the text of a message, a tool's result excepted.
    Raises:
        Rejected: with the reason.
    """
    chat = schemas.raw_chat(content, reading)
    corrections: dict[str, None] = {}
    if chat.shape == schemas.TEXT:
        text = _text(chat.messages[0]["content"], mend, corrections)
        if not text:
            raise Rejected("an empty message")
        plain: Message = {"role": schemas.TEXT, "content": text}
        return Conversation([plain], None, None, chat.fields, [*corrections])
    messages = _read(chat.messages, mend, corrections)
    _check_order(messages)
    if any("tool_calls" in message or message["role"] == "tool" for message in messages):
        _match_results(messages, corrections)
    messages = _join(messages, corrections)
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise Rejected("every weight is 0")
    tools = _tools(chat.tools)
    references = _references(chat.reference, mend, corrections)
    return Conversation(messages, tools, references, chat.fields, [*corrections])


def _read(
    raw: Sequence[Any], mend: Callable[[str], str], corrections: dict[str, None]
) -> list[Message]:
    """Each message by itself, up to the last answer."""
    messages: list[Message] = []
    roles = [_role(message, number) for number, message in enumerate(raw, start=1)]
    if not roles:
        raise Rejected("no messages")
    while roles[-1] != "assistant":
        roles.pop()
        corrections["messages after the last answer dropped"] = None
        if not roles:
            raise Rejected("no answer")
    for number, (role, message) in enumerate(zip(roles, raw, strict=False), start=1):
        try:
            read = READERS[role](message, mend, corrections)
        except Rejected as rejection:
            detail = f": {rejection.detail}" if rejection.detail else ""
            raise Rejected(rejection.reason, f"message {number}{detail}") from rejection
        if read is not None:
            messages.append(read)
    return messages


def _role(message: Any, number: int) -> str:
    if not isinstance(message, dict):
        detail = f"message {number}: {schemas.json_type(message)}"
        raise Rejected("a message is no object", detail)
    role = message.get("role")
    known = schemas.ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise Rejected("unknown role", f"message {number}: {_shown(role)}")
    return known


def _shown(value: Any) -> str:
    """A value in a detail: short, and of characters that every file takes."""
    return ascii(value)[:80]


def _read_system(
    message: schemas.Json, mend: Callable[[str], str], corrections: dict[str, None]
) -> Message | None:
    text = _text(message.get("content"), mend, corrections)
    if not text:
        corrections["empty system message dropped"] = None
        return None
    return {"role": "system", "content": text}


def _read_user(
    message: schemas.Json, mend: Callable[[str], str], corrections: dict[str, None]
) -> Message:
    text = _text(message.get("content"), mend, corrections)
    if not text:
        raise Rejected("an empty message")
    return {"role": "user", "content": text}


def _read_assistant(
    message: schemas.Json, mend: Callable[[str], str], corrections: dict[str, None]
) -> Message:
    read: Message = {"role": "assistant"}
    text = _text(message.get("content"), mend, corrections)
    if text:
        read["content"] = text
    if len(message) > 2 or not text:  # a plain answer has nothing else
        calls = _calls(message, corrections)
        if calls:
            read["tool_calls"] = calls
        weight = message.get("weight")
        if weight is not None:
            if weight not in (0, 1):
                raise Rejected("a weight is neither 0 nor 1", _shown(weight))
            read["weight"] = int(weight)
        if any(message.get(field) for field in ("reasoning_content", "reasoning", "thinking")):
            corrections["reasoning left out"] = None
    if "content" not in read and "tool_calls" not in read:
        raise Rejected("an empty message")
    return read


def _read_tool(
    message: schemas.Json, mend: Callable[[str], str], corrections: dict[str, None]
) -> Message:
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    if content is None:
        content = ""
    elif not isinstance(content, str) and not any(_is_text_part(part) for part in parts):
        content = json.dumps(content, ensure_ascii=False)
        corrections["tool result written as JSON"] = None
    # Not mended: it is what a program said, not what a person wrote.
    content = _joined_parts(content)
    content = _encodable(content, corrections)
    _json_content(content)
    read: Message = {
        "role": "tool",
        "content": content,
        "tool_call_id": _given_id(message.get("tool_call_id")),
    }
    name = message.get("name") or None
    if name is not None:
        read["name"] = _function_name(name)
    if message["role"] == "function":
        corrections["function_call made tool_calls"] = None
    return read


Reader = Callable[[schemas.Json, Callable[[str], str], dict[str, None]], Message | None]
READERS: dict[str, Reader] = {
    "system": _read_system,
    "user": _read_user,
    "assistant": _read_assistant,
    "tool": _read_tool,
}


# Text


def _text(content: Any, mend: Callable[[str], str], corrections: dict[str, None]) -> str:
    """A message's text, mended; empty where there is nothing but white space."""
    if not isinstance(content, str):
        content = "" if content is None else _joined_parts(content)
    text = mend(_encodable(content, corrections))
    return "" if text.isspace() else text


def _references(
    marked: Any, mend: Callable[[str], str], corrections: dict[str, None]
) -> list[str] | None:
    """The right answers that a record marks, as texts; what is no text or number is none."""
    answers = schemas.parsed(marked)
    texts = [
        _text(answer if isinstance(answer, str) else str(answer), mend, corrections)
        for answer in (answers if isinstance(answers, list) else [marked])
        if isinstance(answer, str | int | float) and not isinstance(answer, bool)
    ]
    return [text for text in texts if text] or None


def _joined_parts(content: Any) -> str:
    """The text of a message that came in parts, joined as mistral-common does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Rejected("content is not text", schemas.json_type(content))
    for part in content:
        if not (isinstance(part, str) or _is_text_part(part)):
            kind = part.get("type") if isinstance(part, dict) else schemas.json_type(part)
            raise Rejected("content is not text", f"part {_shown(kind)}")
    texts = (part if isinstance(part, str) else part["text"] for part in content)
    return BETWEEN_JOINED.join(text for text in texts if text)


def _is_text_part(part: Any) -> bool:
    is_text = isinstance(part, dict) and part.get("type") == "text"
    return is_text and isinstance(part.get("text"), str)


def _encodable(text: str, corrections: dict[str, None]) -> str:
    """The text as UTF-8 can hold it.

    Half of a character that stands alone is damage that nothing undoes: U+FFFD in its place would
    be taught as an answer.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError as error:
            raise Rejected("half a character", error.reason) from error
        corrections["halves of characters joined"] = None
    return text


def _json_content(text: str) -> Any:
    """The value that rendering will read from a text, if it is JSON; None if it is not."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        raise Rejected("JSON that cannot be rendered", type(error).__name__) from error
    _check_json(value)
    return value


def _check_json(value: Any) -> None:
    """That a JSON value can be written as UTF-8, and read and written by recursion."""
    level: list[Any] = [[value]]
    depth = -1
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise Rejected("JSON that cannot be rendered", f"more than {MAX_NESTING} levels")
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [
            item for item in itertools.chain.from_iterable(inner) if isinstance(item, dict | list)
        ]
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Rejected("half a character", error.reason) from error


# Order


def _check_order(messages: Sequence[Message]) -> None:
    previous = "system"
    has_user = False
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "assistant" and not has_user:
            raise Rejected("an answer before any question", f"message {number}")
        if role == "tool" and previous not in FOLLOWS[role]:
            raise Rejected("a tool result without its call", f"message {number}")
        if previous not in FOLLOWS[role]:
            raise Rejected("wrong order of roles", f"message {number}: {role} after {previous}")
        has_user |= role == "user"
        previous = role


def _join(messages: list[Message], corrections: dict[str, None]) -> list[Message]:
    """Neighbours of one role as one message, which mistral-common makes of them anyway.

    Here already, so that an answer is one message to whoever reads the result. System messages are
    left: from v7 on each keeps its own.
    """
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        role = message["role"]
        if last is None or last["role"] != role or role not in ("user", "assistant"):
            joined.append(message)
            continue
        if (last.get("weight") == 0) != (message.get("weight") == 0):
            raise Rejected("answers in a row of different weight")
        # In the order of a message that came whole: an id is made of it.
        both: Message = {"role": role}
        texts = [text for part in (last, message) if (text := part.get("content"))]
        if texts:
            both["content"] = BETWEEN_JOINED.join(texts)
        if calls := message.get("tool_calls") or last.get("tool_calls"):
            both["tool_calls"] = calls
        weight = message.get("weight", last.get("weight"))
        if weight is not None:
            both["weight"] = weight
        joined[-1] = both
        corrections["messages in a row joined"] = None
    return joined


# Tools


def _calls(message: schemas.Json, corrections: dict[str, None]) -> list[ToolCall]:
    """An answer's tool calls, their ids as they were."""
    calls = message.get("tool_calls")
    if not calls and message.get("function_call"):
        calls = [schemas.parsed(message["function_call"])]
        corrections["function_call made tool_calls"] = None
    calls = schemas.parsed(calls) or []
    if not isinstance(calls, list):
        raise Rejected("tool calls are no list", schemas.json_type(calls))
    return [_call(call, corrections) for call in calls]


def _call(call: Any, corrections: dict[str, None]) -> ToolCall:
    if not isinstance(call, dict):
        raise Rejected("a tool call is no object", schemas.json_type(call))
    given = call.get("function", call)  # some leave the layer between out
    if call.get("type") not in (None, "function") or not isinstance(given, dict):
        raise Rejected("a tool call is no function call", _shown(call.get("type")))
    name, arguments = _function_name(given.get("name")), given.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
        corrections["tool arguments written as JSON"] = None
    elif arguments in (None, ""):
        arguments = "{}"  # as mistral-common has it
    if not isinstance(arguments, str) or not isinstance(_json_content(arguments), dict):
        raise Rejected("tool arguments are no JSON object", _shown(arguments))
    function: Function = {"name": name, "arguments": _encodable(arguments, corrections)}
    return {"id": _given_id(call.get("id")), "type": "function", "function": function}


def _given_id(given: Any) -> str | None:
    return None if given in NO_ID else str(given)


def _function_name(name: Any) -> str:
    """The name, once mistral-common accepts it."""
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise Rejected("a function name that is refused", _shown(name))
    return name


def _match_results(messages: Sequence[Message], corrections: dict[str, None]) -> None:
    """Give every call and its result one valid id, in place.

    The last answer's calls need no result: what a tool says afterwards is not learned.
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
    """Each call with its result: by their ids, and where one of them has none by their order."""
    waiting = list(calls)
    without_call: list[Message | None] = []
    for result in results:
        given = result["tool_call_id"]
        of = [at for at, call in enumerate(waiting) if given is not None and call["id"] == given]
        if of:
            yield waiting.pop(of[0]), result
        else:
            without_call.append(result)
    without_call += [None] * (len(waiting) - len(without_call))
    for call, same_place in zip(waiting, without_call, strict=True):
        if same_place is not None:
            named = same_place.get("name", call["function"]["name"])
            has_ids = None not in (call["id"], same_place["tool_call_id"])
            if has_ids or named != call["function"]["name"]:
                detail = _shown(same_place["tool_call_id"] or named)
                raise Rejected("a tool result without its call", detail)
        yield call, same_place


def _new_id(given: str, taken: set[str | None]) -> str:
    """An id as mistral-common demands it: of the one that was given, and of no chance."""
    for attempt in itertools.count():
        digest = hashlib.sha256(f"{attempt} {given}".encode(errors="surrogatepass")).digest()
        made = "".join(ALPHANUMERIC[byte % len(ALPHANUMERIC)] for byte in digest[:9])
        if made not in taken:
            return made
    raise AssertionError("unreachable: the attempts have no end")


def _tools(tools: Any) -> str | None:
    tools = schemas.parsed(tools)
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Rejected("tools are no list of objects", schemas.json_type(tools))
    wrapped = [_wrapped(tool) if "name" in tool else tool for tool in tools]
    try:
        text = json.dumps(wrapped, ensure_ascii=False)
    except RecursionError as error:
        raise Rejected("JSON that cannot be rendered", "nested too deeply") from error
    return _checked_tools(text)


def _wrapped(tool: schemas.Json) -> schemas.Json:
    """A function without the layer around it, as OpenAI's `functions` and ShareGPT have it."""
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": tool.get("type", "function"), "function": function}


@functools.lru_cache(maxsize=1024)  # checking takes 0.3 ms a tool, and chats share their tools
def _checked_tools(text: str) -> str:
    """The text, once mistral-common accepts what it says."""
    from mistral_common.protocol.instruct.tool_calls import Tool
    from mistral_common.utils.json_utils import validate_json_schema_by_draft7
    from pydantic import ValidationError

    _check_json(tools := json.loads(text))
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


# Identity


def conversation_id(messages: Sequence[Message], tools: str | None = None) -> str:
    """16 hexadecimal digits of the content's SHA-256: equal content, equal id."""
    content: object = messages if tools is None else [messages, tools]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def choose_split(key: str, *, validation_fraction: float, test_fraction: float) -> str:
    """`train`, `validation` or `test`, by the key's hash alone.

    So a conversation stays in its split however the dataset grows, and equal keys stay together.
    """
    position = (
        int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        / 2**64
    )
    if position < test_fraction:
        return "test"
    if position < test_fraction + validation_fraction:
        return "validation"
    return "train"
