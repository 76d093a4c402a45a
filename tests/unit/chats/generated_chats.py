"""Random conversations of every shape that cleaning accepts."""

from __future__ import annotations

import json
import random
from typing import Any

WORDS = [
    *(
        "the",
        "Word",
        "naïve",
        "Größe",
        "日本語",
        "한국어",
        "ไทย",
        "🎉",
        "👩‍👩‍👧",
        "e\u0301",
        "x=1;",
    ),
    *("3.14", "0123", "don't", "(a,b)", "/usr", "http://a.b/c?d=1", "--", "...", "\u200b", "\xa0"),
    *("\ufeff", "\u3000", "𓀀", "ǅ", "ʰ", "٣", "\x07", "\x00", "\x85", "\u2028", "İ", "▁", "\x1c"),
]
GAPS = [
    *([" "] * 12),
    *("", "", "  ", " " * 17, "\n", "\n", "\n\n", "\n    ", "\t", "\r\n", " \n", "\n/", ".\n"),
]
LOOKALIKES = [
    *("[INST]", "[/INST]", "<s>", "</s>", "<unk>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "<pad>"),
    *("[SYSTEM_PROMPT]", "[TOOL_RESULTS]", "<0x0A>", "[IMG]", "<SPECIAL_20>", "[REF]"),
]


class ChatGenerator:
    """Makes any number of conversations; equal seeds make equal conversations."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def conversation(self) -> tuple[list[dict[str, Any]], str | None]:
        """Return messages and tools (JSON) as in `clean_schema`, without null values."""
        spells_control = self.happens(0.15)
        uses_tools = self.happens(0.25)
        messages: list[dict[str, Any]] = []
        if self.happens(0.4):
            text = "" if self.happens(0.1) else self.text(spells_control)
            messages.append({"role": "system", "content": text})
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            messages.append({"role": "user", "content": self.text(spells_control)})
            if self.happens(0.03):
                messages.append({"role": "user", "content": self.text(spells_control)})
            if uses_tools and self.happens(0.6):
                messages += self.tool_use()
            answer = {"role": "assistant", "content": self.text(spells_control)}
            if self.happens(0.2):
                answer["weight"] = self.random.choice((0, 1))
            messages.append(answer)
        if not uses_tools:
            return messages, None
        tools = [self.tool(number) for number in range(self.random.choice((1, 2)))]
        return messages, json.dumps(tools, ensure_ascii=self.happens(0.5))

    def happens(self, probability: float) -> bool:
        return self.random.random() < probability

    def text(self, spells_control: bool = False) -> str:
        parts = []
        for _ in range(self.random.choice((1, 2, 3, 7))):
            parts += [self.random.choice(WORDS), self.random.choice(GAPS)]
            if spells_control and self.happens(0.2):
                parts.append(self.random.choice(LOOKALIKES))
            if self.happens(0.02):
                plane = self.random.choice((range(0x20, 0xD800), range(0xE000, 0x110000)))
                parts.append(chr(self.random.choice(plane)))
        text = "".join(parts)
        # Mostly as `whitespace: strip` leaves a text, sometimes as `keep` does.
        return text if text.strip() and self.happens(0.1) else text.strip() or "x"

    def tool_use(self) -> list[dict[str, Any]]:
        """Return tool calls and their results."""
        calls = []
        for _ in range(1 if self.happens(0.8) else 2):
            arguments = {self.word(): self.value() for _ in range(self.random.randrange(3))}
            function = {
                "name": "look_up-0",
                "arguments": json.dumps(arguments, ensure_ascii=self.happens(0.5)),
            }
            calls.append({"id": self.call_id(), "type": "function", "function": function})
        if self.happens(0.1):
            calls[0]["function"]["arguments"] = '{"b" :1,\n"a":[ 2.50,1e3]}'
        results = [
            {
                "role": "tool",
                "tool_call_id": call["id"],
                "name": "look_up-0",
                "content": self.random.choice(
                    (self.text(), json.dumps(self.value()), str(self.random.randrange(99)), "2.5")
                ),
            }
            for call in calls
        ]
        return [{"role": "assistant", "tool_calls": calls}, *results]

    def tool(self, number: int) -> dict[str, Any]:
        properties = {self.word(): {"type": "string", "description": self.word()}}
        function = {
            "name": f"look_up-{number}",
            "parameters": {"type": "object", "properties": properties, "required": []},
            "description": self.text(),
        }
        if self.happens(0.2):
            function["strict"] = True
        return {"type": "function", "function": function}

    def value(self, depth: int = 0) -> Any:
        """Return a JSON value."""
        kind = self.random.randrange(7 if depth < 2 else 5)
        match kind:
            case 0:
                return self.random.randrange(-(10**6), 10**6)
            case 1:
                return self.random.random() * 1000
            case 2:
                return self.random.choice((True, False, None))
            case 3:
                return self.text()
            case 4:
                return ""
            case 5:
                return [self.value(depth + 1) for _ in range(self.random.randrange(3))]
        return {self.word(): self.value(depth + 1) for _ in range(self.random.randrange(3))}

    def word(self) -> str:
        return self.random.choice(WORDS)

    def call_id(self) -> str:
        return "".join(self.random.choices("abcXYZ0189", k=9))
