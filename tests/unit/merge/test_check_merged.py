from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.facts import facts_of
from tests.gates import DEQUANTIZED, MERGED_CHECK
from tests.unit.merge.merges import as_arguments, merge, merged_by_peft
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.merge import check_merged, merge_gate, merged_folder
from workflow_scripts.scoring.transformers_model import TransformersModel
from workflow_scripts.settings import MergeGateSettings, RopeScalingSettings

GATES = {"perplexity_increase_fraction": 0.5}
LAX = {"perplexity_increase_fraction": 1.0}


@pytest.fixture
def arguments(chain, tmp_path, as_json):
    """`arguments(**options)`: those of the chain's own merge, except for the options given."""

    def of(**options):
        defaults = {
            "checkpoint": chain.checkpoint,
            "facts": chain.facts,
            "adapter": chain.adapter,
            "precision": "nf4",
            "merge_base": "original",
            "tokenizer": chain.tokenizer,
            "merged": chain.merged,
            "tokens": chain.tokens,
            "settings": as_json(**GATES),
            "check": tmp_path / "check.json",
        }
        return as_arguments(**defaults | options)

    return of


@pytest.fixture
def passes(arguments, tmp_path):
    """`passes(**options)`: the report of a gate that the merge passes."""

    def run(**options):
        check_merged.main(arguments(**options))
        return files.read_json(tmp_path / "check.json")

    return run


@pytest.fixture
def stops(arguments, tmp_path, ends_with_message):
    """`stops(**options)`: the message of a gate that stops the chain, and writes no report."""

    def run(**options):
        (tmp_path / "check.json").unlink(missing_ok=True)
        message = ends_with_message(check_merged.main, arguments(**options))
        assert not (tmp_path / "check.json").exists()
        return message

    return run


@pytest.fixture
def folder(chain, tmp_path):
    """A copy of the merged model, to be damaged."""
    return shutil.copytree(chain.merged, tmp_path / "copy")


def set_config(folder, **values):
    """Change values of a folder's config.json."""
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | values)


def test_a_right_merge_passes_and_its_distance_is_reported(passes):
    report = passes()
    assert report["n_conversations"] == 3
    assert (report["n_tensors"], report["n_adapted_tensors"]) == (21, 14)
    assert report["rounding"] == "once"
    by_rounding = report["rounding_kl_divergence_nats"]
    assert len(by_rounding) == 3 and min(by_rounding) > 0
    assert report["kl_divergence_from_rounded_nats"] < 0.01 * min(by_rounding)
    assert report["kl_divergence_nats"] <= report["max_kl_divergence_nats"]
    assert report["top1_agreement_fraction"] > 0.95
    ratio = report["merged_perplexity"] / report["adapter_perplexity"]
    assert report["perplexity_increase_fraction"] == pytest.approx(ratio - 1)
    assert report["loss_difference_standard_error_nats_per_token"] > 0


def test_one_damaged_number_stops_the_chain_with_a_message(chain, folder, stops):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 50.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = stops(merged=folder)
    for part in (
        "the merged model differs from base + adapter",
        f"where:    {folder}",
        "found:    1 of 21 tensors: model.layers.1.mlp.down_proj.weight: ",
        "is wrong in single numbers (1 of 65,536 numbers)",
        f"expected: {chain.checkpoint} + {chain.adapter}, each number rounded",
        "to fix:   merge again",
    ):
        assert part in message
    assert folder.exists()


def test_a_merge_that_is_worse_than_its_adapter_stops_the_chain(
    chain, write_documents, tmp_path, as_json, passes, stops
):
    """The text is what the adapter on its 4-bit base generates; no other model predicts it as
    well."""
    live = TransformersModel(chain.checkpoint, window=300, precision="nf4", adapter=chain.adapter)
    generated = [
        live.model.generate(
            torch.tensor([[1, first]]), do_sample=False, max_new_tokens=40, pad_token_id=2
        )[0].tolist()
        for first in range(100, 108)
    ]
    tokens = tmp_path / "generated.arrow"
    write_documents(tokens, generated, [[(2, len(document))] for document in generated])
    message = stops(tokens=tokens, settings=as_json(perplexity_increase_fraction=0.001))
    for part in (
        "the merged model is worse than the adapter that was merged",
        "8 validation conversations",
        "for the adapter on its 4-bit base: ",
        "with a standard error of ",
        "at most 0.1% more (evaluation.gates.merge.perplexity_increase_fraction)",
    ):
        assert part in message
    # The same text, with a limit above the loss.
    report = passes(tokens=tokens, settings=as_json(**LAX))
    difference = report["loss_difference_nats_per_token"]
    assert difference > 2 * report["loss_difference_standard_error_nats_per_token"] > 0
    assert math.log1p(0.001) < difference < math.log1p(LAX["perplexity_increase_fraction"])


