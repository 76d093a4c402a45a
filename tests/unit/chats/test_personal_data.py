from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from workflow_scripts.chats.personal_data import PLACEHOLDERS, find, redact

# Secrets are assembled here, so that no scanner reports this file as a leak.
RANDOM = "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zAbCdEfGhIjKl"
HEADER, BODY, SIGNATURE = ("eyJ" + RANDOM[:20], "eyJ" + RANDOM[5:30], RANDOM[:30])

EMAILS = [
    "jane.doe@example.com",
    "j_d+lists@mail.uni-bonn.de",
    "SALES@ACME.CO.UK",
    "x@y.io",
    "info@firma.online",
]
PHONES = [
    "+1 415 555 2671",
    "+14155552671",
    "+44 (0)20 7946 0958",
    "+33 1 23 45 67 89",
    "+33.1.23.45.67.89",
    "+49 30 123456",
    "+49-151-23456789",
    "+7 (495) 123-45-67",
    "+86 138 0013 8000",
    "+91 98765 43210",
    "+55 11 91234-5678",
    "(415) 555-2671",
    "415-555-2671",
    "415.555.2671",
    "1-800-555-2671",
    "01 23 45 67 89",
    "01.23.45.67.89",
    "020 7946 0958",
    "07700 900123",
    "0151 23456789",
    "03-1234-5678",
    "(11) 91234-5678",
]
SECRETS = [
    "AKIA" + "IOSFODNN7ABCDEFG",
    "ghp_" + RANDOM[:36],
    "github_pat_" + RANDOM[:22] + "_" + (RANDOM * 2)[:59],
    "glpat-" + RANDOM[:20],
    "xoxb-" + "123456789012-" + RANDOM[:24],
    "AIza" + RANDOM[:35],
    "sk-proj-" + RANDOM,
    "sk-ant-api03-" + RANDOM,
    "hf_" + "abcdefghijklmnopqrSTUVWXYZABCDEFGH",
    "sk_live_" + RANDOM[:24],
    f"{HEADER}.{BODY}.{SIGNATURE}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{RANDOM * 3}\n-----END RSA PRIVATE KEY-----",
]
CARDS = ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "3782 822463 10005"]
IBANS = [
    "DE89 3704 0044 0532 0130 00",
    "GB29NWBK60161331926819",
    "FR14 2004 1010 0505 0001 3M02 606",
    "NO9386011117947",
]
EXAMPLES = {"email": EMAILS, "phone": PHONES, "secret": SECRETS, "card": CARDS, "iban": IBANS}
POSITIVES = [(kind, example) for kind, examples in EXAMPLES.items() for example in examples]

NOTHING = [
    # dates, times, versions, network addresses
    "on 2024-05-17 at 10:30:00, 17.05.2024, 05/17/2024, 01-02-2023 10:30, 2024-05-17 10:30:00.123",
    "Python 3.11.4, CUDA 12.4.131, build 20240517.123456, v1.2.3-rc.4, 1.0.0.0",
    "192.168.100.200:8080, 255.255.255.0, 10.0.0.1/24, fe80::1234:5678, 00:1A:2B:3C:4D:5E",
    # amounts, counts, measures, numbers in programs
    "1 234 567,89 €, $1,234,567.89, 12 345 678, 3.141592653589793, 6.02e23, -1234567890",
    "2147483647, 4294967296, 1234567890123, 0xDEADBEEF12345678, 0b0101 0110, 1_000_000_000",
    "0101 1010 1100, [1, 2, 3, 4, 5, 6, 7, 8], 100 200 300 400 500, +10.50 12.30 44.10",
    "x = 415552671 + 4155552671; y = 1000000-2000000; a[0]-1234567890",
    "order 4155552671, id 9876543210, ISBN 978-3-16-148410-0, DOI 10.1000/182.1234567",
    "page 10-20, 1990-2020, lines 123-456, 2020 2021 2022 2023, 01 02 03 04 05 06 07",
    "rows 1 - 1000000, port 65535, unix 1715940000, timestamp 1715940000000",
    "4111 1111 1111 1112, 1234 5678 9012 3456, 0000 0000 0000 0000",
    "DE88 3704 0044 0532 0130 00, GB29NWBK60161331926818",
    # code with an at sign
    "@app.route('/') and @property, a @ b, W@x.T, X@y.shape, icon@2x.png, lodash@4.17.21",
    "git@github.com:owner/name.git, https://user:password@example.com/path, user@localhost, @jane",
    # text about secrets
    "password = input('Password: '); token = get_token2(); api_key = os.environ['API_KEY_1']",
    "password: your_password_here, token=<token1>, api_key=${API_KEY2}, secret: settings.key2",
    "The token is 128-bit-wide; max_tokens=4096; tokens: 1234567890; use sha256 for passwords",
    "n_tokens = tokenizer.encode(text1); secret_name: my-app-secret-2; token_type: bearer",
    "sk-fading-circle-container-large, sk-learn, risk-assessment-2024-overview-final",
    "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    "-----BEGIN CERTIFICATE-----\nMIID\n-----END CERTIFICATE-----, ghp_short, AKIA, eyJ.eyJ.x",
    "commit 3f786850e387550fdab836ed7e6dc881de23001b, 550e8400-e29b-41d4-a716-446655440000",
]


