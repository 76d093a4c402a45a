from __future__ import annotations

import json
import math

STAGE = "workflow_scripts.models.build_demo_model"


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--settings" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


def test_the_folder_loads_in_transformers(demo_checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.config.num_hidden_layers == len(model.model.layers) == 1
    assert model.config.sliding_window == 512
    logits = model(torch.tensor([[1, 3, 4, 2]])).logits
    assert logits.shape == (1, 4, 32768)
    assert torch.isfinite(logits).all()


def test_the_loss_begins_at_that_of_guessing(demo_checkpoint):
    losses = json.loads((demo_checkpoint / "pretraining.json").read_text())
    assert losses["step"] == [1]
    # Random weights know nothing: ln(vocabulary), and a little for logits that are not quite 0.
    assert math.isclose(losses["loss_nats_per_token"][0], math.log(32768), abs_tol=0.2)


def test_it_ships_the_official_tokenizer(demo_checkpoint, official_tokenizer):
    shipped = (demo_checkpoint / "tokenizer.model.v3").read_bytes()
    assert shipped == official_tokenizer("v3").read_bytes()


def test_a_width_that_cannot_be_quantized_is_refused(run_stage, tmp_path):
    done = run_stage(
        STAGE, "--settings", '{"hidden_size": 100}', "--checkpoint", tmp_path / "checkpoint"
    )
    assert done.returncode == 1
    for part in ("build_demo_model: --settings cannot be used", "hidden_size: found 100", "256"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
