from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests import hub_server
from tests.hub_server import NOBODY_LISTENS, Repository
from workflow_scripts import files
from workflow_scripts.handover.facts import Facts
from workflow_scripts.log import StageError
from workflow_scripts.merge import check_merged, fetch_merged, merged_folder

STAGE = "workflow_scripts.merge.fetch_merged"
COMMIT, LATER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
OWN = {"model.safetensors", "config.json", "generation_config.json"}


@pytest.fixture
def fetch(run_stage, chain, tmp_path):
    def run(merged, endpoint=NOBODY_LISTENS, **settings):
        environment = hub_server.environment(endpoint)
        environment["HF_HUB_CACHE"] = str(tmp_path / "cache")
        text = json.dumps({"model": "m", "dataset": "d", "merged": str(merged)} | settings)
        arguments = ["--settings", text, "--facts", chain.facts, "--tokenizer", chain.tokenizer]
        return run_stage(STAGE, *arguments, "--merged", tmp_path / "merged", **environment)

    return run


@pytest.fixture
def given(chain, tmp_path):
    """A model as another tool writes it: without window, tokenizer and generation settings."""
    folder = tmp_path / "given"
    folder.mkdir()
    shutil.copyfile(chain.merged / "model.safetensors", folder / "model.safetensors")
    config = files.read_json(chain.merged / "config.json")
    files.write_json(folder / "config.json", config)
    return folder


def test_a_local_model_is_linked_and_completed(fetch, given, chain, tmp_path):
    done = fetch(given)
    assert done.returncode == 0, done.stderr
    merged = tmp_path / "merged"
    expected = {path.name for path in chain.tokenizer.iterdir()} | OWN | {"source.json"}
    assert {path.name for path in merged.iterdir()} == expected
    assert (merged / "model.safetensors").resolve() == given / "model.safetensors"
    assert files.read_json(merged / "source.json") == {"source": str(given)}
    assert {path.name for path in given.iterdir()} == {"model.safetensors", "config.json"}
    tokens = files.read_json(merged / "generation_config.json")
    assert tokens == {"bos_token_id": 1, "eos_token_id": 2}
    # The gate's check of the folder, and a user's first steps with it.
    merged_folder.check(merged, chain.tokenizer, Facts.read(chain.facts))
    assert len(AutoTokenizer.from_pretrained(merged)) == 32_768
    model = AutoModelForCausalLM.from_pretrained(merged)
    expected = AutoModelForCausalLM.from_pretrained(chain.merged)
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize(
    ("key", "value"),
    [("sliding_window", 4096), ("num_hidden_layers", 3), ("vocab_size", 32_770)],
)
def test_a_model_whose_shape_differs_from_its_bases_is_refused(fetch, given, tmp_path, key, value):
    config = files.read_json(given / "config.json")
    files.write_json(given / "config.json", config | {key: value})
    done = fetch(given)
    assert done.returncode == 1
    for part in ("does not have the shape of its base", f"={value}", "runs.<name>.model"):
        assert part in done.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("model_type", "mixtral", "model_type"),
        ("num_hidden_layers", 3, "n_layers"),
        ("hidden_size", 128, "hidden_size"),
        ("intermediate_size", 99, "intermediate_size"),
        ("num_attention_heads", 16, "n_heads"),
        ("num_key_value_heads", 1, "n_kv_heads"),
        ("head_dim", 99, "head_dim"),
        ("vocab_size", 32_770, "vocabulary_size"),
        ("sliding_window", None, "sliding_window"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_windows"),
        ("rope_theta", 5.0, "rope_theta"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0}, "rope_scaling"),
        ("num_local_experts", 8, "n_experts"),
        ("num_experts_per_tok", 2, "n_experts_per_token"),
    ],
)
def test_every_part_of_the_shape_is_compared(given, chain, key, value, fact):
    facts = Facts.read(chain.facts)
    fetch_merged.check_shape(given, facts)
    config = files.read_json(given / "config.json")
    files.write_json(given / "config.json", config | {key: value})
    with pytest.raises(StageError) as caught:
        fetch_merged.check_shape(given, facts)
    where = str(caught.value).partition("config.json: ")[2].splitlines()[0]
    assert fact in where.split(", ")


