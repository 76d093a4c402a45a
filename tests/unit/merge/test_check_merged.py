from __future__ import annotations

import argparse
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.facts import facts_of
from tests.gates import DEQUANTIZED, MERGED_CHECK
from tests.unit.merge.test_exact_merge import merged_by_peft
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.merge import check_merged, merge_adapter
from workflow_scripts.scoring.transformers_model import TransformersModel
from workflow_scripts.settings import MergeGateSettings, RopeScalingSettings

GATES = {"perplexity_increase_fraction": 0.5}
LAX = {"perplexity_increase_fraction": 1.0}


def arguments(
    chain, merged, settings, check, *, adapter=None, precision="nf4", facts=None, base="original"
):
    return (
        ["--checkpoint", chain.checkpoint, "--facts", facts or chain.facts]
        + ["--adapter", adapter or chain.adapter, "--precision", precision, "--merged", merged]
        + ["--tokenizer", chain.tokenizer, "--merge-base", base]
        + ["--tokens", chain.tokens, "--settings", settings, "--check", check]
    )


@pytest.fixture
def damaged(chain, tmp_path):
    """A copy of the merged model in which one number of one weight is another."""
    folder = tmp_path / "damaged"
    shutil.copytree(chain.merged, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 50.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_right_merge_passes_and_says_how_near_it_is(chain, tmp_path, as_json):
    check = tmp_path / "merged_check.json"
    check_merged.main([str(a) for a in arguments(chain, chain.merged, as_json(**GATES), check)])
    report = files.read_json(check)
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


def test_one_damaged_number_stops_the_chain_with_a_message(
    chain, damaged, tmp_path, as_json, ends_with_message
):
    check = tmp_path / "merged_check.json"
    message = ends_with_message(
        check_merged.main, arguments(chain, damaged, as_json(**GATES), check)
    )
    for part in (
        "the merged model differs from base + adapter",
        f"where:    {damaged}",
        "found:    1 of 21 tensors: model.layers.1.mlp.down_proj.weight: ",
        "is wrong in single numbers (1 of 65,536 numbers)",
        f"expected: {chain.checkpoint} + {chain.adapter}, each number rounded",
        "to fix:   merge again",
    ):
        assert part in message
    assert not check.exists() and damaged.exists()


def test_a_merge_that_is_worse_than_its_adapter_stops_the_chain(
    chain, write_documents, tmp_path, as_json, ends_with_message
):
    """Judged on what the adapter on its 4-bit base says itself; no other model is as sure of it."""
    live = TransformersModel(chain.checkpoint, window=300, precision="nf4", adapter=chain.adapter)
    said = [
        live.model.generate(
            torch.tensor([[1, first]]), do_sample=False, max_new_tokens=40, pad_token_id=2
        )[0].tolist()
        for first in range(100, 108)
    ]
    write_documents(tmp_path / "said.arrow", said, [[(2, len(tokens))] for tokens in said])
    given = chain._replace(tokens=tmp_path / "said.arrow")
    check = tmp_path / "merged_check.json"
    gates = as_json(perplexity_increase_fraction=0.001)
    message = ends_with_message(check_merged.main, arguments(given, chain.merged, gates, check))
    for part in (
        "the merged model is worse than the adapter it was made of",
        "8 validation conversations",
        "of the adapter on its 4-bit base: ",
        "with a standard error of ",
        "at most 0.1% more (evaluation.gates.merge.perplexity_increase_fraction)",
    ):
        assert part in message
    assert not check.exists()
    # The same text, and a limit beyond what it is worse by.
    check_merged.main([str(a) for a in arguments(given, chain.merged, as_json(**LAX), check)])
    report = files.read_json(check)
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
        ({"kl_divergence_from_rounded_nats": 1e-5}, "computes something else than base"),
        ({"kl_divergence_from_rounded_nats": math.nan}, "computes something else than base"),
        ({"merged_perplexity": math.inf}, "computes no numbers"),
    ],
)
def test_figures_are_judged_with_their_errors(measured, headline):
    settings = MergeGateSettings(perplexity_increase_fraction=0.02)
    given = argparse.Namespace(merged="merged", adapter="adapter", precision="nf4")
    if headline is None:
        check_merged.judge(MERGED_CHECK.changed(**measured), settings, given)
        return
    with pytest.raises(StageError, match=headline):
        check_merged.judge(MERGED_CHECK.changed(**measured), settings, given)


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ({"method": "full"}, "native"),
        ({"method": "lora", "dora": True, "modules_to_save": ["lm_head"]}, "native"),
        ({"method": "lora_int8", "rslora": True}, "int8"),
    ],
    ids=["full", "lora", "lora_int8"],
)
def test_every_method_passes_on_the_base_it_was_trained_on(
    chain, train, tmp_path, as_json, recipe, precision
):
    adapter = train(chain.checkpoint, **recipe)
    merged, check = tmp_path / "merged", tmp_path / "merged_check.json"
    merge_adapter.main(
        ["--checkpoint", str(chain.checkpoint), "--facts", str(chain.facts)]
        + ["--tokenizer", str(chain.tokenizer)]
        + ["--adapter", str(adapter), "--merged", str(merged)]
    )
    given = arguments(chain, merged, as_json(**GATES), check, adapter=adapter, precision=precision)
    check_merged.main([str(argument) for argument in given])
    report = files.read_json(check)
    assert report["kl_divergence_from_rounded_nats"] < 1e-7 < report["kl_divergence_nats"]
    quantized = {"native": "float32", "int8": "int8"}[precision]
    assert report["adapter_precision"] == quantized or torch.cuda.is_available()
    ratio = report["merged_perplexity"] / report["adapter_perplexity"]
    # Natively one rounding of the weights apart: measured 0.002, of a perplexity of 60,000.
    assert ratio == pytest.approx(1, abs=0.3 if precision == "int8" else 0.01)