@pytest.mark.parametrize(("kind", "example"), POSITIVES)
@pytest.mark.parametrize("surroundings", ["{}", "Write to {} today.", "({})", "a: {}, b", "\n{}\n"])
def test_an_example_is_found_whole_in_any_context(kind, example, surroundings):
    text = surroundings.format(example)
    assert [(one.kind, text[one.start : one.end]) for one in find(text)] == [(kind, example)]


@pytest.mark.parametrize("text", NOTHING)
def test_text_that_only_resembles_personal_data_is_not_found(text):
    assert [(one.kind, text[one.start : one.end]) for one in find(text)] == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("password = 'Tr0ub4dor&3x'", "Tr0ub4dor&3x"),
        ('"api_key": "f3a9c81be07d5624"', "f3a9c81be07d5624"),
        ("DB_PASSWORD=Summer2024zq", "Summer2024zq"),
        ("my password is Summer2024zq.", "Summer2024zq"),
        ("secret => 9fQ2xLm47Zpt", "9fQ2xLm47Zpt"),
        (
            "ACCESS_TOKEN: 550e8400-e29b-41d4-a716-446655440000",
            "550e8400-e29b-41d4-a716-446655440000",
        ),
        ("postgres://app:s3cr3tPw9@db:5432/x", "s3cr3tPw9"),
        ("Authorization: Bearer " + RANDOM, RANDOM),
        ("İİ password: Summer2024zq", "Summer2024zq"),
    ],
)
def test_a_secret_is_the_value_without_its_name(text, value):
    assert [(one.kind, text[one.start : one.end]) for one in find(text)] == [("secret", value)]


@pytest.mark.parametrize(
    "called",
    ["Call me at {}", "tel: {}", "Phone number is {}", "Téléphone : {}", "WhatsApp {}", "电话：{}"],
)
def test_any_number_is_a_phone_number_if_the_text_calls_it_one(called):
    number = "4155552671"
    assert find(number) == []
    assert redact(called.format(number)) == (called.format("[PHONE]"), Counter(phone=1))


def test_a_text_is_redacted_in_place_and_counted():
    text = f"I am jane@acme.com, call 415-555-2671 or +33 1 23 45 67 89. Key: {SECRETS[1]}!"
    assert redact(text) == (
        "I am [EMAIL], call [PHONE] or [PHONE]. Key: [SECRET]!",
        Counter(email=1, phone=2, secret=1),
    )


def test_a_text_without_findings_is_the_same_object():
    text = "Nothing here."
    redacted, counts = redact(text)
    assert redacted is text and not counts


pieces = st.lists(
    st.sampled_from([example for _, example in POSITIVES])
    | st.text(st.sampled_from("aZ09 @.:+-_()=/\n\"'"), max_size=12),
    max_size=8,
).map(" ".join)


@given(text=pieces | st.text())
def test_findings_are_ordered_and_do_not_overlap(text):
    findings = find(text)
    assert all(0 <= one.start < one.end <= len(text) for one in findings)
    assert all(one.end <= two.start for one, two in zip(findings, findings[1:], strict=False))


@given(text=pieces | st.text())
def test_redaction_changes_only_the_findings(text):
    redacted, counts = redact(text)
    findings = find(text)
    assert counts == Counter(one.kind for one in findings)
    for one in reversed(findings):
        text = text[: one.start] + PLACEHOLDERS[one.kind] + text[one.end :]
    assert redacted == text


@given(chosen=st.lists(st.sampled_from(POSITIVES), max_size=5))
def test_a_redacted_text_has_nothing_left_to_redact(chosen):
    redacted, _ = redact("; ".join(example for _, example in chosen))
    assert redacted == "; ".join(PLACEHOLDERS[kind] for kind, _ in chosen)
    assert find(redacted) == []


HOSTILE = ["1 ", "a@", "+1", "password=", "A1", "://a:", "-----BEGIN ", "a@b.co "]


@pytest.mark.parametrize("repeated", HOSTILE)
def test_the_time_for_a_hostile_text_is_linear_in_its_length(repeated):
    started = time.process_time()
    find(repeated * 20_000)
    # 0.3 s measured; minutes if a pattern backtracks or findings are compared in quadratic time.
    assert time.process_time() - started < 10
