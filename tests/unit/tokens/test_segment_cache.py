from __future__ import annotations

import itertools
import random
import re
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sentencepiece import sentencepiece_model_pb2

from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.tokens import segment_cache
from workflow_scripts.tokens.segment_cache import SegmentCache, TextEncoder

VERSIONS = ["v1", "v2", "v3", "v7", "tekken"]
# Unicode's White_Space, matched by \s in tekken's split.
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
# White space in Python only, and characters that look like a space but are not.
NEARLY_SPACE = "\x1c\x1d\x1e\x1f\u180e\u200b\ufeff\u2060"
CONTROL = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "<0x0A>", "<unk>", "[REF]"]
PIECES = [
    *WHITE_SPACE,
    *NEARLY_SPACE,
    *("  ", "    ", "\n\n", "\r\n", " \n", "\n  ", "\n\t", "\n/", "/\n", ".\n", ")\n\n", " ."),
    *"aBéÉ日本ʰǅ1٣.,;/\\!?-_'\"({[]})🎉\u0301▁\x00\u200d",
    *("the", "Word", "http://a/b", "...", "//", "n't", "123"),
    *CONTROL,
]
texts = st.lists(
    st.sampled_from([" ", "\n", "a", "."]) | st.sampled_from(PIECES) | st.characters(codec="utf-8"),
    max_size=25,
).map("".join)


@pytest.fixture(scope="module", params=VERSIONS)
def tokenizer(request, exported_tokenizer):
    folder = exported_tokenizer(request.param)
    return load_mistral_tokenizer(folder, for_training=True).instruct_tokenizer.tokenizer


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return TextEncoder(tokenizer)


def ids(encoded):
    return np.frombuffer(encoded, dtype=np.int32).tolist()


def test_every_official_tokenizer_is_cut(encoder):
    assert encoder.uses_cache


@given(text=texts)
@settings(max_examples=300)
def test_cutting_a_text_does_not_change_its_ids(encoder, tokenizer, text):
    assert ids(encoder.encode(text)) == tokenizer.encode(text, bos=False, eos=False)


def test_cutting_white_space_and_marks_does_not_change_the_ids(encoder, tokenizer):
    rng = random.Random(0)
    for _ in range(10_000):
        share = rng.random()
        text = "".join(
            rng.choice(" \n") if rng.random() < share / 2 else rng.choice(PIECES)
            for _ in range(rng.randrange(25))
        )
        assert ids(encoder.encode(text)) == tokenizer.encode(text, bos=False, eos=False), text


@given(text=texts)
@settings(max_examples=300)
def test_segments_join_to_the_text(text):
    assert "".join(segment_cache.TEKKEN_SEGMENT.findall(text)) == text
    assert "".join(segment_cache.SENTENCEPIECE_SEGMENT.findall(" " + text)) == " " + text


def test_prose_and_code_are_cut_at_every_word():
    text = "Why?\n\nSay it (here).\n    return {1: 2}\nDone."
    assert segment_cache.TEKKEN_SEGMENT.findall(text) == [
        *("Why?\n\n", "Say", " it", " (here).\n"),
        *("    return", " {1:", " 2}\n", "Done."),
    ]
    assert segment_cache.SENTENCEPIECE_SEGMENT.findall(" " + text) == [
        *(" Why?", "\n\nSay", " it", " (here).", "\n", "    return", " {1:", " 2}", "\nDone."),
    ]


def test_python_matches_all_of_unicodes_white_space():
    of_python = {chr(code) for code in range(sys.maxunicode + 1) if re.match(r"\s", chr(code))}
    assert of_python - set(WHITE_SPACE) == set("\x1c\x1d\x1e\x1f")
    assert set(WHITE_SPACE) < of_python


