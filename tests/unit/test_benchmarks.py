"""What the benchmarks stand on: chats with the statistics of real ones, honest meters, and
references and contestants that do what they say."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks import (
    document_lengths,
    machine,
    measured_command,
    packed_training_table,
    packing_plans,
    packing_plans_table,
    synthetic_chats,
    training_contestants,
    training_documents,
)
from tests.benchmarks.model_shapes import CONFIGS
from tests.benchmarks.segment_tree import Spaces, best_fit_decreasing
from workflow_scripts import files
from workflow_scripts.data import packing
from workflow_scripts.data.documents import Documents
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


def test_lengths_are_the_mix_that_is_stated():
    lengths = document_lengths.chat_lengths(200_000, seed=1)
    assert np.array_equal(lengths, document_lengths.chat_lengths(200_000, seed=1))
    assert lengths.min() == document_lengths.SHORTEST
    assert lengths.max() == document_lengths.LONGEST

    def below(tokens: float) -> float:
        return sum(
            part.fraction * statistics.NormalDist().cdf(math.log(tokens / part.median) / part.sigma)
            for part in document_lengths.MIX
        )

    for name, quantile in document_lengths.summary(lengths)["quantiles"].items():
        if quantile < document_lengths.LONGEST:
            assert below(quantile) == pytest.approx(float(name), abs=0.003)


@given(spaces=st.lists(st.integers(1, 12), max_size=60), length=st.integers(1, 12))
def test_the_tree_finds_the_smallest_space_that_is_large_enough(spaces, length):
    tree, present = Spaces(12), set()
    for space in spaces:  # there at first, gone at the second time
        if space in present:
            tree.remove(space)
        else:
            tree.add(space)
        present ^= {space}
        expected = min((other for other in present if other >= length), default=0)
        assert tree.tightest(length) == expected


lengths_to_pack = st.lists(st.integers(1, 50), min_size=1, max_size=120)


@given(lengths=lengths_to_pack, row_tokens=st.integers(50, 90))
def test_the_reference_packs_as_trying_every_row_does(lengths, row_tokens):
    row_of_document, n_rows = best_fit_decreasing(np.array(lengths), row_tokens=row_tokens)
    fill: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(fill)) if fill[row] + length <= row_tokens]
        if fitting:
            fill[max(fitting, key=fill.__getitem__)] += length
        else:
            fill.append(length)
    found = np.bincount(row_of_document, weights=lengths, minlength=n_rows)
    assert sorted(found) == sorted(fill)


@pytest.mark.parametrize("row_tokens", [4_096, 32_768])
def test_our_best_fit_fills_as_many_rows_as_the_published_one(row_tokens):
    lengths = np.minimum(document_lengths.chat_lengths(20_000, seed=2), row_tokens)
    ours = packing.best_fit(packing.Pieces.whole(lengths), row_tokens=row_tokens, seed=0)
    assert len(ours) == best_fit_decreasing(lengths, row_tokens=row_tokens)[1]


@given(values=st.lists(st.integers(0, 20), min_size=2, max_size=50).filter(lambda v: len({*v}) > 1))
def test_spearman_is_the_correlation_of_ranks(values):
    def rank(value: int) -> float:
        return sum(v < value for v in values) + (values.count(value) + 1) / 2

    expected = statistics.correlation([rank(value) for value in values], range(len(values)))
    assert packing_plans.spearman(np.array(values)) == pytest.approx(expected, abs=1e-9)


def test_the_tokens_that_trl_packs_have_the_lengths_that_we_plan(tmp_path):
    from datasets import Dataset

    lengths = document_lengths.chat_lengths(packing_plans.DOCUMENTS_A_BATCH + 5, seed=3)
    packing_plans.write_tokens(tmp_path / "tokens" / "documents.arrow", lengths)
    documents = Dataset.from_file(str(tmp_path / "tokens" / "documents.arrow"))
    assert [len(document) for document in documents["input_ids"]] == lengths.tolist()


def test_a_benchmark_of_packing_measures_what_its_table_shows(tmp_path, capsys):
    result = tmp_path / "result.json"
    packing_plans.main(
        ["--case", "3000", "4096", "--balance-documents", "30000", "--repetitions", "1"]
        + ["--scratch", str(tmp_path), "--result", str(result)]
    )
    found = files.read_json(result)
    (case,) = found["cases"]
    lengths = document_lengths.chat_lengths(3_000, seed=packing_plans.SEED).clip(max=4_096)
    rows = packing.best_fit(packing.Pieces.whole(lengths), row_tokens=4_096, seed=0)
    fill = int(lengths.sum()) / (4_096 * len(rows))
    for (run,) in case["contestants"].values():
        assert run["n_rows"] == len(rows)
        assert run["fill_fraction"] == pytest.approx(fill)
        assert 20 * MB < run["peak_memory_bytes"] < 200 * MB
        assert 0 < run["call_duration_seconds"] < run["process"]["duration_seconds"]
    for window in found["balance"]["windows"]:
        assert window["balanced"]["mean_step_imbalance"] < 1.01
        assert window["random"]["mean_step_imbalance"] > 1.05
    text = capsys.readouterr().out
    assert text.strip() == packing_plans_table.table(found)
    assert f"| tramontane | {len(rows):,} | {fill:.3%} |" in text


def test_a_package_that_is_not_in_the_folder_is_named(tmp_path):
    with pytest.raises(StageError, match="trl is not installed there"):
        machine.version_in(tmp_path, "trl")


@pytest.mark.parametrize("length", [1, 4, 599, 600, 601, 5_000])
def test_every_turn_ends_with_its_answer(length):
    spans = training_documents.supervised_spans(length)
    assert len(spans) == math.ceil(length / training_documents.TURN_TOKENS)
    assert spans[-1][1] == length
    bounds = [bound for span in spans for bound in span]
    assert bounds == sorted(set(bounds))
    if length > 2:
        assert spans[0][0] > 0  # nothing predicts BOS


@pytest.fixture(scope="module")
def toy_documents(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "documents.arrow"
    training_documents.write_documents(
        path, n_documents=40, length_fraction=0.05, longest=128, vocabulary_size=512, seed=0
    )
    return path


def test_training_documents_are_what_their_columns_say(toy_documents):
    documents = Documents(toy_documents)
    assert len({*documents.lengths.tolist()}) > 10 and documents.lengths.max() <= 128
    for document, length, n_supervised in zip(
        documents, documents.lengths, documents.n_supervised, strict=True
    ):
        assert document.input_ids[0] == training_documents.BOS
        assert len(document.input_ids) == length
        assert document.is_supervised.sum() == n_supervised > 0


def test_a_random_model_is_in_every_part_what_loading_a_checkpoint_gives(tmp_path):
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from tests.benchmarks.random_models import random_nf4_model
    from workflow_scripts.models.checkpoint import default_device, load_model

    config = CONFIGS["toy"]
    MistralForCausalLM(MistralConfig(**config)).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, window=config["sliding_window"], precision="nf4")
    made = random_nf4_model(config, attention="sdpa", place=default_device(), seed=0)

    def parts(model: MistralForCausalLM) -> list[object]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        quantized = [getattr(tensor, "quant_state", None) for _, tensor in tensors]
        return [
            [(name, type(module)) for name, module in model.named_modules()],
            [
                (
                    name,
                    type(tensor),
                    tensor.dtype,
                    tensor.shape,
                    tensor.device,
                    tensor.requires_grad,
                )
                for name, tensor in tensors
            ],
            [
                (state.quant_type, state.nested, state.dtype, state.shape) if state else None
                for state in quantized
            ],
            [getattr(module, "support_avx512bf16_for_cpu", None) for module in model.modules()],
            [model.is_loaded_in_4bit, model.is_quantized, model.training],
            {key: value for key, value in model.config.to_dict().items() if key[0] != "_"},
        ]

    assert parts(made) == parts(loaded)
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, dict(made.named_buffers())[name])
    weights = made.model.embed_tokens.weight.float()
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.fixture(scope="module")
def toy_runs(toy_documents, tmp_path_factory) -> dict[str, dict]:
    """What each of our contestants measures on the toy; TRL is in no lock file of ours."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for name in training_contestants.OURS:
        training_contestants.main(
            ["--contestant", name, "--shape", "toy", "--documents", str(toy_documents)]
            + ["--row-tokens", "128", "--rows", "2", "--warm-up-steps", "1"]
            + ["--gradient-checkpointing", "--scratch", str(folder / name)]
            + ["--measured", str(folder / f"{name}.json")]
        )
        runs[name] = files.read_json(folder / f"{name}.json")
    return runs


