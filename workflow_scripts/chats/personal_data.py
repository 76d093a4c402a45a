"""Personal data: e-mail addresses, phone and card numbers, IBANs and key-like secrets in a text.

Precision comes first: redacting a version number or a date would damage an answer, so a number
without the shape or the context of a phone number is left alone. Names and postal addresses are not
found, nor phone numbers that look like any other number. Libraries that find more take longer:
phonenumbers' matcher takes 14 ms for a chat of 2.5 KB, detect-secrets 21 ms. This module takes
60 µs if there is nothing to find, because each pattern is tried only if the text contains a string
that all its matches contain.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

PLACEHOLDERS = {
    "secret": "[SECRET]",
    "email": "[EMAIL]",
    "iban": "[IBAN]",
    "card": "[CARD]",
    "phone": "[PHONE]",
}


@dataclass(frozen=True)
class Finding:
    """Personal data at the characters [start, end) of a text."""

    kind: str
    """A key of PLACEHOLDERS."""
    start: int
    end: int


def find(text: str) -> list[Finding]:
    """Return the personal data in a text, in order and without overlaps.

    If two patterns match the same characters, the kind that is first in PLACEHOLDERS wins.
    """
    claims = [("secret", span) for span in _secrets(text)]
    claims += [("email", span) for span in _emails(text)]
    numbers = [match.span() for match in NUMBERS.finditer(text)]
    if numbers:
        claims += [("iban", span) for span in _ibans(text)]
        claims += [("card", span) for span in _cards(text, numbers)]
        claims += [("phone", span) for span in _phones(text, numbers)]
    findings: list[Finding] = []
    taken = bytearray(len(text))
    for kind, (start, end) in claims:
        if taken.find(1, start, end) < 0:
            taken[start:end] = b"\1" * (end - start)
            findings.append(Finding(kind, start, end))
    return sorted(findings, key=lambda finding: finding.start)


def redact(text: str) -> tuple[str, Counter[str]]:
    """Return the text with placeholders for personal data, and the number of each kind."""
    findings = find(text)
    if not findings:
        return text, Counter()
    parts: list[str] = []
    position = 0
    for finding in findings:
        parts += (text[position : finding.start], PLACEHOLDERS[finding.kind])
        position = finding.end
    parts.append(text[position:])
    return "".join(parts), Counter(finding.kind for finding in findings)


# --- secrets ---

# A character that is quick to search for; a string that every match contains; and the pattern, as
# the issuer of the token documents it.
TOKENS = {
    "_": {
        "ghp_": r"ghp_[A-Za-z0-9]{36}",  # GitHub: personal, OAuth, user, server, refresh
        "gho_": r"gho_[A-Za-z0-9]{36}",
        "ghu_": r"ghu_[A-Za-z0-9]{36}",
        "ghs_": r"ghs_[A-Za-z0-9]{36}",
        "ghr_": r"ghr_[A-Za-z0-9]{36,76}",
        "github_pat_": r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
        "hf_": r"hf_[A-Za-z]{34}",  # Hugging Face
        "_live_": r"[sr]k_live_[A-Za-z0-9]{16,}",  # Stripe
        "npm_": r"npm_[A-Za-z0-9]{36}",
    },
    "-": {
        "glpat-": r"glpat-[A-Za-z0-9_-]{20,}",  # GitLab
        "xox": r"xox[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
        "xapp-": r"xapp-[A-Za-z0-9-]{10,}",
        # OpenAI, Anthropic; without a digit or a capital it is a name of many words.
        "sk-": r"sk-(?=[A-Za-z0-9_-]*[0-9])(?=[A-Za-z0-9_-]*[A-Z])[A-Za-z0-9_-]{20,}",
        "pypi-": r"pypi-[A-Za-z0-9_-]{50,}",
    },
    "": {
        "AKIA": r"AKIA[A-Z2-7]{16}",  # AWS access key; the alphabet is base 32
        "ASIA": r"ASIA[A-Z2-7]{16}",  # AWS, temporary
        "AIza": r"AIza[A-Za-z0-9_-]{35}",  # Google
        "ya29.": r"ya29\.[A-Za-z0-9_-]{20,}",
        "eyJ": r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",  # JSON Web Token
        "Bearer ": r"(?<=Bearer )(?=\S*\d)[A-Za-z0-9._~+/-]{20,}=*",
        "hooks.slack.com": r"https://hooks\.slack\.com/services/[A-Z0-9]+/[A-Z0-9]+/[A-Za-z0-9]+",
    },
}
ALONE = r"(?<![A-Za-z0-9_-])TOKEN(?![A-Za-z0-9_-])"
PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"
    r"(?:[^-]|-(?!----))*[A-Za-z0-9+/=]{40}(?:[^-]|-(?!----))*"
    r"-----END (?:[A-Z]+ )*PRIVATE KEY-----"
)
URL_PASSWORD = re.compile(r"://[^\s/:@\"'<>]*:([^\s/:@\"'<>]{3,})@")
# Names that secrets are assigned to, in lower case.
SECRET_NAMES = "password passwd secret token api_key apikey api-key access_key".split()
ASSIGNMENT = re.compile(
    r"[A-Za-z_-]{0,20}[\"'`]?(?:\s{0,3}(?::=|=>|[:=])\s{0,3}|\s+is\s+)[\"'`]?"
    r"([A-Za-z0-9_+/=.!@#^&*~-]{8,200})(?![A-Za-z0-9_+/=.!@#^&*~(\[{<$%-])",
)
# "128-bit-wide", "settings.api_key2" and "gpt-4-2024" are names; "Summer2024" is a secret.
NAME = re.compile(r"[A-Za-z]*\d*(?:[-_./:@][A-Za-z]*\d*)+")
STAND_IN = re.compile(r"(?i)example|your|placeholder|changeme|redacted|dummy|xxx|\*\*\*|1234")
# Bits per character; "password1" has 2.9, a random word of 12 characters in base 64 about 3.5.
LEAST_ENTROPY = 3.0


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    for character, tokens in TOKENS.items():
        if character in text:
            for needle, pattern in tokens.items():
                if needle in text:
                    alone = ALONE.replace("TOKEN", pattern)  # re.finditer compiles it once
                    yield from (match.span() for match in re.finditer(alone, text))
    if "PRIVATE KEY-----" in text:
        yield from (match.span() for match in PRIVATE_KEY.finditer(text))
    if "://" in text and "@" in text:
        for match in URL_PASSWORD.finditer(text):
            if any(map(str.isdigit, match[1])) and not STAND_IN.search(match[1]):
                yield match.span(1)
    yield from _assigned(text)


def _assigned(text: str) -> Iterator[tuple[int, int]]:
    """Yield random-looking values that are assigned to a password, a token or a key."""
    lower = text.lower()
    if len(lower) != len(text):  # İ becomes two characters, and positions would shift
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    for name in SECRET_NAMES:
        at = lower.find(name)
        while at >= 0:
            at += len(name)
            match = ASSIGNMENT.match(text, at)
            if match:
                value = match[1].rstrip(".!")
                if _looks_random(value):
                    yield match.start(1), match.start(1) + len(value)
            at = lower.find(name, at)


def _looks_random(value: str) -> bool:
    if STAND_IN.search(value) or NAME.fullmatch(value):
        return False
    kinds = (str.islower, str.isupper, str.isdigit)
    has_lower, has_upper, has_digit = (any(map(kind, value)) for kind in kinds)
    shares = [n / len(value) for n in Counter(value).values()]
    entropy = -sum(share * math.log2(share) for share in shares)
    return has_digit and (has_lower or has_upper) and entropy >= LEAST_ENTROPY


# --- e-mail addresses ---

LOCAL_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}\Z")
IN_URL = re.compile(r"://[^\s/@]*:\Z")
DOMAIN = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+([A-Za-z]{2,12})(?![\w-])"
)
# All two-letter domains of countries count too. "a@b.shape" is a matrix product, "icon@2x.png" a
# file.
TOP_LEVEL_DOMAINS = frozenset(
    "com org net edu gov mil int info biz name pro aero coop museum app dev cloud online store shop"
    " site tech blog xyz email agency digital company group team world life live news academy"
    " university jobs mobi travel asia berlin london paris nyc swiss bank law".split()
)


def _emails(text: str) -> Iterator[tuple[int, int]]:
    at = text.find("@")
    while at >= 0:
        domain = DOMAIN.match(text, at + 1)
        if domain and (len(domain[1]) == 2 or domain[1].lower() in TOP_LEVEL_DOMAINS):
            local = LOCAL_PART.search(text, max(0, at - 64), at)
            # `git@github.com:owner/name` and `https://user:password@host.com` are not addresses.
            if local and local[0] != "git":
                start = local.start()
                if not IN_URL.search(text, max(0, start - 64), start):
                    yield start, domain.end()
        at = text.find("@", at + 1)


# --- numbers: IBANs, cards, phones ---

# Where such a number may be; the other patterns search only there.
NUMBERS = re.compile(r"\d[\d ().\-\xa0]{5,}\d")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
CARD = re.compile(
    r"(?<![\w.-])(?<!\d )(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{5}|\d{15,16})"
    r"(?![\w-]| ?\d)"
)
# American Express; Visa; Mastercard; Discover, UnionPay.
ISSUERS = re.compile(r"3[47]\d{13}|4\d{15}|5[1-5]\d{14}|2[2-7]\d{14}|6[0245]\d{14}")
PHONES = tuple(
    re.compile(pattern, re.VERBOSE)
    for pattern in (
        # +33 1 23 45 67 89, +44 (0)20 7946 0958, +14155552671
        r"""(?<![\w.+-]) \+[1-9]\d{0,2} (?:[ .\xa0-]?\(\d{1,4}\))? (?:[ .\xa0-]?\d)?
            (?:[ .\xa0-]?\d{2,5}){2,6} (?!\w|[.-]\d)""",
        # (415) 555-2671, 1-800-555-2671, 415.555.2671
        r"""(?<![\w.+/#=$€£-]) (?:1[ .-])? (?:\([2-9]\d\d\)[ ]?|[2-9]\d\d[.-]) [2-9]\d\d[ .-]\d{4}
            (?!\w|[.-]\d)""",
        # 01 23 45 67 89
        r"(?<![\w.+/#=$€£-]) (?<!\d[ ]) 0[1-9]([ .\xa0-])\d\d (?:\1\d\d){3} (?!\w|[ .:-]?\d)",
        # 020 7946 0958, 0151 23456789, 03-1234-5678
        r"""(?<![\w.+/#=$€£-]) (?<!\d[ ]) 0[1-9]\d{0,3}[ -]\d{3,8} (?:[ -]\d{3,5})?
            (?!\w|[ .:-]?\d)""",
        # (020) 7946 0958, (11) 91234-5678
        r"(?<![\w.]) \(\d{2,5}\)[ ]?\d{3,5}[ -]\d{3,4} (?:[ -]\d{2,4})? (?!\w|[ .-]?\d)",
    )
)
# After "call me at" or "Tel.:", any number as long as a phone number is one.
CALLED = re.compile(
    r"(?<![a-z])(?:(?:tele|cell)?[ -]?phone|tel|t[eé]l[eé]phone|telefon\w*|tel[eé]fono|mobile?"
    r"|m[oó]vil|celular|cellulare|handy|fax|whatsapp|sms|(?:call|text|ring)(?: me| us)"
    r"|телефон|電話|电话|手机)"
    r"\W{0,3}(?:(?:number|no|nr|is|at|on|num[eé]ro|número|nummer)\b\W{0,3}){0,3}\Z",
    re.IGNORECASE,
)
CALLED_NUMBER = re.compile(r"\d(?:[ .()\xa0-]{0,2}\d){6,14}(?!\w)")


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in IBAN.finditer(text):
        start, end = match.span()
        while end - start >= 15:  # Norway's; none is shorter
            compact = text[start:end].replace(" ", "")
            moved = compact[4:] + compact[:4]
            if int("".join(str(int(character, 36)) for character in moved)) % 97 == 1:  # ISO 7064
                yield start, end
                break
            end = text.rfind(" ", start, end)  # its end may be a word in capitals that follows


def _cards(text: str, numbers: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in numbers:
        for match in CARD.finditer(text, start, end + 2):
            digits = re.sub(r"\D", "", match[0])
            if ISSUERS.fullmatch(digits) and _luhn(digits):
                yield match.span()


def _luhn(digits: str) -> bool:
    """True if the last digit is the checksum of the others (ISO/IEC 7812-1)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _phones(text: str, numbers: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in numbers:
        before = max(0, start - 2)  # "+(" may precede the digits
        for pattern in PHONES:
            for match in pattern.finditer(text, before, end + 2):
                if _is_phone(match[0]):
                    yield match.span()
        if CALLED.search(text, max(0, start - 40), start):
            called = CALLED_NUMBER.match(text, start, end + 2)
            if called:
                yield called.span()


def _is_phone(number: str) -> bool:
    digits = re.sub(r"\D", "", number)
    if not (8 if number.startswith("+") else 9) <= len(digits) <= 15:
        return False
    if set(digits) <= set("01") or re.match(r"\d\d-\d\d-\d{4}", number):
        return False  # binary digits; a date and an hour
    # A number has points between all its groups or none: "+10.50 12.30" are amounts.
    return "." not in number or not set(number) & set(" -\xa0")
