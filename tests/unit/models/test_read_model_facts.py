from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from workflow_scripts.handover.facts import Facts

STAGE = "workflow_scripts.models.read_model_facts"


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--facts" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


def test_facts_of_the_demo_match_its_config(run_stage, demo_checkpoint, tmp_path):
    path = tmp_path / "facts.json"
    done = run_stage(STAGE, "--checkpoint", demo_checkpoint, "--facts", path)
    assert done.returncode == 0, done.stderr
    facts = Facts.read(path)
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
    assert facts.model_dump(include=set(expected)) == expected
    assert set(facts.files) == {"config.json", "tokenizer.model.v3", "model.safetensors"}
    for name, file in facts.files.items():
        content = (demo_checkpoint / name).read_bytes()
        assert file.sha256 == hashlib.sha256(content).hexdigest()
        assert file.size_bytes == len(content)


def test_a_missing_window_is_a_warning(run_stage, demo_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(demo_checkpoint, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["sliding_window"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    done = run_stage(STAGE, "--checkpoint", checkpoint, "--facts", tmp_path / "facts.json")
    assert done.returncode == 0, done.stderr
    assert "WARNING read_model_facts: found no sliding_window" in done.stderr
    assert json.loads((tmp_path / "facts.json").read_text())["sliding_window"] is None


def test_rope_scaling_is_passed_as_json(run_stage, demo_checkpoint, tmp_path):
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


def test_dynamic_scaling_warns_that_export_fails(run_stage, demo_checkpoint, tmp_path):
    scaling = json.dumps({"type": "dynamic", "factor": 2})
    done = run_stage(
        STAGE, "--checkpoint", demo_checkpoint, "--rope-scaling", scaling, "--facts",
        tmp_path / "facts.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "GGUF cannot store it" in done.stderr


def test_an_impossible_scaling_is_refused(run_stage, demo_checkpoint, tmp_path):
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
    for part in ("read_model_facts: the checkpoint is incomplete", "model.safetensors", "where:"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "facts.json").exists()


@pytest.fixture
def refused(run_stage, tmp_path):
    """`refused(checkpoint)` returns the message and checks that no facts were written."""

    def run(checkpoint):
        facts = tmp_path / "facts.json"
        done = run_stage(STAGE, "--checkpoint", checkpoint, "--facts", facts)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr and not facts.exists()
        return done.stderr

    return run


@pytest.fixture
def make_base(make_checkpoint, tokenizer_v3, tmp_path):
    def make(name="tokenizer.model.v3", **config):
        folder = make_checkpoint(tmp_path / "base", **{"vocab_size": 32_768, **config})
        shutil.copyfile(tokenizer_v3 / "tokenizer.model.v3", folder / name)
        return folder

    return make


@pytest.mark.parametrize(
    ("n_rows", "parts"),
    [
        (32_770, ["more embeddings than its tokenizer has tokens", "32770 rows", "32768 tokens"]),
        (32_770, ["resize_token_embeddings(32768)", "config.json, vocab_size"]),
        (32_000, ["fewer embeddings than its tokenizer has tokens", "32000 rows", "own tokenizer"]),
    ],
)
def test_rows_of_embeddings_without_a_token_and_the_reverse_are_refused(
    make_base, refused, n_rows, parts
):
    message = refused(make_base(vocab_size=n_rows))
    for part in parts:
        assert part in message


def test_rows_are_counted_against_tekken_too(
    make_checkpoint, exported_tokenizer, refused, run_stage, tmp_path
):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekken = exported_tokenizer("tekken") / "tekken.json"
    n_tokens = Tekkenizer.from_file(tekken).n_words
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    for name, n_rows in (("right", n_tokens), ("padded", n_tokens + 64)):
        folder = make_checkpoint(tmp_path / name, vocab_size=n_rows, **shape)
        shutil.copyfile(tekken, folder / "tekken.json")
    done = run_stage(STAGE, "--checkpoint", tmp_path / "right", "--facts", tmp_path / "right.json")
    assert done.returncode == 0, done.stderr
    assert f"{n_tokens} tokens in tekken.json" in refused(tmp_path / "padded")


def test_a_model_with_its_extra_rows_removed_is_accepted(make_base, run_stage, tmp_path):
    """Follow the remedy in the message."""
    from transformers import AutoModelForCausalLM

    grown = make_base(vocab_size=32_770)
    model = AutoModelForCausalLM.from_pretrained(grown)
    model.resize_token_embeddings(32_768)
    model.save_pretrained(tmp_path / "cut")
    shutil.copyfile(grown / "tokenizer.model.v3", tmp_path / "cut" / "tokenizer.model.v3")
    done = run_stage(STAGE, "--checkpoint", tmp_path / "cut", "--facts", tmp_path / "facts.json")
    assert done.returncode == 0, done.stderr


def test_a_base_that_bitsandbytes_quantized_is_refused(make_base, refused, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = make_base()
    quantized = AutoModelForCausalLM.from_pretrained(
        plain,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    folder = tmp_path / "nf4"
    quantized.save_pretrained(folder)
    shutil.copyfile(plain / "tokenizer.model.v3", folder / "tokenizer.model.v3")
    message = refused(folder)
    for part in ("already quantized", "bitsandbytes, load_in_4bit: True", "method: qlora"):
        assert part in message
    # The same weights without quantization_config.
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(folder)
    assert "already quantized" in message and "U8" in message


def test_a_weight_that_is_not_finite_is_refused(make_base, refused):
    import torch
    from safetensors.torch import load_file, save_file

    base = make_base()
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    message = refused(base)
    assert "not a finite number" in message and "model.layers.1.mlp.up_proj.weight" in message


def test_a_missing_tensor_is_refused(make_base, refused):
    from safetensors.torch import load_file, save_file

    base = make_base()
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing: model.layers.1.self_attn.k_proj.weight" in refused(base)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 587591\n"
PAGE = "<!DOCTYPE html>\n<html><body>Not found</body></html>"


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v3", "config.json", "model.safetensors", "tekken.json"]
)
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (POINTER, "a Git LFS pointer, not the file itself"),
        (PAGE, "a web page"),
        ("", "a file is empty"),
    ],
)
def test_a_placeholder_for_a_models_file_is_recognized(make_base, refused, name, content, part):
    base = make_base()
    (base / name).write_text(content)
    message = refused(base)
    assert part in message and str(base / name) in message


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "tokenizer.model"])
def test_half_a_tokenizer_is_refused(make_base, refused, name):
    base = make_base(name)
    content = (base / name).read_bytes()
    (base / name).write_bytes(content[: len(content) // 2])
    message = refused(base)
    assert "the tokenizer file cannot be read" in message and name in message


def test_half_a_tekken_file_is_refused(make_base, exported_tokenizer, refused):
    base = make_base()
    content = (exported_tokenizer("tekken") / "tekken.json").read_bytes()
    (base / "tekken.json").write_bytes(content[: len(content) // 2])
    assert "the tokenizer file cannot be read" in refused(base)


def test_only_a_tokenizer_json_or_only_a_pickle_is_refused_with_a_remedy(make_base, refused):
    base = make_base()
    (base / "tokenizer.model.v3").rename(base / "tokenizer.json")
    message = refused(base)
    assert "found:    tokenizer.json" in message and "tokenizer.json alone" in message
    (base / "tokenizer.json").rename(base / "tokenizer.model.v3")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    message = refused(base)
    assert "the checkpoint is incomplete" in message and "pytorch_model.bin is a pickle" in message
