"""RoPE scaling in the GGUF: llama.cpp computes the same as transformers beyond the context of the
base."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from tests.facts import facts_of
from workflow_scripts.handover.facts import Facts
from workflow_scripts.log import StageError
from workflow_scripts.merge import merge_adapter
from workflow_scripts.quantize import convert_gguf
from workflow_scripts.scoring.likelihood import divergence
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.scoring.transformers_model import TransformersModel
from workflow_scripts.settings import RopeScalingSettings

ORIGINAL = 128
TOKENS = np.random.default_rng(0).integers(3, 32_768, size=480).astype(np.int32)


@pytest.fixture(scope="module")
def base(make_checkpoint, tmp_path_factory):
    """A Mistral with 128 tokens of context, no window, and a low θ, so that YaRN treats pairs in
    all its ways."""
    return make_checkpoint(
        tmp_path_factory.mktemp("short"),
        vocab_size=32_768,
        sliding_window=None,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )


@pytest.fixture(scope="module")
def exported(base, make_adapter, tokenizer_v3, tmp_path_factory):
    """`exported(kind)`: facts, adapter and merged folder of the base, stretched fourfold."""
    adapter = make_adapter(base, tmp_path_factory.mktemp("adapter"))

    def export(kind):
        folder = tmp_path_factory.mktemp(kind)
        scaling = RopeScalingSettings(type=kind, factor=4)
        facts_of(base, scaling).write(folder / "facts.json")
        merge_adapter.main(
            ["--checkpoint", str(base), "--facts", str(folder / "facts.json")]
            + ["--tokenizer", str(tokenizer_v3), "--adapter", str(adapter)]
            + ["--merged", str(folder / "merged")]
        )
        return folder, adapter

    return export


def convert(folder):
    convert_gguf.main(
        ["--merged", str(folder / "merged"), "--facts", str(folder / "facts.json")]
        + ["--name", "stretched", "--gguf", str(folder / "stretched.gguf")]
    )
    return folder / "stretched.gguf"


def logits(model):
    positions = np.arange(len(TOKENS))
    return torch.cat([block.clone() for block in model.logit_blocks(TOKENS, positions)])


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_llama_cpp_computes_the_trained_model_beyond_the_bases_context(base, exported, kind):
    folder, adapter = exported(kind)
    facts = Facts.read(folder / "facts.json")
    trained = TransformersModel(
        base, window=None, precision="float32", rope=facts.rope_parameters, adapter=adapter
    )
    expected = logits(trained)
    unscaled = logits(TransformersModel(base, window=None, precision="float32", adapter=adapter))
    with LlamaCppModel(convert(folder), context_tokens=480, n_threads=1) as model:
        assert model.metadata("llama.context_length") == "512"
        assert model.metadata("llama.rope.scaling.type") == kind
        assert float(model.metadata("llama.rope.scaling.factor")) == 4
        if kind == "yarn":
            assert model.metadata("llama.rope.scaling.original_context_length") == str(ORIGINAL)
        found = logits(model)
    kl, _ = divergence(expected, found)
    # Measured 1.8e-5 (linear) and 2.3e-5 nats (YaRN): weights rounded to 16 bits, keys and values
    # in F16. The divergence does not grow beyond the base's context.
    assert kl.mean() < 1e-4
    assert kl[ORIGINAL:].mean() < 1e-4
    # Measured 0.5 and 0.6 from the same model without stretched positions.
    mistaken, _ = divergence(unscaled, found)
    assert mistaken[ORIGINAL:].mean() > 100 * kl.mean()


def test_llama_cpp_applies_yarns_attention_factor_by_itself(base, exported):
    """Both use 0.1 · ln(factor) + 1 by themselves; if the file also named it, it would count
    twice."""
    folder, adapter = exported("yarn")
    rope = Facts.read(folder / "facts.json").rope_parameters
    with LlamaCppModel(convert(folder), context_tokens=480, n_threads=1) as model:
        found = logits(model)
        with pytest.raises(StageError, match="lacks metadata"):
            model.metadata("llama.rope.scaling.attn_factor")
    for factor, is_right in ((1.0, False), (0.1 * math.log(4) + 1, True)):
        reference = TransformersModel(
            base,
            window=None,
            precision="float32",
            rope={**rope, "attention_factor": factor},
            adapter=adapter,
        )
        kl, _ = divergence(logits(reference), found)
        assert (kl.mean() < 1e-4) == is_right, factor


def test_dynamic_scaling_stops_before_the_converter(exported, ends_with_message):
    folder, _ = exported("dynamic")
    gguf = folder / "stretched.gguf"
    message = ends_with_message(
        convert_gguf.main,
        ["--merged", folder / "merged", "--facts", folder / "facts.json", "--name", "m"]
        + ["--gguf", gguf],
    )
    for part in ("GGUF has no form of dynamic NTK", "config.json", "rope_scaling.type", "yarn"):
        assert part in message
    assert not gguf.exists()


def test_a_model_merged_before_the_scaling_is_not_converted(exported, base, ends_with_message):
    folder, _ = exported("yarn")
    shutil.copyfile(base / "config.json", folder / "merged" / "config.json")
    message = ends_with_message(
        convert_gguf.main,
        ["--merged", folder / "merged", "--facts", folder / "facts.json", "--name", "m"]
        + ["--gguf", folder / "stretched.gguf"],
    )
    assert "positions are not those it was trained with" in message
    assert "merge again" in message
