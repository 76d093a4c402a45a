from __future__ import annotations

import ast
import hashlib
import random
import re
import shutil
import unicodedata

import pytest
from hypothesis import given, settings, strategies as st
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers.pre_tokenizers import ByteLevel

from workflow_scripts.demo.stdlib_chats import make_chats
from workflow_scripts.log import StageError
from workflow_scripts.models import exported_tokenizer, tokenizer_files
from workflow_scripts.quantize import llama_cpp_source

SENTENCEPIECE = ["v1", "v2", "v3", "v7"]
VERSIONS = [*SENTENCEPIECE, "tekken"]
NASTY_TEXTS = [
    *(f"left{' ' * n_spaces}right" for n_spaces in range(1, 41)),
    " ".join(f"a{' ' * n_spaces}" for n_spaces in range(1, 41)) + "z",
    "tab\tand\t\ttabs\t \tmixed",
    "line\n\nlines\r\n  indented\n\n\n    more",
    "def f(x):\n    if x:\n\treturn {1:  2}\n",
    "🎉 emoji 👩‍👩‍👧 joined 🇫🇷 e\u0301 combined",
    "日本語と中文 한국어 and ไทย",
    "▁literal ▁▁ meta▁space ▁",
    "no-break\xa0space, ideographic\u3000space, zero\u200bwidth, \ufeffmark",
    "nul\x00 bell\x07 escape\x1b[0m",
    "rare 𝕏 𓀀 \U0010ffff \ue000",
    "0123456789 1,000.00 1e-5",
    "[ INST ] < s > [INS",
]
pieces = st.sampled_from(list(" \t\n▁é日🎉\x00a1.") + ["  ", "    ", "def", " the"])
texts = (
    st.lists(pieces | st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
    .map(lambda parts: "".join(parts).strip())  # stripped as in cleaning
    .filter(bool)
)
turns = st.tuples(texts, texts)


def messages_of(turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


@pytest.fixture(scope="module", params=VERSIONS)
def renderers(request, exported_tokenizer):
    """Token ids by mistral-common, and by transformers from the exported files."""
    from transformers import AutoTokenizer

    folder = exported_tokenizer(request.param)
    official = tokenizer_files.load_mistral_tokenizer(folder, for_training=True)
    shipped = AutoTokenizer.from_pretrained(folder)

    def by_mistral(messages):
        completion = ChatCompletionRequest.from_openai(messages=messages)
        return official.encode_chat_completion(completion).tokens

    def by_transformers(messages):
        return shipped.apply_chat_template(messages, tokenize=True, return_dict=False)

    by_transformers.tokenizer = shipped
    return by_mistral, by_transformers


def test_exported_files_give_the_official_ids_on_demo_chats(renderers):
    by_mistral, by_transformers = renderers
    chats = [chat["messages"] for chat in make_chats(n_conversations=120, seed=1)]
    roles = {tuple(message["role"] for message in messages) for messages in chats}
    assert {one[0] for one in roles} == {"system", "user"} and max(map(len, roles)) > 3
    for messages in chats:
        assert by_transformers(messages) == by_mistral(messages)


@pytest.mark.parametrize("system", [None, "Be  brief.\n\t▁"])
def test_exported_files_give_the_official_ids_on_difficult_texts(renderers, system):
    by_mistral, by_transformers = renderers
    stripped = [text.strip() for text in NASTY_TEXTS]
    for text in stripped:
        messages = messages_of([(text, text)], system and system.strip())
        assert by_transformers(messages) == by_mistral(messages)
    messages = messages_of(list(zip(stripped, reversed(stripped), strict=True)), system)
    messages[0]["content"] = messages[0]["content"].strip()
    assert by_transformers(messages) == by_mistral(messages)


@given(turns=st.lists(turns, min_size=1, max_size=3), system=st.none() | texts)
@settings(max_examples=60)
def test_exported_files_give_the_official_ids_on_any_text(renderers, turns, system):
    by_mistral, by_transformers = renderers
    messages = messages_of(turns, system)
    assert by_transformers(messages) == by_mistral(messages)


def test_a_rendered_chat_opens_with_one_bos(renderers):
    by_mistral, by_transformers = renderers
    tokenizer = by_transformers.tokenizer
    messages = messages_of([("What?", "That."), ("Why?", "So.")])
    assert by_transformers(messages).count(tokenizer.bos_token_id) == 1
    assert by_transformers(messages)[0] == tokenizer.bos_token_id
    assert by_transformers(messages).count(tokenizer.eos_token_id) == 2
    assert tokenizer("What?").input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_a_question_renders_as_it_does_at_inference(exported_tokenizer, version):
    from transformers import AutoTokenizer

    folder = exported_tokenizer(version)
    official = tokenizer_files.load_mistral_tokenizer(folder, for_training=False)
    shipped = AutoTokenizer.from_pretrained(folder)
    messages = messages_of([("What?", "That.")], "Be brief.") + [
        {"role": "user", "content": "Why?"}
    ]
    completion = ChatCompletionRequest.from_openai(messages=messages)
    expected = official.encode_chat_completion(completion).tokens
    assert shipped.apply_chat_template(messages, tokenize=True, return_dict=False) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_plain_text_has_the_official_ids_and_decodes_to_itself(exported_tokenizer, version):
    from transformers import AutoTokenizer

    folder = exported_tokenizer(version)
    shipped = AutoTokenizer.from_pretrained(folder)
    official = tokenizer_files.load_mistral_tokenizer(folder, for_training=True)
    for text in NASTY_TEXTS:
        if version != "tekken":
            text = text.lstrip("▁")  # tokenizers' Metaspace adds no space before it
        ids = shipped(text, add_special_tokens=False).input_ids
        assert ids == official.instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)
        # SentencePiece cannot decode a literal U+2581: it is its own space.
        assert shipped.decode(ids) == (text if version == "tekken" else text.replace("▁", " "))


@pytest.mark.parametrize(("version", "read"), [("v1", "v1"), ("v3", "v3"), ("v7", "v7")])
def test_the_version_of_a_plain_file_is_found(official_tokenizer, tmp_path, version, read):
    bare = tmp_path / "tokenizer.model"
    shutil.copyfile(official_tokenizer(version), bare)
    assert tokenizer_files.tokenizer_version(bare) == read


@pytest.mark.parametrize("version", SENTENCEPIECE)
def test_a_suffix_decides_the_version(official_tokenizer, tmp_path, version):
    path = tmp_path / f"tokenizer.model.{version}"
    shutil.copyfile(official_tokenizer(version), path)
    assert tokenizer_files.tokenizer_version(path) == version


def test_export_of_a_plain_v1_file_names_its_version(official_tokenizer, tmp_path):
    shutil.copyfile(official_tokenizer("v1"), tmp_path / "tokenizer.model")
    assert exported_tokenizer.export(tmp_path, tmp_path / "tokenizer") == "v1"
    names = {path.name for path in (tmp_path / "tokenizer").iterdir()}
    assert {"tokenizer.model", "tokenizer.model.v1"} < names


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["tokenizer.model"], "tokenizer.model"),
        (["tokenizer.model", "tokenizer.model.v3"], "tokenizer.model.v3"),
        (["tokenizer.model.v1", "tokenizer.model.v3"], "tokenizer.model.v3"),
        (["tekken.json", "tokenizer.json", "tokenizer.model"], "tekken.json"),
        (["tokenizer.model.old", "tokenizer.model"], "tokenizer.model"),
    ],
)
def test_the_tokenizer_file_with_a_version_is_preferred(tmp_path, present, chosen):
    for name in present:
        (tmp_path / name).write_bytes(b"pieces")
    assert tokenizer_files.find_tokenizer(tmp_path).name == chosen