def test_a_merge_into_the_dequantized_base_is_judged_against_that_base(
    chain, tmp_path, as_json, ends_with_message
):
    merged, check = tmp_path / "merged", tmp_path / "merged_check.json"
    merge_adapter.main(
        ["--checkpoint", str(chain.checkpoint), "--facts", str(chain.facts)]
        + ["--tokenizer", str(chain.tokenizer)]
        + ["--adapter", str(chain.adapter), "--merge-base", "dequantized"]
        + ["--merged", str(merged)]
    )
    DEQUANTIZED.write(tmp_path / "merge_base.json")
    given = arguments(
        chain, merged, as_json(**GATES), check, base=str(tmp_path / "merge_base.json")
    )
    check_merged.main([str(argument) for argument in given])
    report = files.read_json(check)
    assert report["merge_base"] == "dequantized"
    assert report["kl_divergence_from_rounded_nats"] < 1e-7 < report["kl_divergence_nats"]
    # Nearer to the live adapter on its 4-bit base than a merge into the original.
    original = tmp_path / "original.json"
    check_merged.main([str(a) for a in arguments(chain, chain.merged, as_json(**GATES), original)])
    gap = abs(report["perplexity_increase_fraction"])
    assert gap < abs(files.read_json(original)["perplexity_increase_fraction"])

    check.unlink()
    message = ends_with_message(
        check_merged.main, arguments(chain, merged, as_json(**GATES), check)
    )
    assert "the merged model differs from base + adapter" in message
    assert "14 of 21 tensors: model.layers.{0-1}." in message
    assert "is merged into the other base" in message
    assert not check.exists()


@pytest.fixture
def folder(chain, tmp_path):
    """A copy of the merged model, to be damaged."""
    return shutil.copytree(chain.merged, tmp_path / "copy")


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model", "tokenizer.json", "chat_template.jinja", "generation_config.json"],
)
def test_a_folder_that_lacks_a_file_of_the_tokenizer_stops_the_chain(
    chain, folder, tmp_path, as_json, ends_with_message, name
):
    (folder / name).unlink()
    check = tmp_path / "check.json"
    message = ends_with_message(
        check_merged.main, arguments(chain, folder, as_json(**GATES), check)
    )
    assert "the merged folder is not complete" in message
    assert f"found:    no {name}" in message
    assert not check.exists() and folder.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "chat_template.jinja"])
def test_a_folder_with_another_tokenizer_or_template_stops_the_chain(
    chain, folder, tmp_path, as_json, ends_with_message, name
):
    path = folder / name
    path.write_bytes(path.read_bytes().replace(b"INST", b"TSNI"))
    check = tmp_path / "check.json"
    message = ends_with_message(
        check_merged.main, arguments(chain, folder, as_json(**GATES), check)
    )
    assert "the merged folder has another tokenizer than training" in message
    assert f"where:    {path}" in message
    assert not check.exists() and path.exists()


def test_a_folder_that_loads_with_another_window_stops_the_chain(
    chain, folder, tmp_path, as_json, ends_with_message
):
    """As Mistral 7B v0.2's would without its key: the class fills in 4096."""
    config = files.read_json(folder / "config.json")
    config.pop("sliding_window")
    files.write_json(folder / "config.json", config)
    check = tmp_path / "check.json"
    message = ends_with_message(
        check_merged.main, arguments(chain, folder, as_json(**GATES), check)
    )
    for part in ("another sliding window", "found:    4096", "expected: 300"):
        assert part in message


