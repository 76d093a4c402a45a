from __future__ import annotations

import json
import re
from typing import get_args

import numpy as np
import pytest
import torch

from workflow_scripts.quantize import llama_cpp_source, quantize_gguf, quantizer
from workflow_scripts.scoring.likelihood import divergence
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.settings import IGNORE_IMATRIX, NEED_IMATRIX, QuantizationType, TensorType

MODULE = "workflow_scripts.quantize.quantize_gguf"
TOKENS = np.random.default_rng(0).integers(3, 32_768, size=60).astype(np.int32)
TYPES = get_args(QuantizationType)
FIVE = ("Q8_0", "Q5_0", "Q4_K_M", "IQ4_XS", "IQ2_XXS")
MIX = {
    "type": "Q4_K_M",
    "output": "Q8_0",
    "token_embd": "Q6_K",
    "tensors": {r"blk\.1\.attn_[qk]": "IQ3_XXS", "attn": "Q5_K", "ffn_down": "Q8_0"},
}


@pytest.fixture(scope="session")
def quantize(run_stage, tmp_path_factory):
    """`quantize(gguf, imatrix=None, **mix)`: the finished process and the file it was to write."""

    def run(gguf, *, imatrix=None, **mix):
        path = tmp_path_factory.mktemp("quantized") / "model.gguf"
        arguments = ["--gguf", gguf, "--settings", json.dumps(mix), "--threads", 1]
        arguments += ["--imatrix", imatrix] if imatrix else []
        return run_stage(MODULE, *arguments, "--quantized", path), path

    return run


@pytest.fixture(scope="session")
def quantized(quantize):
    """Like `quantize`, but returns only the file."""

    def run(gguf, **how):
        done, path = quantize(gguf, **how)
        assert done.returncode == 0, done.stderr
        return path

    return run


@pytest.fixture(scope="session")
def reference(llama_tool, tmp_path_factory):
    """`reference(gguf, type, *options)`: file of llama.cpp's own llama-quantize."""

    def run(gguf, kind, *options):
        path = tmp_path_factory.mktemp("reference") / "model.gguf"
        llama_tool("quantize", *options, gguf, path, kind, 1)
        return path

    return run


def logits(path):
    with LlamaCppModel(path, context_tokens=64, n_threads=1) as model:
        return torch.cat([b.clone() for b in model.logit_blocks(TOKENS, np.arange(60))])


def tensors(path):
    """Type and bytes of each tensor by name, without the metadata."""
    reader = llama_cpp_source.gguf_package().GGUFReader(path)
    return {one.name: (one.tensor_type.name, one.data.tobytes()) for one in reader.tensors}


def test_each_type_is_smaller_and_further_from_the_source_than_the_one_before(chain, quantized):
    paths = [chain.gguf, *(quantized(chain.gguf, type=kind) for kind in ("Q8_0", "Q4_K_M"))]
    sizes = [path.stat().st_size for path in paths]
    assert sizes[1] < 0.6 * sizes[0] and sizes[2] < 0.75 * sizes[1]
    expected = logits(chain.gguf)
    errors = [divergence(expected, logits(path))[0].mean().item() for path in paths]
    # Random weights quantize badly: measured 0.0004 and 0.04 nats.
    assert errors[0] == 0 < errors[1] < 0.01 < errors[2] < 1


def test_the_metadata_equal_the_sources_except_for_the_type(chain, quantized):
    for kind, file_type in (("Q8_0", "7"), ("Q4_K_M", "15")):
        path = quantized(chain.gguf, type=kind)
        with LlamaCppModel(path, context_tokens=16, n_threads=1) as model:
            assert model.metadata("general.file_type") == file_type
            assert model.metadata("llama.context_length") == "300"
            assert (
                model.metadata("tokenizer.chat_template")
                == (chain.merged / "chat_template.jinja").read_text()
            )


@pytest.mark.parametrize("kind", [kind for kind in FIVE if kind not in NEED_IMATRIX])
def test_without_an_imatrix_a_file_equals_llama_quantizes_to_the_bit(
    chain, quantized, reference, kind
):
    ours, theirs = quantized(chain.gguf, type=kind), reference(chain.gguf, kind)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("kind", FIVE)