def test_a_checkpoint_without_a_tokenizer_is_a_stage_error(tmp_path):
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(StageError) as caught:
        tokenizer_files.find_tokenizer(tmp_path)
    for part in (str(tmp_path), "found:    tokenizer.json", "tekken.json", "to fix:"):
        assert part in str(caught.value)


@pytest.fixture(scope="module", params=["tekken_240718.json", "tekken_240911.json"])
def tekken(request, official_tokenizer, tmp_path_factory):
    """mistral-common's tokenizer of a tekken file, and ours made from the same file."""
    path = tmp_path_factory.mktemp("tekken") / "tekken.json"
    shutil.copyfile(official_tokenizer("v3").parent / request.param, path)
    assert tokenizer_files.tokenizer_version(path) == "tekken"
    return Tekkenizer.from_file(path), exported_tokenizer.tekken_to_tokenizer(path)


def ours_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_tekken_has_every_token_of_its_file_with_the_same_id(tekken):
    official, ours = tekken
    assert ours.get_vocab_size() == official.n_words
    assert ours.encode("a").ids == [official.bos_id, *official.encode("a", bos=False, eos=False)]
    for token_id in range(official.num_special_tokens):
        assert ours_of(ours, official.id_to_piece(token_id)) == [token_id]


@given(text=texts)
@settings(max_examples=300)
def test_tekken_splits_and_merges_any_text_as_tiktoken_does(tekken, text):
    official, ours = tekken
    assert ours_of(ours, text) == official.encode(text, bos=False, eos=False)
    assert ours.decode(ours_of(ours, text)) == text


