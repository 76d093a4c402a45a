from __future__ import annotations

import math

STAGE = "workflow_scripts.demo.build_random_model"


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--settings" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


def test_the_folder_loads_in_transformers_and_predicts_at_chance(demo_checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.config.num_hidden_layers == len(model.model.layers) == 1
    assert model.config.sliding_window == 512
    tokens = torch.arange(3, 300)[None]
    output = model(tokens, labels=tokens)
    assert output.logits.shape == (1, 297, 32768)
    # ln(vocabulary), with a tolerance for logits that are not exactly 0.
    assert math.isclose(output.loss.item(), math.log(32768), abs_tol=0.2)


def test_it_ships_the_official_tokenizer(demo_checkpoint, official_tokenizer):
    shipped = (demo_checkpoint / "tokenizer.model.v3").read_bytes()
    assert shipped == official_tokenizer("v3").read_bytes()


def test_a_width_that_cannot_be_quantized_is_refused(run_stage, tmp_path):
    done = run_stage(
        STAGE, "--settings", '{"hidden_size": 100}', "--checkpoint", tmp_path / "checkpoint"
    )
    assert done.returncode == 1
    for part in ("build_random_model: --settings cannot be used", "hidden_size: found 100", "256"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