def test_with_an_imatrix_file_and_metadata_equal_llama_quantizes_to_the_bit(
    chain, quantized, reference, imatrix_of, text, kind
):
    imatrix = imatrix_of(chain.gguf)
    ours = quantized(chain.gguf, imatrix=imatrix, type=kind)
    theirs = reference(chain.gguf, kind, "--imatrix", imatrix)
    assert ours.read_bytes() == theirs.read_bytes()
    with LlamaCppModel(ours, context_tokens=16, n_threads=1) as model:
        # llama.cpp keeps 127 bytes of a text.
        assert model.metadata("quantize.imatrix.file") == str(imatrix)[:127]
        assert model.metadata("quantize.imatrix.dataset") == str(text)[:127]
        assert model.metadata("quantize.imatrix.entries_count") == "14"
        assert model.metadata("quantize.imatrix.chunks_count") == "4"


def test_a_mixture_equals_llama_quantizes_to_the_bit_with_any_buffer(
    mixtral_gguf, reference, imatrix_of, monkeypatch, tmp_path, as_json
):
    imatrix = imatrix_of(mixtral_gguf)
    expected = reference(mixtral_gguf, "Q3_K_M", "--imatrix", imatrix).read_bytes()
    # 100 kB end within an expert, and every expert has a separate importance.
    for n_bytes, n_threads in ((quantize_gguf.BUFFER_BYTES, 1), (100_000, 2)):
        monkeypatch.setattr(quantize_gguf, "BUFFER_BYTES", n_bytes)
        arguments = ["--gguf", mixtral_gguf, "--settings", as_json(type="Q3_K_M")]
        arguments += ["--imatrix", imatrix, "--threads", n_threads]
        arguments += ["--quantized", tmp_path / "model.gguf"]
        quantize_gguf.main([str(argument) for argument in arguments])
        assert (tmp_path / "model.gguf").read_bytes() == expected


def test_a_mix_equals_llama_quantizes_with_the_same_options_to_the_bit(
    chain, quantized, reference, imatrix_of
):
    imatrix = imatrix_of(chain.gguf)
    ours = quantized(chain.gguf, imatrix=imatrix, **MIX)
    options = ["--imatrix", imatrix, "--output-tensor-type", "q8_0"]
    options += ["--token-embedding-type", "q6_k"]
    for pattern, kind in MIX["tensors"].items():
        options += ["--tensor-type", f"{pattern}={kind}"]
    theirs = reference(chain.gguf, "Q4_K_M", *options)
    assert ours.read_bytes() == theirs.read_bytes()
    kinds = {name: kind for name, (kind, _) in tensors(ours).items()}
    assert kinds["output.weight"] == "Q8_0" and kinds["token_embd.weight"] == "Q6_K"
    assert kinds["blk.1.attn_k.weight"] == "IQ3_XXS"
    assert kinds["blk.0.attn_k.weight"] == kinds["blk.1.attn_v.weight"] == "Q5_K"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_an_imatrix_of_the_same_text_brings_a_quantization_closer(
    chain, quantized, imatrix_of, text
):
    with LlamaCppModel(chain.gguf, context_tokens=16, n_threads=1) as model:
        tokens = model.tokenize(text.read_text(), adds_bos=True, parses_control=False)
    tokens = np.array(tokens[:300], dtype=np.int32)

    def scored(path):
        with LlamaCppModel(path, context_tokens=300, n_threads=1) as model:
            return torch.cat([b.clone() for b in model.logit_blocks(tokens, np.arange(300))])

    expected = scored(chain.gguf)
    without, with_one = (
        divergence(expected, scored(quantized(chain.gguf, imatrix=one, type="Q2_K")))[0].mean()
        for one in (None, imatrix_of(chain.gguf))
    )
    assert with_one < without


