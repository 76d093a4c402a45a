"""Languages of texts, identified by py3langid, whose package contains its model.

It was right on 99.7 % of 1664 texts of ~140 characters in 16 languages (translated strings of
Django), and on 93 % of 1920 texts of ~45. On the same texts fastText's small model was right on
99.5 % and 94 % in a tenth of the time, but its packages compile C++ or download models; lingua was
right on 99.5 % and 94 %, in ten times the time and with 100 MB of models.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from workflow_scripts.log import StageError

# More characters changed no verdict on the texts above, and take longer.
READ_CHARACTERS = 300
CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


def identify(text: str) -> tuple[str, float]:
    """Return the language of a text's beginning, as its ISO 639-1 code, and its probability.

    Code between fences is skipped, unless there is nothing else. A text without words also gets a
    language, with a probability of a few hundredths: do not trust a probability below 0.5.
    """
    prose = CODE.sub(" ", text).strip() or text
    language, probability = _identifier().classify(prose[:READ_CHARACTERS])
    return language, float(probability)


def known() -> frozenset[str]:
    """Return the codes that `identify` can return; Norwegian is `no` (bokmål) or `nn`."""
    return frozenset(_identifier().nb_classes)


def check_known(codes: Sequence[str]) -> None:
    """
    Raises:
        StageError: a code is unknown. It would reject every conversation.
    """
    unknown = sorted(set(codes) - known()) if codes else []
    if unknown:
        raise StageError(
            "a language is unknown",
            where="datasets.<name>.cleaning.languages",
            found=", ".join(unknown),
            expected=f"ISO 639-1 codes: {' '.join(sorted(known()))}",
        )


@functools.cache
def _identifier() -> LanguageIdentifier:
    """Load the model once per process, because that takes a second."""
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    # Longer codes include small relatives of large languages, such as Nigerian Pidgin and English.
    identifier.set_languages([code for code in identifier.labels if len(code) == 2])
    return identifier