def test_another_split_of_tekken_is_not_cut(exported_tokenizer, tmp_path):
    folder = exported_tokenizer("tekken")
    path = tmp_path / "tekken.json"
    text = (folder / "tekken.json").read_text(encoding="utf-8")
    changed = text.replace(r"|\\p{N}|", r"|\\p{N}{1,3}|")
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    tokenizer = load_mistral_tokenizer(tmp_path, for_training=True).instruct_tokenizer.tokenizer
    encoder = TextEncoder(tokenizer)
    assert not encoder.uses_cache
    text = "In 1969,  at 20:17.\n"
    assert ids(encoder.encode(text)) == tokenizer.encode(text, bos=False, eos=False)


def spanning_piece(model, text):
    model.pieces[20_000].piece = text


def normalizing(model, name):
    setattr(model.normalizer_spec, name, not getattr(model.normalizer_spec, name))


@pytest.mark.parametrize(
    ("change", "value"),
    [
        (spanning_piece, "a▁b"),
        (spanning_piece, "▁▁a▁"),
        (spanning_piece, "a\n"),
        (normalizing, "add_dummy_prefix"),
        (normalizing, "remove_extra_whitespaces"),
    ],
)
def test_a_sentencepiece_file_that_could_merge_across_a_cut_is_not_cut(
    exported_tokenizer, tmp_path, change, value
):
    path = tmp_path / "tokenizer.model.v3"
    original = exported_tokenizer("v3") / path.name
    model = sentencepiece_model_pb2.ModelProto.FromString(original.read_bytes())
    shutil.copyfile(original, path)
    assert TextEncoder(load(tmp_path)).uses_cache
    change(model, value)
    path.write_bytes(model.SerializeToString())
    tokenizer = load(tmp_path)
    encoder = TextEncoder(tokenizer)
    assert not encoder.uses_cache
    text = "one  two\nthree"
    assert ids(encoder.encode(text)) == tokenizer.encode(text, bos=False, eos=False)


def load(folder):
    return load_mistral_tokenizer(folder, for_training=True).instruct_tokenizer.tokenizer


segments_of_two_letters = st.lists(st.text(alphabet="ab", max_size=3))


@given(texts=st.lists(segments_of_two_letters, max_size=5), max_segments=st.integers(2, 6))
def test_a_cache_respects_its_limit_and_returns_correct_ids(texts, max_segments):
    asked = []

    def encode(segments):
        asked.extend(segments)
        return [segment.encode() for segment in segments]

    cache = SegmentCache(encode, max_segments=max_segments)
    for at in range(len(texts)):
        expected = [[segment.encode() for segment in text] for text in texts[at : at + 2]]
        assert cache.look_up(texts[at : at + 2]) == expected
        assert len(cache) <= max_segments
    if len(set(itertools.chain(*texts))) <= max_segments // 2:
        assert len(asked) == len(set(asked)), "each once"


def test_segments_in_use_stay_in_the_cache():
    asked = []

    def encode(segments):
        asked.extend(segments)
        return [b""] * len(segments)

    cache = SegmentCache(encode, max_segments=8)
    for number in range(100):
        cache.look_up([["common", f"rare {number}"]])
    assert asked.count("common") == 1


@given(st.lists(texts, max_size=6))
@settings(max_examples=200)
def test_texts_encoded_together_have_the_ids_of_each(encoder, tokenizer, texts):
    assert [ids(encoded) for encoded in encoder.encode_all(texts)] == [
        tokenizer.encode(text, bos=False, eos=False) for text in texts
    ]


def test_a_long_segment_is_not_kept(tokenizer):
    encoder = TextEncoder(tokenizer)
    encoder.encode("a" * 10_000 + " word")
    assert max(map(len, encoder._cache._newer)) <= segment_cache.MAX_SEGMENT_CHARACTERS


@pytest.mark.parametrize("max_segments", [2, 7])
def test_a_small_cache_gives_the_same_ids(tokenizer, max_segments):
    encoder = TextEncoder(tokenizer, max_segments=max_segments)
    rng = random.Random(1)
    for _ in range(300):
        text = " ".join(rng.choices(PIECES, k=20))
        assert ids(encoder.encode(text)) == tokenizer.encode(text, bos=False, eos=False)
