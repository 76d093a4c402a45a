from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from workflow_scripts import files
from workflow_scripts.evaluate import benchmark_inference, inference_tests
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

SETTINGS = '{"prompt_tokens": 280, "generated_tokens": 5, "repetitions": 2}'
TOKENS = np.random.default_rng(0).integers(3, 300, size=20).astype(np.int32)


def benchmark(chain, speed, *model, settings=SETTINGS):
    benchmark_inference.main(
        [*map(str, model), "--facts", str(chain.facts), "--settings", settings]
        + ["--threads", "1", "--speed", str(speed)]
    )
    return files.read_json(speed)


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
def test_a_link_is_measured_with_its_size_and_memory(chain, tmp_path, engine):
    model, size = {
        "transformers": (("--checkpoint", chain.merged), chain.merged / "model.safetensors"),
        "llama.cpp": (("--gguf", chain.gguf), chain.gguf),
    }[engine]
    report = benchmark(chain, tmp_path / "speed.json", *model)
    assert report["engine"] == engine
    assert (report["prompt_tokens"], report["generated_tokens"]) == (280, 5)
    assert report["n_repetitions"] == 2
    assert report["size_bytes"] == size.stat().st_size
    assert report["peak_memory_bytes"] > report["size_bytes"]
    for phase in ("prompt", "decode"):
        assert 0 < report[f"{phase}_milliseconds_per_token"] < 10_000
        assert report[f"{phase}_standard_deviation_milliseconds_per_token"] >= 0


def test_the_memory_of_a_gguf_is_measured_without_pytorch(chain, tmp_path, run_python):
    arguments = ["--gguf", str(chain.gguf), "--facts", str(chain.facts), "--threads", "1"]
    arguments += ["--settings", SETTINGS, "--speed", str(tmp_path / "speed.json")]
    done = run_python(
        "import sys; from workflow_scripts.evaluate import benchmark_inference\n"
        f"benchmark_inference.main({arguments!r}); print('torch' in sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_tokens_are_limited_to_the_window_and_a_single_pass_has_no_deviation(chain, tmp_path):
    settings = '{"prompt_tokens": 5000, "generated_tokens": 3, "repetitions": 1}'
    report = benchmark(chain, tmp_path / "s.json", "--gguf", chain.gguf, settings=settings)
    assert report["prompt_tokens"] == 300
    assert report["prompt_standard_deviation_milliseconds_per_token"] is None


@pytest.mark.parametrize("repetitions", [1, 3])
def test_tests_alternate_and_the_first_pass_of_each_is_not_counted(repetitions):
    calls = []
    tests = {
        (phase, 0): inference_tests.Test(
            lambda phase=phase: calls.append(f"before {phase}") or phase, calls.append
        )
        for phase in ("prompt", "decode")
    }
    seconds = inference_tests.measure(tests, repetitions)
    once = ["before prompt", "prompt", "before decode", "decode"]
    assert calls == once * (repetitions + 1)
    assert {key: len(times) for key, times in seconds.items()} == {
        ("prompt", 0): repetitions,
        ("decode", 0): repetitions,
    }


def test_the_preparation_is_not_timed():
    tests = {("prompt", 9): inference_tests.Test(lambda: time.sleep(0.05), lambda _: None)}
    assert max(inference_tests.measure(tests, 2)["prompt", 9]) < 0.04


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
def test_depths_are_named_as_in_llama_bench(chain, tmp_path, engine):
    settings = (
        '{"prompt_tokens": 32, "generated_tokens": 4, "repetitions": 2,'
        ' "depths_tokens": [0, 100, 290]}'
    )
    model = {
        "transformers": ("--checkpoint", chain.merged),
        "llama.cpp": ("--gguf", chain.gguf),
    }[engine]
    report = benchmark(chain, tmp_path / "s.json", *model, settings=settings)
    # The window is 300: 290 and a prompt of 32 do not fit.
    names = [test["test"] for test in report["tests"]]
    assert names == ["pp32", "tg4", "pp32 @ d100", "tg4 @ d100"]
    # With two repetitions, both rates are this far from their mean.
    rate = report["tests"][0]["tokens_per_second"]
    away = report["tests"][0]["standard_deviation_tokens_per_second"] / math.sqrt(2)
    milliseconds = (1000 / (rate - away) + 1000 / (rate + away)) / 2
    assert report["prompt_milliseconds_per_token"] == pytest.approx(milliseconds, rel=1e-6)
    first = report["first_token_milliseconds"]
    assert first == pytest.approx(32 * report["prompt_milliseconds_per_token"], rel=1e-6)


@pytest.fixture(scope="module")
def gguf_model(chain):
    with LlamaCppModel(chain.gguf, context_tokens=300, n_threads=1) as model:
        yield model


@pytest.mark.parametrize("tokens_at_once", [len(TOKENS), 1], ids=["read", "write"])
def test_both_phases_leave_the_cache_after_the_last_token(gguf_model, tokens_at_once):
    """The next token's logits equal those of the whole text: every token ran once, in its place."""
    tokens = TOKENS.astype(np.int32)
    inference_tests.run_llama_cpp(gguf_model, tokens[:-1], tokens_at_once=tokens_at_once)
    wanted = np.ones(1, dtype=bool)
    found = gguf_model.decode(tokens[-1:], first=len(tokens) - 1, wants_logits=wanted).copy()
    (expected,) = gguf_model.logit_blocks(tokens, np.array([len(tokens) - 1]))
    # One token per pass against all in one pass: measured 0.003, for logits of size 4.
    np.testing.assert_allclose(found, expected.numpy(), atol=0.03)


@pytest.mark.parametrize("tokens_at_once", [len(TOKENS), 1], ids=["read", "write"])
def test_a_pass_continues_after_the_tokens_of_earlier_passes(gguf_model, tokens_at_once):
    gguf_model.read(TOKENS[:12])
    inference_tests.run_llama_cpp(
        gguf_model, TOKENS[12:-1], tokens_at_once=tokens_at_once, first=12
    )
    wanted = np.ones(1, dtype=bool)
    found = gguf_model.decode(TOKENS[-1:], first=len(TOKENS) - 1, wants_logits=wanted).copy()
    (expected,) = gguf_model.logit_blocks(TOKENS, np.array([len(TOKENS) - 1]))
    np.testing.assert_allclose(found, expected.numpy(), atol=0.03)


def test_transformers_continues_from_a_cache(checkpoint):
    model = load_model(checkpoint, window=8, precision="float32")
    cache = inference_tests.run_transformers(model, TOKENS[:12], tokens_at_once=12)
    cache = inference_tests.run_transformers(model, TOKENS[12:], tokens_at_once=1, cache=cache)
    assert cache.get_seq_length() == len(TOKENS)
    empty = inference_tests.run_transformers(model, TOKENS[:0], tokens_at_once=1)
    assert empty is None


@pytest.mark.parametrize("tokens_at_once", [1, 20])
def test_transformers_runs_every_token_once(checkpoint, tokens_at_once):
    model = load_model(checkpoint, window=8, precision="float32")
    seen = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].flatten().tolist())
    )
    inference_tests.run_transformers(model, TOKENS, tokens_at_once=tokens_at_once)
    assert [len(part) for part in seen] == [tokens_at_once] * (20 // tokens_at_once)
    assert sum(seen, []) == TOKENS.tolist()
    assert not torch.is_inference_mode_enabled()


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.evaluate.benchmark_inference")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp"}