def test_a_vocabulary_of_another_size_stops_the_chain(
    chain, folder, tmp_path, as_json, ends_with_message
):
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | {"vocab_size": 32_776})
    check = tmp_path / "check.json"
    message = ends_with_message(
        check_merged.main, arguments(chain, folder, as_json(**GATES), check)
    )
    for part in ("does not fit the merged model", "32768 tokens", "32776, the rows"):
        assert part in message


def test_a_merge_without_the_full_fine_tunes_weights_is_found(
    chain, train, tmp_path, as_json, ends_with_message
):
    adapter = train(chain.checkpoint, method="full")
    given = arguments(
        chain,
        chain.merged,
        as_json(**GATES),
        tmp_path / "check.json",
        adapter=adapter,
        precision="native",
    )
    message = ends_with_message(check_merged.main, given)
    assert "the merged model differs from base + adapter" in message


def test_a_merge_that_forgot_the_stretched_positions_is_found(
    chain, tmp_path, as_json, ends_with_message
):
    """The merged folder is judged by its own config.json, the reference by the facts."""
    scaling = RopeScalingSettings(type="yarn", factor=2)
    facts_of(chain.checkpoint, scaling).write(tmp_path / "facts.json")
    check = tmp_path / "check.json"
    given = arguments(chain, chain.merged, as_json(**GATES), check, facts=tmp_path / "facts.json")
    message = ends_with_message(check_merged.main, given)
    assert "the merged model's config differs from its base's" in message
    assert "config.json, rope_parameters" in message and "'rope_type': 'yarn'" in message

    merged = tmp_path / "merged"
    merge_adapter.main(
        ["--checkpoint", str(chain.checkpoint), "--facts", str(tmp_path / "facts.json")]
        + ["--tokenizer", str(chain.tokenizer), "--adapter", str(chain.adapter)]
        + ["--merged", str(merged)]
    )
    given = arguments(chain, merged, as_json(**GATES), check, facts=tmp_path / "facts.json")
    check_merged.main([str(argument) for argument in given])
    report = files.read_json(check)
    assert report["kl_divergence_from_rounded_nats"] < 1e-7


@pytest.mark.parametrize("options", [{}, {"is_safe": True}, {"autocast_adapter_dtype": False}])
def test_a_small_change_that_rounding_takes_away_is_a_right_merge_by_whoever_made_it(
    chain, make_adapter, folder, tmp_path, as_json, options
):
    """Weights lie on the grid of bfloat16: of changes far below its step most are lost, all towards
    nothing. Rounding at random keeps them on average, so its divergence is no limit for that of a
    right merge: here it is below it, and on real weights it was a third."""
    adapter = make_adapter(chain.checkpoint, tmp_path / "adapter", size=2e-4)
    merged_by_peft(chain.checkpoint, adapter, tmp_path / "peft", **options)
    for path in (tmp_path / "peft").glob("*.safetensors"):
        shutil.copyfile(path, folder / path.name)
    check = tmp_path / "check.json"
    given = arguments(chain, folder, as_json(**GATES), check, adapter=adapter)
    check_merged.main([str(argument) for argument in given])
    report = files.read_json(check)
    assert report["kl_divergence_from_rounded_nats"] < 1e-8
    assert report["kl_divergence_nats"] > 0


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 1e-5), ("num_key_value_heads", 4), ("hidden_act", "gelu")]
)
def test_a_config_that_computes_something_else_stops_the_chain(
    chain, folder, tmp_path, as_json, ends_with_message, key, value
):
    config = files.read_json(folder / "config.json")
    assert config[key] != value
    files.write_json(folder / "config.json", config | {key: value})
    message = ends_with_message(
        check_merged.main, arguments(chain, folder, as_json(**GATES), tmp_path / "check.json")
    )
    assert "the merged model's config differs from its base's" in message
    assert f"config.json, {key}" in message and f"found:    {value}" in message


def test_a_model_that_computes_something_else_with_right_weights_is_found(
    chain, folder, tmp_path, as_json, ends_with_message, monkeypatch
):
    """What the exact comparison cannot see is left to the divergence: here a config that no one
    compared."""
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | {"rms_norm_eps": 0.1})
    monkeypatch.setattr(
        check_merged, "UNJUDGED_KEYS", check_merged.UNJUDGED_KEYS | {"rms_norm_eps"}
    )
    message = ends_with_message(
        check_merged.main, arguments(chain, folder, as_json(**GATES), tmp_path / "check.json")
    )
    assert "computes something else than base + adapter" in message
    assert "though each weight is right" in message


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.merge.check_merged")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers"}
