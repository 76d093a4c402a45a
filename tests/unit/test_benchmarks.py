"""What the benchmarks stand on: chats with the statistics of real ones, and an honest meter."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks import measured_command, synthetic_chats
from workflow_scripts.log import StageError

MB = 1_000_000
ranks = st.integers(0, 10**12)


@pytest.fixture(scope="module")
def lines() -> list[tuple[str, str]]:
    return list(synthetic_chats.chat_lines(n_conversations=2_000, seed=3))


def test_chats_do_not_depend_on_the_number_of_processes(lines):
    spread = synthetic_chats.chat_lines(n_conversations=1_500, seed=3, n_processes=2)
    assert list(spread) == lines[:1_500]  # and a smaller file is the beginning of a larger one


def test_another_seed_makes_other_chats(lines):
    others = synthetic_chats.chat_lines(n_conversations=100, seed=4)
    assert not {line for line, _ in others} & {line for line, _ in lines}


def test_words_of_whole_chats_keep_growing_and_are_counted_right(lines, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(line + "\n" for line, _ in lines), encoding="utf-8")
    measured = synthetic_chats.measure(path)
    assert 0.6 < measured["heaps_exponent"] < 0.75
    texts = [message["content"] for line, _ in lines for message in json.loads(line)["messages"]]
    words = " ".join(texts).split()
    assert measured["growth"][-1] == {
        "n_conversations": 2_000,
        "n_bytes": path.stat().st_size,
        "n_words": len(words),
        "n_distinct_words": len(set(words)),
    }


@pytest.mark.parametrize("language", sorted(synthetic_chats.ALPHABETS))
def test_the_vocabulary_grows_by_heaps_law_with_an_exponent_of_0_6_to_0_7(language):
    words = synthetic_chats.draw_words(language, 1_000_000, np.random.default_rng(5))
    n_distinct = [len(set(words[:n_words])) for n_words in (100_000, 1_000_000)]
    assert 0.6 < math.log10(n_distinct[1] / n_distinct[0]) < 0.7


def test_a_conversation_has_about_600_tokens(lines, official_tokenizer):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.from_file(
        str(official_tokenizer("v3")), mode=ValidationMode.finetuning
    )
    n_tokens = [
        len(
            tokenizer.encode_chat_completion(
                ChatCompletionRequest.from_openai(**json.loads(line))
            ).tokens
        )
        for line, _ in lines[:600]
    ]
    assert 500 < statistics.mean(n_tokens) < 700


def test_a_copy_is_of_an_earlier_original(lines):
    originals: set[str] = set()
    n_copies = {"exact": 0, "near": 0}
    for line, kind in lines:
        if kind == "original":
            assert line not in originals
            originals.add(line)
        else:
            assert (line in originals) == (kind == "exact")
            n_copies[kind] += 1
    assert all(5 < count < 40 for count in n_copies.values())  # 20 expected, deviation 4.5


@given(seed=st.integers(0, 10**6))
def test_a_near_copy_differs_in_two_to_five_percent_of_its_words(lines, seed):
    generator = random.Random(seed)
    line = generator.choice(lines)[0]
    copy = synthetic_chats.near_copy(line, generator)

    def words(text: str) -> list[str]:
        return [
            word
            for message in json.loads(text)["messages"]
            for word in message["content"].split(" ")
        ]

    pairs = list(zip(words(line), words(copy), strict=True))
    n_changed = sum(before != after for before, after in pairs)
    assert min(1, 0.02 * len(pairs) - 0.5) <= n_changed <= max(1, 0.05 * len(pairs) + 0.5)
    assert n_changed > 0


@pytest.mark.parametrize("language", sorted(synthetic_chats.ALPHABETS))
def test_no_two_ranks_spell_the_same_word(language):
    # The first three-syllable words lie above 10,000 to 200,000 ranks; both lengths are covered.
    sample = range(0, 400_000)
    assert len({synthetic_chats.spell(rank, language) for rank in sample}) == len(sample)


@given(first=ranks, second=ranks)
def test_far_ranks_spell_different_words(first, second):
    words = [synthetic_chats.spell(rank, "latin") for rank in (first, second)]
    assert (words[0] == words[1]) == (first == second)


FILL = "held = bytearray(b'1') * 150_000_000"  # written, so that every page is there


def test_memory_is_summed_over_the_processes_of_a_command():
    child = f"import time; {FILL}; time.sleep(1.5)"
    code = (
        f"import subprocess, sys; commands = [[sys.executable, '-c', {child!r}]] * 2;"
        "[process.wait() for process in [*map(subprocess.Popen, commands)]]"
    )
    measured = measured_command.measure([sys.executable, "-c", code])
    assert 300 * MB < measured.peak_memory_bytes < 360 * MB
    assert 300 * MB < measured.peak_anonymous_memory_bytes <= measured.peak_memory_bytes
    assert 150 * MB < measured.peak_process_memory_bytes < 180 * MB
    assert measured.duration_seconds > 1.5


def test_memory_that_processes_share_is_counted_once():
    code = f"import os, time; {FILL}; os.fork() and os.wait(); time.sleep(1.5)"
    measured = measured_command.measure([sys.executable, "-c", code])
    assert 150 * MB < measured.peak_memory_bytes < 180 * MB


def test_a_short_peak_of_one_process_is_not_missed():
    code = f"import time; {FILL}; del held; time.sleep(1)"
    measured = measured_command.measure([sys.executable, "-c", code])
    assert 150 * MB < measured.peak_process_memory_bytes < 180 * MB


def test_processor_time_of_child_processes_counts():
    child = "import time\nwhile time.process_time() < 0.5: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert measured_command.measure([sys.executable, "-c", code]).processor_seconds >= 0.5


def test_a_failing_command_is_an_error_that_shows_its_last_lines(tmp_path):
    code = "import sys; print('half way'); sys.exit(3)"
    with pytest.raises(StageError, match=r"(?s)exit code 3.*half way"):
        measured_command.measure([sys.executable, "-c", code], log_file=tmp_path / "log")
