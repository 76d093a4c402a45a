from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, strategies as st

from workflow_scripts.demo import recall
from workflow_scripts.demo.recall import CITIES


@given(seed=st.integers(0, 2**32), n_facts=st.integers(0, len(CITIES)))
def test_facts_have_different_cities_and_codes_of_four_digits(seed, n_facts):
    facts = recall.draw_facts(random.Random(seed), n_facts)
    assert len({fact.city for fact in facts}) == len(facts) == n_facts
    assert all(1000 <= int(fact.code) <= 9999 for fact in facts)
    assert facts == recall.draw_facts(random.Random(seed), n_facts)


def test_every_code_is_equally_likely():
    generator = random.Random(0)
    codes = {recall.draw_facts(generator, 1)[0].code for _ in range(100_000)}
    # Each of 9,000 codes is missing with probability e^−11: 0.15 missing codes are expected.
    assert len(codes) >= 8_995
    assert math.exp(recall.CHANCE_NATS) == pytest.approx(9000)


@pytest.mark.parametrize("text", ["The code of Oslo is 1234.", "… \n the code of Lima?"])
def test_a_text_about_a_code_is_recognized(text):
    assert recall.is_about_a_code(text)


@pytest.mark.parametrize("text", ["", "The code of a city.", "Oslo", "decode of Oslova"])
def test_another_text_is_not_about_a_code(text):
    assert not recall.is_about_a_code(text)
