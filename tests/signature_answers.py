"""Judges answers to the demo's questions for a signature.

An answer is right if it gives the parameters of `inspect.signature` in the same order, with equal
names, kinds and defaults. It may leave out annotations, but one that it gives must be right.
"""

from __future__ import annotations

import re

from workflow_scripts.demo import signatures, stdlib_questions

SIGNATURE_QUESTION = re.compile(
    "|".join(
        re.escape(wording).replace(r"\{name\}", r"([\w.]+)")
        for wording in stdlib_questions.SIGNATURE
    )
)


def asked_signature(question: str) -> str | None:
    """Return the object whose signature a user's message of the demo asks for; None if it does not
    ask for a signature."""
    found = SIGNATURE_QUESTION.search(question)
    return found[found.lastindex] if found and found.lastindex else None


def find(answer: str, name: str) -> signatures.ParsedSignature | None:
    """Return the first signature that an answer gives for an object; None if there is none.

    Args:
        answer: any text, with or without code.
        name: qualified name; its last part must precede the parentheses.
    """
    called = re.compile(rf"(?<!\w){re.escape(name.rpartition('.')[2])}\(")
    for match in called.finditer(answer):
        opens = match.end() - 1
        for closing in re.finditer(r"\)", answer[opens:]):
            end = opens + closing.end()
            found = signatures.parse(answer[opens:end])
            if found is None:
                continue
            returns = re.match(r" -> ([^`\n]+?)(?=[`:\n]|\.?$)", answer[end:])
            return (returns and signatures.parse(answer[opens : end + returns.end()])) or found
    return None


def is_right(answer: str, name: str) -> bool:
    """True if an answer gives an object's signature as `inspect.signature` does.

    Raises:
        ValueError: the object has no signature to compare with.
    """
    wanted = signatures.of_object(name)
    if wanted is None:
        raise ValueError(f"{name}: inspect.signature gives nothing to compare with")
    found = find(answer, name)
    return found is not None and agree(found, wanted)


def agree(found: signatures.ParsedSignature, wanted: signatures.ParsedSignature) -> bool:
    """True if a signature equals the wanted one; it may leave out annotations."""
    if [parameter[:3] for parameter in found.parameters] != [
        parameter[:3] for parameter in wanted.parameters
    ]:
        return False
    pairs = zip(found.parameters, wanted.parameters, strict=True)
    given = [(parameter.annotation, right.annotation) for parameter, right in pairs]
    return all(
        annotation in (None, right)
        for annotation, right in [*given, (found.returns, wanted.returns)]
    )
