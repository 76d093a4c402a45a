"""Facts to recall: the code of a city, stated somewhere in a text and asked for later.

A code is four random digits, so a model can know it only from the text.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

CITIES = (
    "Lisbon Oslo Cairo Lima Quito Accra Hanoi Perth Turin Izmir Kyoto Malmo Basel Porto".split()
)
FIRST_CODE, N_CODES = 1000, 9000
ABOUT_A_CODE = re.compile(rf"\bcode of ({'|'.join(CITIES)})\b")
CHANCE_NATS = math.log(N_CODES)
"""Loss of a guess, if all codes are equally likely."""


@dataclass(frozen=True)
class Fact:
    """The code of one city."""

    city: str
    code: str

    @property
    def statement(self) -> str:
        return f"{self.answer_start} {self.code}."

    @property
    def answer_start(self) -> str:
        return f"The code of {self.city} is"

    @property
    def question(self) -> str:
        return f"What is the code of {self.city}?"


def draw_facts(generator: random.Random, n_facts: int) -> list[Fact]:
    """Return facts about different cities, in random order.

    Args:
        n_facts: at most the number of cities.
    """
    return [
        Fact(city, str(FIRST_CODE + generator.randrange(N_CODES)))
        for city in generator.sample(CITIES, n_facts)
    ]


def is_about_a_code(text: str) -> bool:
    """True if a text states or asks for the code of a city."""
    return ABOUT_A_CODE.search(text) is not None
