from __future__ import annotations

import hashlib
import json
import shutil

STAGE = "workflow_scripts.models.read_model_facts"


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--facts" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


def test_facts_of_the_demo_are_what_was_asked_for(run_stage, demo_checkpoint, tmp_path):
    path = tmp_path / "facts.json"
    done = run_stage(STAGE, "--checkpoint", demo_checkpoint, "--facts", path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(path.read_text())
    expected = {
        "architecture": "MistralForCausalLM",
        "n_layers": 1,
        "hidden_size": 256,
        "n_heads": 8,
        "n_kv_heads": 2,
        "head_dim": 32,
        "vocabulary_size": 32768,
        "context_tokens": 4096,
        "sliding_window": 512,
        "tokenizer_version": "v3",
        "dtype": "bfloat16",
    }
    assert {key: facts[key] for key in expected} == expected
    assert set(facts["files"]) == {"config.json", "tokenizer.model.v3", "model.safetensors"}
    for name, file in facts["files"].items():
        content = (demo_checkpoint / name).read_bytes()
        assert file == {
            "sha256": hashlib.sha256(content).hexdigest(),
            "size_bytes": len(content),
        }


def test_a_missing_window_is_said_aloud(run_stage, demo_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(demo_checkpoint, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["sliding_window"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    done = run_stage(STAGE, "--checkpoint", checkpoint, "--facts", tmp_path / "facts.json")
    assert done.returncode == 0, done.stderr
    assert "WARNING read_model_facts: found no sliding_window" in done.stderr
    assert json.loads((tmp_path / "facts.json").read_text())["sliding_window"] is None


def test_stretched_positions_are_asked_for_in_json(run_stage, demo_checkpoint, tmp_path):
    plain, scaled = tmp_path / "plain.json", tmp_path / "scaled.json"
    assert run_stage(STAGE, "--checkpoint", demo_checkpoint, "--facts", plain).returncode == 0
    scaling = json.dumps({"type": "yarn", "factor": 4})
    done = run_stage(
        STAGE, "--checkpoint", demo_checkpoint, "--rope-scaling", scaling, "--facts", scaled
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(plain.read_text()), json.loads(scaled.read_text())
    assert "rope_scaling" not in before
    changed = {key: after[key] for key in after if after[key] != before.get(key)}
    assert changed == {
        "context_tokens": 4 * 4096,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": before["rope_theta"],
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
        },
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_context_tokens": 4096},
    }
    assert "attention sees no further" in done.stderr  # the demo's window of 512


def test_dynamic_scaling_is_told_where_it_ends(run_stage, demo_checkpoint, tmp_path):
    scaling = json.dumps({"type": "dynamic", "factor": 2})
    done = run_stage(
        STAGE, "--checkpoint", demo_checkpoint, "--rope-scaling", scaling, "--facts",
        tmp_path / "facts.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "GGUF has no form of it" in done.stderr


def test_a_scaling_that_cannot_be_is_a_message(run_stage, demo_checkpoint, tmp_path):
    facts = tmp_path / "facts.json"
    scaling = json.dumps({"type": "yarn", "factor": 0.5})
    done = run_stage(
        STAGE, "--checkpoint", demo_checkpoint, "--rope-scaling", scaling, "--facts", facts
    )
    assert done.returncode == 1
    assert "factor: found 0.5" in done.stderr and "Traceback" not in done.stderr
    assert not facts.exists()


def test_a_missing_shard_stops_the_stage(run_stage, demo_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(demo_checkpoint, checkpoint)
    (checkpoint / "model.safetensors").unlink()
    done = run_stage(STAGE, "--checkpoint", checkpoint, "--facts", tmp_path / "facts.json")
    assert done.returncode == 1
    for part in ("read_model_facts: the checkpoint is not whole", "model.safetensors", "where:"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "facts.json").exists()
