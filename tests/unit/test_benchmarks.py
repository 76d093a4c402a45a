"""What the benchmarks stand on: chats with the statistics of real ones, honest meters, and
references and contestants that do what they say."""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.benchmarks import (
    document_lengths,
    machine,
    measured_command,
    packed_training_table,
    packing_plans,
    packing_plans_table,
    peer_trainers,
    synthetic_chats,
    text_perplexity,
    text_perplexity_table,
    training_contestants,
    training_documents,
    training_meter,
    training_profile,
    training_throughput,
    training_throughput_table,
)
from tests.benchmarks.model_shapes import CONFIGS, shape_of
from tests.benchmarks.segment_tree import Spaces, best_fit_decreasing
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.packing import packing
from workflow_scripts.packing.cost import CostModel
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.tokens.documents import Documents

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
    """What each contestant that is installed measures on the toy; TRL is in no lock file."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for name in [*training_contestants.OURS, "transformers_peft"]:
        training_contestants.main(
            ["--contestant", name, "--shape", "toy", "--documents", str(toy_documents)]
            + ["--row-tokens", "128", "--rows", "2", "--warm-up-steps", "1"]
            + ["--documents-per-batch", "4", "--batches-per-step", "2"]
            + ["--gradient-checkpointing", "--scratch", str(folder / name)]
            + ["--measured", str(folder / f"{name}.json")]
        )
        runs[name] = files.read_json(folder / f"{name}.json")
    return runs


def test_contestants_train_on_the_same_documents(toy_runs, toy_documents):
    documents = Documents(toy_documents)
    n_tokens = int(documents.lengths.sum())
    for name, run in toy_runs.items():
        # All but the tokens of the first step, which warms up.
        most = 8 * 128 if name == "transformers_peft" else 256
        assert n_tokens - most <= run["n_tokens_measured"] < n_tokens, name
        assert run["n_steps_measured"] == run["n_steps"] - 1
        assert run["smallest_gradient_norm"] > 0
        assert run["tokens_per_second"] > run["supervised_tokens_per_second"] > 0
        assert (run["padding_fraction"] > 0) == (name in ("none", "transformers_peft"))
        assert run["peak_memory_bytes"] >= run["memory_before_bytes"] > 0
        assert run["n_checkpointed_layers"] == (0 if name == "tramontane" else 2)
        # The same two-layer base and adapter for everyone.
        assert run["n_trainable_parameters"] == toy_runs["best_fit"]["n_trainable_parameters"]
    assert toy_runs["none"]["n_steps"] == 20  # of 40 documents
    assert toy_runs["transformers_peft"]["n_steps"] == 5  # of 2 batches of 4 documents


def test_contestants_differ_in_what_they_are_compared_by(toy_runs):
    def losses(name: str) -> list[float]:
        return [toy_runs[name][f"{end}_loss_nats_per_token"] for end in ("first", "final")]

    # The same rows in the same order: only how attention is computed, or kept, differs.
    for name in ("best_fit_transformers", "tramontane", "tramontane_checkpointed"):
        assert losses(name) == pytest.approx(losses("best_fit"), abs=1e-5), name
    assert losses("tramontane_offloaded") == pytest.approx(losses("best_fit"), abs=1e-5)
    assert losses("concatenate") != pytest.approx(losses("best_fit"), abs=1e-3)
    assert toy_runs["best_fit_transformers"]["attention"] == "sdpa"
    assert toy_runs["best_fit"]["attention"] == "tramontane_packed"


def test_a_padded_batch_is_as_much_padding_as_its_longest_document_makes(toy_documents):
    """Counted by the collator's own output, one batch at a time."""
    work = peer_trainers.Work(
        config=CONFIGS["toy"],
        recipe=RecipeSettings(rank=8, schedule="constant"),
        documents=Documents(toy_documents),
        row_tokens=128,
        rows_per_micro_batch=2,
        documents_per_batch=4,
        batches_per_step=1,
        gradient_checkpointing=False,
        attention="sdpa",
        scratch=toy_documents.parent / "padded",
    )
    trainer = peer_trainers.transformers_peft_trainer(work)
    meter = training_meter.Meter(cost=None, n_warm_up=0)
    meter.watch(trainer, peer_trainers.document_lengths)
    examples = [trainer.train_dataset[number] for number in range(4)]
    batch = trainer.data_collator(examples)
    lengths = Documents(toy_documents).lengths[:4].tolist()
    assert meter.lengths == [lengths]
    assert meter.n_computed == [4 * max(lengths)] == [batch["input_ids"].numel()]
    assert batch["attention_mask"].sum() == sum(lengths)
    assert meter.n_supervised == [int(Documents(toy_documents).n_supervised[:4].sum())]