@pytest.mark.parametrize(
    ("measured", "headline"),
    [
        ({}, "worse than the adapter"),
        ({"loss_difference_nats_per_token": math.nan}, "worse than the adapter"),
        # Within two standard errors of the limit, 0.0198 nats, and where it is better.
        ({"loss_difference_standard_error_nats_per_token": 0.005}, None),
        ({"loss_difference_nats_per_token": -0.5}, None),
        # One conversation has no standard error: the limit alone decides.
        (
            {"loss_difference_standard_error_nats_per_token": None}
            | {"loss_difference_nats_per_token": 0.02},
            "worse than the adapter",
        ),
        (
            {"loss_difference_standard_error_nats_per_token": None}
            | {"loss_difference_nats_per_token": 0.019},
            None,
        ),
        ({"kl_divergence_from_rounded_nats": 1e-5}, "does not compute what base"),
        ({"kl_divergence_from_rounded_nats": math.nan}, "does not compute what base"),
        ({"merged_perplexity": math.inf}, "computes no numbers"),
    ],
)
def test_figures_are_judged_with_their_errors(measured, headline):
    settings = MergeGateSettings(perplexity_increase_fraction=0.02)
    raises = pytest.raises(StageError, match=headline) if headline else contextlib.nullcontext()
    with raises:
        merge_gate.judge(MERGED_CHECK.changed(**measured), settings, Path("merged"), "nf4")


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ({"method": "full"}, "native"),
        ({"method": "lora", "dora": True, "modules_to_save": ["lm_head"]}, "native"),
        ({"method": "lora", "modules_to_save": ["embed_tokens"]}, "native"),
        ({"method": "lora_int8", "rslora": True}, "int8"),
    ],
    ids=["full", "lora", "embeddings", "lora_int8"],
)
def test_every_method_passes_on_the_base_it_was_trained_on(
    chain, train, tmp_path, passes, recipe, precision
):
    adapter = train(chain.checkpoint, **recipe)
    merged = merge(chain.checkpoint, adapter, tmp_path / "merged", tokenizer=chain.tokenizer)
    report = passes(merged=merged, adapter=adapter, precision=precision)
    assert report["kl_divergence_from_rounded_nats"] < 1e-7 < report["kl_divergence_nats"]
    quantized = {"native": "float32", "int8": "int8"}[precision]
    assert report["adapter_precision"] == quantized or torch.cuda.is_available()
    ratio = report["merged_perplexity"] / report["adapter_perplexity"]
    # Natively one rounding of the weights apart: measured 0.002, of a perplexity of 60,000.
    assert ratio == pytest.approx(1, abs=0.3 if precision == "int8" else 0.01)


def test_a_merge_into_the_dequantized_base_is_judged_against_that_base(
    chain, tmp_path, passes, stops
):
    merged = merge(
        chain.checkpoint,
        chain.adapter,
        tmp_path / "merged",
        base="dequantized",
        tokenizer=chain.tokenizer,
    )
    DEQUANTIZED.write(tmp_path / "merge_base.json")
    report = passes(merged=merged, merge_base=tmp_path / "merge_base.json")
    assert report["merge_base"] == "dequantized"
    assert report["kl_divergence_from_rounded_nats"] < 1e-7 < report["kl_divergence_nats"]
    # Nearer to the live adapter on its 4-bit base than a merge into the original.
    gap = abs(report["perplexity_increase_fraction"])
    assert gap < abs(passes()["perplexity_increase_fraction"])

    message = stops(merged=merged)
    assert "the merged model differs from base + adapter" in message
    assert "14 of 21 tensors: model.layers.{0-1}." in message
    assert "is merged into the other base" in message


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model", "tokenizer.json", "chat_template.jinja", "generation_config.json"],
)
def test_a_folder_that_lacks_a_file_of_the_tokenizer_stops_the_chain(folder, stops, name):
    (folder / name).unlink()
    message = stops(merged=folder)
    assert "the merged folder is not complete" in message
    assert f"found:    no {name}" in message
    assert folder.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "chat_template.jinja"])