def test_a_missing_window_is_written_into_the_config(given, chain):
    config = files.read_json(given / "config.json")
    del config["sliding_window"]
    files.write_json(given / "config.json", config)
    assert AutoConfig.from_pretrained(given).sliding_window == 4096  # the default of the class
    facts = Facts.read(chain.facts).changed(sliding_window=None)
    fetch_merged.set_window(given / "config.json", facts)
    assert AutoConfig.from_pretrained(given).sliding_window is None


def test_the_models_own_generation_settings_are_kept(fetch, given, tmp_path):
    own = {"eos_token_id": 2, "temperature": 0.3}
    files.write_json(given / "generation_config.json", own)
    assert fetch(given).returncode == 0
    assert files.read_json(tmp_path / "merged" / "generation_config.json") == own


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "1 missing: model.layers.1.mlp.up_"),
        (
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
            "not in the mod",
        ),
        (lambda w: w["model.norm.weight"].fill_(torch.nan), "a weight is not a finite number"),
        (lambda w: w["model.norm.weight"].zero_(), "is all zeros"),
    ],
)
def test_a_model_whose_tensors_contradict_its_config_is_refused(
    fetch, given, tmp_path, change, part
):
    from safetensors.torch import load_file, save_file

    weights = load_file(given / "model.safetensors")
    change(weights)
    save_file(weights, given / "model.safetensors", metadata={"format": "pt"})
    done = fetch(given)
    assert done.returncode == 1
    assert part in done.stderr
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_that_is_quantized_is_refused(fetch, given):
    config = files.read_json(given / "config.json")
    files.write_json(
        given / "config.json", config | {"quantization_config": {"quant_method": "awq"}}
    )
    done = fetch(given)
    assert done.returncode == 1 and "already quantized" in done.stderr


@pytest.mark.parametrize("damage", ["no config", "no weights", "half a shard"])
def test_an_incomplete_folder_is_refused(fetch, given, tmp_path, damage):
    shard = given / "model.safetensors"
    if damage == "half a shard":
        shard.write_bytes(shard.read_bytes()[:-10])
    else:
        (given / "config.json" if damage == "no config" else shard).unlink()
    done = fetch(given)
    assert done.returncode == 1
    expected = {"half a shard": "a weights file is damaged or truncated"}
    assert expected.get(damage, "the merged model is missing or incomplete") in done.stderr
    assert not (tmp_path / "merged").exists()


def test_a_model_comes_from_the_hub_at_a_commit(fetch, given, tmp_path):
    content = {path.name: path.read_bytes() for path in given.iterdir()}
    commits = {LATER: dict.fromkeys(content, b"later")}  # `main` has moved on
    commits[COMMIT] = {**content, "README.md": b"a card", "tokenizer.json": b"another's"}
    repository = Repository(commits, names={"v0": COMMIT})
    with hub_server.serving({"models/owner/tuned": repository}) as hub:
        done = fetch("owner/tuned", endpoint=hub.address, revision="v0")
    assert done.returncode == 0, done.stderr
    asked = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert asked == content.keys()
    merged = tmp_path / "merged"
    origin = files.read_json(merged / "source.json")
    assert origin == {"source": "owner/tuned", "commit": COMMIT}
    assert (merged / "model.safetensors").read_bytes() == content["model.safetensors"]
    assert (merged / "tokenizer.json").read_bytes() != b"another's"


def test_the_gate_only_scores_a_model_without_adapter(
    fetch, given, chain, tmp_path, ends_with_message
):
    assert fetch(given).returncode == 0
    merged, check = tmp_path / "merged", tmp_path / "check.json"
    arguments = ["--checkpoint", chain.checkpoint, "--facts", chain.facts, "--merged", merged]
    arguments += ["--tokenizer", chain.tokenizer, "--tokens", chain.tokens, "--settings", "{}"]
    arguments = [str(argument) for argument in [*arguments, "--check", check]]
    check_merged.main(arguments)
    report = files.read_json(check)
    assert report.keys() == {"n_conversations", "n_scored_tokens", "merged_perplexity"}
    check.unlink()

    from safetensors.torch import load_file, save_file

    weights = load_file(merged / "model.safetensors")
    weights["model.norm.weight"] *= torch.nan
    (merged / "model.safetensors").unlink()
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    assert "computes no numbers" in ends_with_message(check_merged.main, arguments)
    assert not check.exists()


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert imported.isdisjoint({"torch", "transformers"})