def test_the_types_are_exactly_those_of_llama_quantize():
    source = llama_cpp_source.source_folder() / "tools/quantize/quantize.cpp"
    table = source.read_text().split("QUANT_OPTIONS = {")[1].split("\n};")[0]
    offered = set(re.findall(r'\{ "(\w+)",', table))
    aliases = {"Q3_K", "Q4_K", "Q5_K"}
    assert set(TYPES) == offered - aliases - {"F16", "COPY"}  # F16 is the source


def test_the_tensor_types_are_those_that_ggml_quantizes_to():
    numbers = {name: quantizer.tensor_type(name) for name in get_args(TensorType)}
    kinds = llama_cpp_source.gguf_package().GGMLQuantizationType
    assert numbers == {name: kinds[name].value for name in numbers}


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_needs_an_imatrix_exactly_if_llama_cpp_requires_one(chain, llama_tool, kind):
    done = llama_tool("quantize", "--dry-run", chain.gguf, kind)
    assert ("will require an imatrix" in done.stdout + done.stderr) == (kind in NEED_IMATRIX)


def test_a_type_without_the_imatrix_that_it_needs_is_a_stage_error(chain, quantize):
    done, path = quantize(chain.gguf, type="IQ2_XXS")
    assert done.returncode == 1
    assert "requires an importance matrix" in done.stderr  # llama.cpp's own words
    assert "quantizer failed" in done.stderr and "Traceback" not in done.stderr
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("mix", "parts"),
    [
        ({"type": "Q4_K_XL"}, ["type: found 'Q4_K_XL'", "did you mean 'Q4_K_S'"]),
        ({"type": "Q4_K_M", "output": "Q4_K_M"}, ["output: found 'Q4_K_M'", "'Q4_K'"]),
        ({"type": "Q4_K_M", "output": "IQ1_S"}, ["output: IQ1_S needs an importance matrix"]),
        ({"type": "BF16", "tensors": {"attn": "Q8_0"}}, ["none with `type: BF16`"]),
        ({"type": "Q8_0", "tensors": {"attn(": "Q8_0"}}, ["'attn(' is not a regular expression"]),
        (
            {"type": "Q8_0", "tensors": {"self_attn": "Q4_K"}},
            ["a pattern finds no tensor", "self_attn", "blk.0.attn_k.weight"],
        ),
        (
            {"type": "Q8_0", "tensors": {"weight": "IQ2_XXS"}, "output": "Q8_0"},
            ["IQ2_XXS needs an importance matrix", "found:    token_embd.weight"],
        ),
    ],
    ids=lambda value: "" if isinstance(value, list) else json.dumps(value),
)
def test_a_mix_that_cannot_be_made_is_a_stage_error(chain, quantize, mix, parts):
    done, path = quantize(chain.gguf, **mix)
    assert done.returncode == 1
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert list(path.parent.iterdir()) == []


def test_a_source_that_is_not_a_gguf_is_a_stage_error_and_leaves_no_file(quantize, tmp_path):
    source = tmp_path / "broken.gguf"
    source.write_bytes(b"GGUF" + bytes(100))
    for mix, message in (({}, "quantizer failed"), ({"tensors": {"a": "Q8_0"}}, "cannot be read")):
        done, path = quantize(source, type="Q8_0", **mix)
        assert done.returncode == 1
        assert message in done.stderr and str(source) in done.stderr
        assert list(path.parent.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_equals_llama_quantizes_and_loads(chain, quantized, reference, imatrix_of, kind):
    imatrix = imatrix_of(chain.gguf)
    ours = quantized(chain.gguf, imatrix=imatrix, type=kind)
    assert ours.read_bytes() == reference(chain.gguf, kind, "--imatrix", imatrix).read_bytes()
    assert torch.isfinite(logits(ours)).all()
    if kind not in NEED_IMATRIX:
        changes = tensors(ours) != tensors(quantized(chain.gguf, type=kind))
        assert changes == (kind not in IGNORE_IMATRIX)


def test_help_starts_without_torch_or_llama_cpp(ask_for_help):
    done, imported = ask_for_help(MODULE)
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp", "gguf"}