def test_arithmetic_is_that_of_the_layers_and_pairs_of_the_model():
    """N from the shapes of transformers' own modules, pairs one by one."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = CONFIGS["toy"]
    model = MistralForCausalLM(MistralConfig(**config))
    n_weights = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    n_output = n_weights.pop("lm_head")
    lengths, window = [5, 40, 33], config["sliding_window"]
    pairs = sum(
        max(0, query - window + 1) <= key
        for length in lengths
        for query in range(length)
        for key in range(query + 1)
    )
    meter = training_meter.Meter(cost=CostModel.of(shape_of(config)), n_warm_up=1)
    found = meter.arithmetic(lengths, 30, 2.0, n_checkpointed_layers=1)
    linear = 4 * sum(n_weights.values()) * sum(lengths)
    heads = config["num_attention_heads"]
    head_dim = config["hidden_size"] // heads
    assert found == {
        "linear_flops_per_second": (linear + 4 * n_output * 30) / 2.0,
        # Of one layer of two, the forward pass's 2 of 4 operations.
        "recomputed_linear_flops_per_second": linear / 2 / 2 / 2.0,
        # Two products forward, five backward, 2 operations an element, each head, two layers.
        "attention_flops_per_second": 2 * 7 * head_dim * heads * pairs * 2 / 2.0,
    }


def test_the_table_of_training_shows_the_medians(toy_runs):
    slower = {**toy_runs["none"], "tokens_per_second": 1.0}
    rows = {
        "row_tokens": 128,
        "rows_per_micro_batch": 2,
        "documents": {"n_documents": 40, "mean_tokens": 30.0, "supervised_fraction": 0.5},
        "contestants": {
            "none": [toy_runs["none"], slower, slower],
            "concatenate": [{"device": "cpu", "failed": "out of memory: tried 9 GiB"}],
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


def test_the_table_of_throughput_measures_by_the_machines_own_rate(toy_runs):
    ours, padded = dict(toy_runs["tramontane"]), dict(toy_runs["transformers_peft"])
    ours |= {"linear_flops_per_second": 5e9, "recomputed_linear_flops_per_second": 1e9}
    ours |= {"attention_flops_per_second": 2e9, "tokens_per_second": 600.0}
    padded |= {"tokens_per_second": 200.0, "padding_fraction": 0.5}
    text = training_throughput_table.table(
        {
            **machine.circumstances(),
            "versions": {"torch": "2"},
            "trl_version": None,
            "liger_version": None,
            "shape": "toy",
            "row_tokens": 128,
            "rows_per_micro_batch": 2,
            "documents_per_batch": 4,
            "batches_per_step": 2,
            "documents": {"n_documents": 40, "mean_tokens": 30.0, "supervised_fraction": 0.5},
            "matrix_rates": [
                {"size": 64, "dtype": "float32", "flops_per_second": rate}
                for rate in (8e9, 10e9, 99e9)
            ],
            "contestants": {
                "tramontane": [ours],
                "transformers_peft": [padded],
                "unsloth": [{"device": "cpu", "failed": "not installed: unsloth"}],
            },
        }
    )
    (row,) = (line for line in text.splitlines() if line.startswith("| tramontane |"))
    assert "| 60.0% | 80.0% |" in row  # of 10 GFLOP/s, the median
    assert "| unsloth | not installed: unsloth |" in text
    assert "3.00 times as fast as transformers_peft (3.00–3.00); padding alone is 2.00" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_benchmark_of_training_goes_on_without_what_is_not_installed(tmp_path, capsys):
    result = tmp_path / "result.json"
    training_throughput.main(
        ["--shape", "toy", "--contestants", "unsloth", "tramontane", "--most-steps", "3"]
        + ["--result", str(result)]
    )
    found = files.read_json(result)
    assert found["contestants"]["unsloth"][0]["failed"] == "not installed: unsloth"
    (run,) = found["contestants"]["tramontane"]
    assert run["n_steps"] == 3 and run["smallest_gradient_norm"] > 0
    assert found["matrix_rates"][0]["flops_per_second"] > 1e8
    # Padded batches of a step hold about as many tokens as its rows.
    n_padded = found["batches_per_step"] * found["documents_per_batch"]
    assert n_padded * found["documents"]["mean_tokens"] == pytest.approx(256, rel=0.3)
    text = capsys.readouterr().out
    training_throughput.main(["--table", str(result)])
    assert capsys.readouterr().out == text and "| tramontane |" in text


def test_a_contestant_that_crashes_says_why(tmp_path):
    arguments = argparse.Namespace(
        shape="toy", most_steps=2, peer_attention=None, trl=None, liger=None
    )
    sizes = {"row_tokens": 128, "rows_per_micro_batch": 1, "documents_per_batch": 1}
    runner = training_throughput.Runner(
        arguments,
        training_throughput.MEASURES["toy"],
        {**sizes, "batches_per_step": 1},
        tmp_path,  # without documents
    )
    assert "documents.arrow" in runner.train("tramontane")["failed"]


def test_a_peer_that_runs_out_of_memory_is_run_again_with_checkpointing(tmp_path, monkeypatch):
    asked = []

    def run(self, name, *, checkpoints):
        asked.append((name, checkpoints))
        full = name == "trl" and not checkpoints
        return {"failed": "out of memory: 99 GiB"} if full else {"tokens_per_second": 1.0}

    monkeypatch.setattr(training_throughput.Runner, "_train", run)
    runner = training_throughput.Runner(argparse.Namespace(), None, {}, tmp_path)
    for name in ("trl", "trl", "transformers_peft", "tramontane"):
        assert "failed" not in runner.train(name)
    assert asked == [
        ("trl", False), ("trl", True), ("trl", True),
        ("transformers_peft", False), ("tramontane", False),
    ]  # fmt: skip


def test_a_random_base_on_disk_is_the_one_in_memory(tmp_path):
    """As Unsloth is given it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.benchmarks.random_models import random_base

    peer_trainers.write_checkpoint(CONFIGS["toy"], tmp_path, seed=0)
    # As in training: on some CPUs bitsandbytes infers in bfloat16.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    made = random_base(CONFIGS["toy"], attention="sdpa", seed=0).train()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, made(tokens).logits)
    assert loaded.is_loaded_in_4bit
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<unk>"