@pytest.mark.parametrize("alphabet", ["a", "ab", "aab ", "=-", " \t\n", "e\u0301é", "日本", "xX1"])
def test_tekken_merges_repeated_characters_as_tiktoken_does(tekken, alphabet):
    """If several pairs make the same token, the order of merges decides."""
    official, ours = tekken
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 60)))
        assert ours_of(ours, text) == official.encode(text, bos=False, eos=False), text


def test_tekken_classifies_every_character_as_tiktoken_does(tekken):
    """The split matches letters, marks and numbers, so two Unicode tables must agree."""
    official, ours = tekken
    characters = [
        chr(code)
        for code in range(0x32000)
        # Every sixteenth of long runs of one class (ideographs, syllables, private use).
        if code % 16 == 0 or unicodedata.name(chr(code), "").count("-") == 0
        if not (0xD800 <= code < 0xF900)
        and not unicodedata.name(chr(code), "").startswith("HANGUL")
    ]
    assert len(characters) > 50_000
    for first in range(0, len(characters), 1000):
        block = characters[first : first + 1000]
        text = "".join(f"a{one} {one}1\n" for one in block)
        assert ours_of(ours, text) == official.encode(text, bos=False, eos=False), first


def test_llama_cpp_s_converter_recognizes_tekken(tekken):
    """The converter identifies pre-tokenizers by a hash of one text's ids."""
    _, ours = tekken
    source = (llama_cpp_source.converter().parent / "conversion" / "base.py").read_text("utf-8")
    text = ast.literal_eval(re.search(r"^ *chktxt = (.*)$", source, re.MULTILINE).group(1))
    digest = hashlib.sha256(str(ours.encode(text).ids).encode()).hexdigest()
    recognized = source[source.index(digest) :]
    assert re.search(r'res = "([^"]*)"', recognized).group(1) == "tekken"


def test_byte_characters_match_byte_level_files():
    assert sorted(exported_tokenizer.byte_characters()) == sorted(ByteLevel.alphabet())
    assert exported_tokenizer.byte_characters()[ord(" ")] == "Ġ"
    assert exported_tokenizer.byte_characters()[ord("a")] == "a"


def test_the_requested_version_decides(official_tokenizer, tmp_path):
    shutil.copyfile(official_tokenizer("v2"), tmp_path / "tokenizer.model")
    assert exported_tokenizer.export(tmp_path, tmp_path / "read") == "v3"
    assert exported_tokenizer.export(tmp_path, tmp_path / "told", "v2") == "v2"
    official = tokenizer_files.load_mistral_tokenizer(tmp_path / "told", for_training=True)
    assert official.version.value == "v2"


@pytest.mark.parametrize(
    ("present", "version", "chosen"),
    [
        (["tokenizer.model.v1", "tokenizer.model.v3"], "v1", "tokenizer.model.v1"),
        (["tekken.json", "tokenizer.model"], "v3", "tokenizer.model"),
        (["tekken.json", "tokenizer.model"], "tekken", "tekken.json"),
    ],
)
def test_the_requested_version_chooses_the_file(tmp_path, present, version, chosen):
    for name in present:
        (tmp_path / name).write_bytes(b"pieces")
    assert tokenizer_files.find_tokenizer(tmp_path, version).name == chosen


@pytest.mark.parametrize("version", ["v2", "v3", "v7"])
def test_a_file_without_the_control_tokens_of_the_version_is_refused(
    official_tokenizer, tmp_path, version
):
    shutil.copyfile(official_tokenizer("v1"), tmp_path / "tokenizer.model")
    with pytest.raises(StageError, match="does not fit the requested version") as caught:
        exported_tokenizer.export(tmp_path, tmp_path / "tokenizer", version)
    for part in ("found:    no control token [INST]", version, "models.<name>.tokenizer_version"):
        assert part in str(caught.value)


def test_v7_is_refused_if_its_system_prompt_has_no_token(official_tokenizer, tmp_path):
    shutil.copyfile(official_tokenizer("v3"), tmp_path / "tokenizer.model")
    with pytest.raises(StageError, match=re.escape("no control token [SYSTEM_PROMPT]")):
        exported_tokenizer.export(tmp_path, tmp_path / "tokenizer", "v7")


def test_tekken_is_refused_for_a_sentencepiece_checkpoint(official_tokenizer, tmp_path):
    shutil.copyfile(official_tokenizer("v3"), tmp_path / "tokenizer.model.v3")
    with pytest.raises(StageError, match="no tokenizer that mistral-common reads") as caught:
        exported_tokenizer.export(tmp_path, tmp_path / "tokenizer", "tekken")
    assert "expected: tekken.json" in str(caught.value)
