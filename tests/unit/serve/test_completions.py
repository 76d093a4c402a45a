from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from workflow_scripts.serve import completions
from workflow_scripts.serve.prompts import UnusableChat

WITH_SPACE = SimpleNamespace(has_leading_space=True, version="v3")
CALLS = '[{"name": "f", "arguments": {"x": "ü"}, "id": "abc123XYZ"}]'


def chunks(*texts, finish_reason="stop"):
    """Chunks as llama-cpp-python's `create_completion` streams them."""
    for text, reason in [*((text, None) for text in texts), ("", finish_reason)]:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
        yield {"id": "cmpl-1", "created": 0, "model": "m", "choices": [choice]}


def streamed(*texts, begins="", reads_calls=True, **options):
    shaped = completions._streamed(
        chunks(*texts, **options), begins, WITH_SPACE, reads_calls=reads_calls
    )
    return [chunk["choices"][0] for chunk in shaped]


def test_a_stream_has_one_start_and_one_end_and_drops_one_space():
    choices = streamed("", " ", " a", "b ")
    assert [choice["delta"].get("role") for choice in choices].count("assistant") == 1
    assert "".join(choice["delta"].get("content", "") for choice in choices) == " ab "
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


@pytest.mark.parametrize("cut", range(1, len(CALLS)))
def test_a_call_is_complete_wherever_its_text_is_split(cut):
    pieces = (" Well", "[TOOL_CALLS]", " " + CALLS[:cut], CALLS[cut:])
    choices = streamed(*pieces)
    (calls,) = [
        choice["delta"]["tool_calls"] for choice in choices if "tool_calls" in choice["delta"]
    ]
    assert calls[0]["id"] == "abc123XYZ"
    assert json.loads(calls[0]["function"]["arguments"]) == {"x": "ü"}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Well"
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_text_that_is_not_a_call_stays_text():
    for reads_calls, text in ((True, "[1, 2"), (True, '[{"name": "f"}]'), (False, CALLS)):
        choices = streamed("[TOOL_CALLS]", text, reads_calls=reads_calls, finish_reason="length")
        assert "".join(choice["delta"].get("content", "") for choice in choices) == text
        assert choices[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("written", ["", "null", "[]", "{}", '"f"', "[1]", '[{"arguments": {}}]'])
def test_calls_are_a_list_of_names_and_arguments(written):
    assert completions.parse_calls(written) is None


def test_each_call_without_an_id_gets_a_new_one_of_nine_characters():
    written = json.dumps([{"name": "f", "arguments": {}}] * 2)
    first, second = (call["id"] for call in completions.parse_calls(written))
    assert len(first) == len(second) == 9 and first != second and first.isalnum()


def test_only_offered_tools_can_be_chosen():
    tools = [{"function": {"name": name}} for name in ("f", "g")]
    chosen = {"type": "function", "function": {"name": "g"}}
    assert completions.forced_tools(tools, chosen) == tools[1:]
    assert completions.forced_tools(tools, "required") == tools
    assert completions.forced_tools(tools, "auto") == completions.forced_tools(tools, None) == []
    for choice, offered in ((chosen, tools[:1]), ("required", None)):
        with pytest.raises(UnusableChat, match="a tool that is not offered"):
            completions.forced_tools(offered, choice)