def test_contestants_train_on_the_same_documents(toy_runs, toy_documents):
    n_tokens = int(Documents(toy_documents).lengths.sum())
    for name, run in toy_runs.items():
        # All but the tokens of the first step, which warms up.
        assert n_tokens - 256 <= run["n_tokens_measured"] < n_tokens, name
        assert run["n_steps_measured"] == run["n_steps"] - 1
        assert run["smallest_gradient_norm"] > 0
        assert run["tokens_per_second"] > run["supervised_tokens_per_second"] > 0
        assert (run["padding_fraction"] > 0) == (name == "none")
        assert run["peak_memory_bytes"] >= run["memory_before_bytes"] > 0
    assert toy_runs["none"]["n_steps"] == 20  # of 40 documents


def test_contestants_differ_in_what_they_are_compared_by(toy_runs):
    def losses(name: str) -> list[float]:
        return [toy_runs[name][f"{end}_loss_nats_per_token"] for end in ("first", "final")]

    # The same rows in the same order: only how attention is computed differs.
    assert losses("best_fit_transformers") == pytest.approx(losses("best_fit"), abs=1e-5)
    assert losses("concatenate") != pytest.approx(losses("best_fit"), abs=1e-3)
    assert toy_runs["best_fit_transformers"]["attention"] == "sdpa"
    assert toy_runs["best_fit"]["attention"] == "tramontane_packed"