def test_a_folder_with_another_tokenizer_or_template_stops_the_chain(folder, stops, name):
    path = folder / name
    path.write_bytes(path.read_bytes().replace(b"INST", b"TSNI"))
    message = stops(merged=folder)
    assert "the merged folder has another tokenizer than training" in message
    assert f"where:    {path}" in message
    assert path.exists()


def test_a_folder_that_loads_with_another_window_stops_the_chain(folder, stops):
    """As Mistral 7B v0.2 would without the key: the class fills in 4096."""
    config = files.read_json(folder / "config.json")
    config.pop("sliding_window")
    files.write_json(folder / "config.json", config)
    message = stops(merged=folder)
    for part in ("another sliding window", "found:    4096", "expected: 300"):
        assert part in message


def test_a_vocabulary_of_another_size_stops_the_chain(folder, stops):
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, vocab_size=32_776)
    message = stops(merged=folder)
    for part in ("does not fit the merged model", "32768 tokens", "32776, the rows"):
        assert part in message


def test_a_merge_without_the_full_fine_tunes_weights_is_found(chain, train, stops):
    message = stops(adapter=train(chain.checkpoint, method="full"), precision="native")
    assert "the merged model differs from base + adapter" in message


def test_a_merge_that_forgot_the_stretched_positions_is_found(chain, tmp_path, passes, stops):
    """The merged folder is judged by its own config.json, the reference by the facts."""
    stretched = facts_of(chain.checkpoint, RopeScalingSettings(type="yarn", factor=2))
    stretched.write(tmp_path / "facts.json")
    message = stops(facts=tmp_path / "facts.json")
    assert "the merged model's config differs from its base's" in message
    assert "config.json, rope_parameters" in message and "'rope_type': 'yarn'" in message

    merged = merge(
        chain.checkpoint,
        chain.adapter,
        tmp_path / "merged",
        facts=stretched,
        tokenizer=chain.tokenizer,
    )
    report = passes(merged=merged, facts=tmp_path / "facts.json")
    assert report["kl_divergence_from_rounded_nats"] < 1e-7


@pytest.mark.parametrize("options", [{}, {"is_safe": True}, {"autocast_adapter_dtype": False}])
def test_a_right_merge_by_anyone_passes_where_rounding_removes_a_small_change(
    chain, make_adapter, folder, tmp_path, passes, options
):
    """Rounding to bfloat16 removes most changes far below its step, all towards zero. Rounding at
    random keeps them on average, so its divergence is not a limit for that of a right merge: here
    it is lower, and on real weights it was a third."""
    adapter = make_adapter(chain.checkpoint, tmp_path / "adapter", size=2e-4)
    merged_by_peft(chain.checkpoint, adapter, tmp_path / "peft", **options)
    for path in (tmp_path / "peft").glob("*.safetensors"):
        shutil.copyfile(path, folder / path.name)
    report = passes(merged=folder, adapter=adapter)
    assert report["kl_divergence_from_rounded_nats"] < 1e-8
    assert report["kl_divergence_nats"] > 0


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 1e-5), ("num_key_value_heads", 4), ("hidden_act", "gelu")]
)
def test_a_config_that_changes_what_is_computed_stops_the_chain(folder, stops, key, value):
    assert files.read_json(folder / "config.json")[key] != value
    set_config(folder, **{key: value})
    message = stops(merged=folder)
    assert "the merged model's config differs from its base's" in message
    assert f"config.json, {key}" in message and f"found:    {value}" in message


def test_a_model_that_computes_something_else_with_right_weights_is_found(
    folder, stops, monkeypatch
):
    """The divergence finds what the exact comparison cannot: here a key of the config that is not
    compared."""
    set_config(folder, rms_norm_eps=0.1)
    keys = merged_folder.UNJUDGED_KEYS | {"rms_norm_eps"}
    monkeypatch.setattr(merged_folder, "UNJUDGED_KEYS", keys)
    message = stops(merged=folder)
    assert "does not compute what base + adapter compute" in message
    assert "although each weight is right" in message


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.merge.check_merged")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers"}