@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("aten::mm", [(100, 256), (256, 1024)], "matrix products"),
        ("aten::mm", [(100, 256), (256, 32)], "LoRA"),
        ("aten::addmm_", [(100, 64), (100, 32), (32, 64)], "LoRA"),
        ("aten::mm", [(100, 256), (256, 512)], "loss"),
        ("aten::sub_", [(100, 512), (100, 1)], "loss"),
        ("aten::embedding", [(512, 256), (1, 100)], "copies and waiting"),
        ("bitsandbytes::dequantize_4bit", [(9, 1)], "NF4 dequantization"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [(1, 8, 9, 32)], "attention"),
        ("LigerRMSNormFunction", [(1, 100, 256)], "norms, RoPE, activation"),
        ("aten::_fused_adamw_", [], "optimizer"),
        ("aten::item", [], "copies and waiting"),
        ("aten::ge", [], "other"),
    ],
)
def test_operators_have_the_family_that_they_work_for(name, shapes, expected):
    operator = training_profile.Operator(name, tuple(shapes), 1, 1.0)
    assert training_profile.family(operator, rank=32, vocabulary_size=512) == expected


def test_a_profile_accounts_for_the_time_of_the_steps(tmp_path, capsys):
    result, trace = tmp_path / "profile.json", tmp_path / "trace.json"
    training_profile.main(
        ["--shape", "toy", "--rows", "1", "--steps", "2", "--trace", str(trace)]
        + ["--result", str(result)]
    )
    found = files.read_json(result)
    assert set(found["families"]) == set(training_profile.FAMILIES)
    assert json.loads(trace.read_text())["traceEvents"]
    seconds = sum(entry["seconds"] for entry in found["families"].values())
    # Operators of both passes, which run in two threads, one at a time.
    assert 0.2 * found["duration_seconds"] < seconds < 1.5 * found["duration_seconds"]
    assert "| LoRA |" in capsys.readouterr().out


def test_the_demos_documents_are_those_of_its_config(tmp_path):
    stages = tmp_path / "stages"
    stages.mkdir()
    described = training_documents.write_demo_documents(tmp_path / "documents.arrow", stages)
    assert 200 < described["n_documents"] < 400
    assert 40 <= described["quantiles"]["0.1"] and described["quantiles"]["0.9"] > 512
    packing = training_throughput.MEASURES["demo"].row_tokens
    assert 600 < described["longest_tokens"] <= packing  # none needs to be split


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
        meter = training_meter.Meter(cost=None, n_warm_up=2, ends=[1.0, 2.0])
        meter.measured(None, n_checkpointed_layers=0)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [([0, 1, 2], False), ([0, 1, 2, 3], False), ([0, 1, 5, 6.5], True), ([9, 10, 16], False)],
)
def test_a_run_ends_when_it_has_measured_long_enough(ends, expected):
    """Five seconds after two steps to warm up, and two measured steps at least."""
    meter = training_meter.Meter(cost=None, n_warm_up=2, most_seconds=5, ends=list(ends))
    assert meter.has_measured_enough() == expected


def test_what_llama_perplexity_says_is_read_off_its_log():
    log = (
        "0.00.551.067 I perplexity: 0.33 seconds per pass - ETA 0.00 minutes\n"
        "[1]22633.6928,[2]27291.1881,[3]25798.4149,\n"
        "12.07.756.792 I Final estimate: PPL = 25798.4149 +/- 1544.07130\n"
    )
    assert text_perplexity.FINAL.findall(log) == [("12", "07", "756", "25798.4149")]


def test_a_perplexity_s_speed_is_taken_against_the_other_of_its_own_repetition():
    def once(seconds):
        return {
            "duration_seconds": seconds + 3,
            "scoring_seconds": seconds,
            "peak_memory_bytes": 7e8,
            "peak_anonymous_memory_bytes": 3e8,
            "perplexity": 12.5,
        }

    theirs, ours = [once(10.0), once(30.0), once(20.0)], [once(8.0), once(30.0), once(25.0)]
    row = text_perplexity_table.row("tramontane", ours, theirs)
    assert row == (
        "| tramontane | 28.0 (11.0–33.0) | 25.0 (8.0–30.0) | 1.00 (0.80–1.25) | 700 | 300 |"
        " 12.5000 |"
    )