def test_the_table_of_training_shows_the_medians(toy_runs):
    slower = {**toy_runs["none"], "tokens_per_second": 1.0}
    rows = {
        "row_tokens": 128,
        "rows_per_micro_batch": 2,
        "documents": {"n_documents": 40, "mean_tokens": 30.0, "supervised_fraction": 0.5},
        "contestants": {
            "none": [toy_runs["none"], slower, slower],
            "concatenate": [{"device": "cpu", "out_of_memory": "tried 9 GiB"}],
        },
    }
    text = packed_training_table.table(
        {
            **machine.circumstances(),
            "versions": {"torch": "2"},
            "trl_version": None,
            "shape": "toy",
            "gradient_checkpointing": True,
            "rows": [rows],
        }
    )
    assert f"| none | 1 (1–{toy_runs['none']['tokens_per_second']:,.0f}) |" in text
    assert "| concatenate | out of memory |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_memory_before_training_is_no_memory_of_training(run_python):
    code = f"""
from tests.benchmarks.resident_memory import reset_peak, resident_bytes
{FILL}
del held
reset_peak()
before = resident_bytes("VmRSS")
held = bytearray(b"1") * 50_000_000
del held
print(resident_bytes("VmHWM") - before)
"""
    assert 45 * MB < int(run_python(code).stdout) < 60 * MB


def test_a_run_of_too_few_steps_is_no_measurement():
    with pytest.raises(StageError, match="too few steps"):
        training_contestants.Meter(ends=[1.0, 2.0]).measured(None, n_warm_up=2)
