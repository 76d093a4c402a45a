from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.facts import MISTRAL_7B
from workflow_scripts import files
from workflow_scripts.handover.facts import Facts
from workflow_scripts.log import StageError
from workflow_scripts.models import awq_weights
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.quantize import awq as awq_noun, quantize_awq
from workflow_scripts.tokens.documents import Documents

REPOSITORY = Path(__file__).parents[3]
MODULE = "workflow_scripts.quantize.quantize_awq"
WINDOW = 300  # of the fixture `chain`


@pytest.fixture(scope="session")
def quantize(chain, tmp_path_factory):
    """`quantize(tokens, facts=None, **settings)`: the folder made from the chain's merged model."""

    def run(tokens, facts=None, **settings):
        folder = tmp_path_factory.mktemp("quantized") / "awq"
        quantize_awq.main(
            ["--merged", str(chain.merged), "--facts", str(facts or chain.facts)]
            + ["--tokens", str(tokens), "--settings", json.dumps(settings), "--awq", str(folder)]
        )
        return folder

    return run


@pytest.fixture(scope="session")
def awq(quantize, chain):
    return quantize(chain.tokens, group_size=64)


@pytest.fixture(scope="session")
def packed(awq):
    return load_file(awq / "model.safetensors")


@pytest.fixture(scope="session")
def merged(chain):
    return load_model(chain.merged, window=WINDOW, precision="float32", device="cpu").eval()


def divergence(expected, found, tokens):
    """Mean KL divergence per token, nats."""
    kls = []
    for document in Documents(tokens):
        token_ids = torch.from_numpy(document.input_ids[:WINDOW].astype("int64"))[None]
        with torch.no_grad():
            p, q = (model(token_ids).logits[0].log_softmax(-1) for model in (expected, found))
        kls.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(kls).mean())


# Layers after a norm, whose weights contain the inverse of the scales.
NORMS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": None,
    "mlp.gate_proj": "post_attention_layernorm",
}


@pytest.mark.parametrize("layer", NORMS)
def test_a_packed_number_is_the_nearest_to_the_merged_weight(packed, merged, layer):
    """Nearest of the numbers that its group can hold, with the scales in the norm before it."""
    for block in ("model.layers.0", "model.layers.1"):
        name = f"{block}.{layer}"
        weight = merged.get_submodule(name).weight.detach()
        if NORMS[layer]:
            norm = f"{block}.{NORMS[layer]}.weight"
            weight = weight * (merged.get_parameter(norm) / packed[norm].float())
            assert not torch.equal(merged.get_parameter(norm), packed[norm].float())
        scales = packed[f"{name}.scales"].float().repeat_interleave(64, dim=0).T
        zeros = awq_weights.unpack(packed[f"{name}.qzeros"]).repeat_interleave(64, dim=0).T
        found = awq_weights.unpack(packed[f"{name}.qweight"]).T
        expected = ((weight / scales).round() + zeros).clamp(0, 15)
        differences = (found - expected).abs()
        # Exceptions: weights half-way between two numbers, as norms and scales are 16-bit numbers.
        assert differences.max() <= 1
        assert (differences > 0).float().mean() < 0.01


