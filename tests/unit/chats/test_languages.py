from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from workflow_scripts.chats.languages import identify, known

CHATS = {
    "en": "How do I boil an egg so that the yolk stays soft? Put it in boiling water for six "
    "minutes.",
    "fr": "Comment cuire un œuf pour que le jaune reste coulant ? Plongez-le six minutes dans "
    "l'eau bouillante.",
    "de": "Wie koche ich ein Ei, damit das Gelbe weich bleibt? Lege es sechs Minuten in kochendes "
    "Wasser.",
    "es": "¿Cómo cuezo un huevo para que la yema quede blanda? Déjalo seis minutos en agua "
    "hirviendo.",
    "it": "Come si cuoce un uovo perché il tuorlo resti morbido? Mettilo sei minuti nell'acqua "
    "bollente.",
    "pt": "Como cozinhar um ovo para que a gema fique mole? Coloque-o seis minutos em água a "
    "ferver.",
    "nl": "Hoe kook ik een ei zodat de dooier zacht blijft? Leg het zes minuten in kokend water.",
    "pl": "Jak ugotować jajko, żeby żółtko było miękkie? Włóż je na sześć minut do wrzątku.",
    "ru": "Как сварить яйцо, чтобы желток остался мягким? Опустите его на шесть минут в кипяток.",
    "ar": "كيف أسلق بيضة بحيث يبقى الصفار طريا؟ ضعها في ماء مغلي لمدة ست دقائق.",
    "zh": "怎样煮鸡蛋才能让蛋黄保持软嫩?把鸡蛋放进沸水里煮六分钟就可以了。",
    "ja": "黄身を柔らかくするには卵をどう茹でればいいですか。お湯に六分入れてください。",
    "ko": "노른자를 부드럽게 하려면 달걀을 어떻게 삶아야 하나요? 끓는 물에 육 분 동안 넣으세요.",
    "hi": "अंडे को कैसे उबालें कि जर्दी नरम रहे? इसे छह मिनट तक उबलते पानी में रखें।",
}


@pytest.mark.parametrize("language", CHATS)
def test_a_short_chat_is_identified_with_certainty(language):
    code, probability = identify(CHATS[language])
    assert code == language
    assert probability > 0.9


@pytest.mark.parametrize("language", ["fr", "de", "ru"])
def test_code_between_fences_is_ignored(language):
    code = "```python\nfor line in open(path):\n    if the.word in line: print(line, end='')\n```\n"
    assert identify(code * 5 + CHATS[language])[0] == language
    assert identify(CHATS[language] + "\n```" + code)[0] == language


@pytest.mark.parametrize("text", ["", " ", "12345", "👍", "```\n```", "\ud800"])
def test_a_text_without_words_has_no_probable_language(text):
    code, probability = identify(text)
    assert code in known()
    assert probability < 0.5


@settings(deadline=None)
@given(tail=st.text(max_size=200))
def test_only_the_beginning_counts(tail):
    beginning = CHATS["en"] * 4
    assert identify(beginning + tail.replace("`", "")) == identify(beginning)


@settings(deadline=None)
@given(text=st.text())
def test_the_result_is_a_known_code_of_two_letters_and_a_probability(text):
    code, probability = identify(text)
    assert code in known() and len(code) == 2
    assert 0 < probability <= 1.0 + 1e-6


def test_common_languages_are_known_by_their_two_letter_codes():
    assert {"en", "fr", "de", "es", "it", "pt", "zh", "ja", "no"} <= known()
    assert "eng" not in known()