def test_the_folder_is_whole(awq, chain):
    from transformers import AutoTokenizer

    names = {path.name for path in awq.iterdir()}
    assert names == {path.name for path in chain.merged.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    for name in names - {"config.json", "model.safetensors"}:
        assert (awq / name).read_bytes() == (chain.merged / name).read_bytes()
    assert len(AutoTokenizer.from_pretrained(awq)) == 32_768
    config, own = (files.read_json(folder / "config.json") for folder in (awq, chain.merged))
    quantization = config.pop("quantization_config")
    assert config == own | {"dtype": "float16"}
    layout = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
    layout |= {"version": "gemm", "modules_to_not_convert": ["lm_head"]}
    assert quantization | layout == quantization


def test_a_kernel_computes_the_same_as_the_unpacked_weights(awq, chain):
    """Loaded by transformers itself, with auto-round's kernel for CPUs."""
    pytest.importorskip("auto_round_kernel", reason="auto-round-lib has x86-64 wheels alone")
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    kernel = AutoModelForCausalLM.from_pretrained(
        awq, dtype=torch.float32, quantization_config=AutoRoundConfig()
    ).eval()
    layer = kernel.model.layers[0].mlp.down_proj
    assert type(layer).__module__.startswith("auto_round_kernel")
    found = load_model(awq, window=WINDOW, precision="float32", device="cpu").eval()
    for document in Documents(chain.tokens):
        token_ids = torch.from_numpy(document.input_ids.astype("int64"))[None]
        with torch.no_grad():
            expected = kernel(token_ids).logits
            # Measured at most 6e-6, on the demo's base 2e-5: sums in another order.
            torch.testing.assert_close(found(token_ids).logits, expected, atol=5e-5, rtol=0)


def test_it_is_close_to_the_merged_model_and_closer_than_rounding(awq, chain, merged):
    """Plain rounding, by the same package: each group spans its smallest to its largest weight."""
    found = load_model(awq, window=WINDOW, precision="float32", device="cpu").eval()
    rounded = load_model(chain.merged, window=WINDOW, precision="float32", device="cpu").eval()
    with torch.no_grad():
        for name, layer in rounded.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                groups = layer.weight.view(-1, 64)
                low = groups.amin(1, keepdim=True).clamp(max=0)
                high = groups.amax(1, keepdim=True).clamp(min=0)
                scale = (high - low) / 15
                zero = (-low / scale).round()
                numbers = ((groups / scale).round() + zero).clamp(0, 15)
                layer.weight.copy_(((numbers - zero) * scale).view_as(layer.weight))
    of_awq = divergence(merged, found, chain.tokens)
    of_rounding = divergence(merged, rounded, chain.tokens)
    # Measured: 0.0286 and 0.0329 nats, with random weights, where all channels matter equally.
    assert 0.005 < of_awq < 0.05
    assert of_awq < 0.95 * of_rounding


def test_its_perplexity_is_scored_like_any_links(awq, chain, run_stage, tmp_path):
    scores = {}
    for name, folder in (("merged", chain.merged), ("awq", awq)):
        path = tmp_path / f"{name}.json"
        done = run_stage(
            "workflow_scripts.evaluate.evaluate_perplexity",
            *("--checkpoint", folder, "--facts", chain.facts, "--tokens", chain.tokens),
            *("--settings", "{}", "--threads", 1, "--scores", path),
            *("--token-scores", tmp_path / f"{name}.tokens.parquet"),
        )
        assert done.returncode == 0, done.stderr
        scores[name] = files.read_json(path)
    for key in ("n_scored_tokens", "n_conversations", "piece_tokens"):
        assert scores["awq"][key] == scores["merged"][key]
    assert scores["awq"]["precision"] in ("float32", "float16")
    # Measured: 6.7 % worse, with random weights; a trained model is in tests/workflow.
    assert 1.01 < scores["awq"]["perplexity"] / scores["merged"]["perplexity"] < 1.15


def test_no_calibration_sequence_is_longer_than_the_window(
    chain, quantize, random_documents, write_documents, tmp_path
):
    """With a window of 16, a chat of 40 tokens becomes sequences of 16, 16 and 8."""
    whole = random_documents(tmp_path / "whole.arrow", [40], vocabulary=32_000)[0].input_ids
    pieces = [whole[:16].copy(), whole[16:32].copy(), whole[32:].copy()]
    for piece in pieces:
        piece[0] = whole[0]
    drawn = np.arange(3)
    np.random.default_rng(0).shuffle(drawn)  # the order of calibration
    ordered = [pieces[list(drawn).index(at)] for at in range(3)]
    write_documents(tmp_path / "cut.arrow", ordered, [[(1, len(piece))] for piece in ordered])
    facts = tmp_path / "facts.json"
    Facts.read(chain.facts).changed(sliding_window=16).write(facts)
    made = [
        (quantize(tmp_path / f"{name}.arrow", facts=facts) / "model.safetensors").read_bytes()
        for name in ("whole", "cut")
    ]
    assert made[0] == made[1]


@pytest.fixture
def arguments(chain, tmp_path):
    """Arguments of the stage, for tests to change; afterwards the result must not exist."""
    found = {"--merged": chain.merged, "--facts": chain.facts, "--tokens": chain.tokens}
    found |= {"--settings": "{}", "--awq": tmp_path / "awq"}
    yield found
    assert not (tmp_path / "awq").exists()


def flat(arguments):
    return [part for pair in arguments.items() for part in pair]


def test_a_missing_package_is_named_with_its_version(arguments, ends_with_message, monkeypatch):
    monkeypatch.setitem(sys.modules, "auto_round", None)  # Python's mark for a missing one
    message = ends_with_message(quantize_awq.main, flat(arguments))
    assert "is not in this environment" in message
    lock = (REPOSITORY / "requirements.lock").read_text().splitlines()
    (pinned,) = [line for line in lock if line.startswith("auto-round==")]
    assert f"pip install -r requirements.lock (or {pinned} alone)" in message


@pytest.mark.parametrize(
    ("facts", "settings", "parts"),
    [
        (
            {"intermediate_size": 11_040},
            "{}",
            ["intermediate_size 11040", "(128)", "awq.group_size: 32"],
        ),
        ({"hidden_size": 240, "head_dim": 30}, '{"group_size": 64}', ["awq.use: false"]),
        ({"n_heads": 1, "head_dim": 192}, '{"group_size": 128}', ["192", "awq.group_size: 64"]),
        ({"n_kv_heads": 1, "head_dim": 16}, "{}", ["n_kv_heads × head_dim 16", "32"]),
        ({"n_experts": 8}, "{}", ["mixture", "GGUF quantizes mixtures"]),
    ],
)
def test_a_shape_that_cannot_be_packed_is_refused(
    arguments, ends_with_message, tmp_path, facts, settings, parts
):
    path = tmp_path / "facts.json"
    Facts.read(arguments["--facts"]).changed(**facts).write(path)
    arguments |= {"--facts": path, "--settings": settings}
    message = ends_with_message(quantize_awq.main, flat(arguments))
    assert "to fix:" in message and str(path) in message
    for part in parts:
        assert part in message


def test_a_split_without_chats_is_a_stage_error(
    arguments, ends_with_message, write_documents, tmp_path
):
    write_documents(tmp_path / "none.arrow", [], [])
    arguments["--tokens"] = tmp_path / "none.arrow"
    message = ends_with_message(quantize_awq.main, flat(arguments))
    assert "no text to calibrate on" in message and "none.arrow" in message


def test_a_layer_that_was_skipped_is_an_error(awq, chain):
    facts = Facts.read(chain.facts)
    awq_noun.check_packed(awq, facts)
    with pytest.raises(StageError, match="not every linear layer") as caught:
        awq_noun.check_packed(awq, facts.changed(n_layers=3))
    assert "14 packed" in str(caught.value) and "21" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no warning")
def test_the_log_says_that_a_7b_takes_hours_on_a_cpu(caplog):
    awq_noun.tell_duration(MISTRAL_7B, 65_536, quantize_awq.logger)
    (hours,) = re.findall(r"duration_hours=([\d.e+]+)", caplog.text)
    assert 1 < float(hours) < 10_000
    assert "awq.n_tokens" in caplog.text


def test_help_starts_without_torch_or_auto_round(ask_for_help):
    done, imported = ask_for_help(MODULE)
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "auto_round", "numpy"}
