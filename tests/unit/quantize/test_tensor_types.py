from __future__ import annotations

import ctypes
import shutil
from typing import get_args

import numpy as np
import pytest

from tests.facts import MISTRAL_7B, facts_of
from tests.unit.train.mixtral import tiny_mixtral
from workflow_scripts.log import StageError
from workflow_scripts.quantize import convert_gguf, quantizer, tensor_types
from workflow_scripts.settings import NEED_IMATRIX, MixSettings
from workflow_scripts.settings.export import QuantizationType

TYPES = get_args(QuantizationType)
# Enough layers for the first eighth, the last, and every third between them to differ.
DENSE = MISTRAL_7B.changed(
    n_layers=9, hidden_size=256, intermediate_size=512, n_heads=8, n_kv_heads=2, head_dim=32,
    vocabulary_size=64, context_tokens=512,
)  # fmt: skip
NARROW = {"hidden_size": 192, "intermediate_size": 352, "head_dim": 24}
EXPERTS = {"n_experts": 8, "n_experts_per_token": 2, "n_layers": 3}
# Row lengths: hidden (most matrices), feed-forward (down projection), heads · head_dim (output of
# attention).
KINDS = {
    "blocks of 256": {},
    "blocks of 32": NARROW,
    "the way down alone": {"intermediate_size": 416},
    "no blocks": {"hidden_size": 72, "intermediate_size": 176, "head_dim": 18},
    "tied": {"hidden_size": 320, "ties_embeddings": True},
    "as many kv heads": {"n_kv_heads": 8},
    "experts": EXPERTS,
    "narrow experts": EXPERTS | NARROW,
}


def quantized_types(gguf, mix, folder, *, has_imatrix):
    """Types that the quantizer itself writes, from its file's table; None if it refuses."""
    import llama_cpp

    params = quantizer.parameters(mix)
    importance = importance_of(gguf)
    if has_imatrix:
        params.imatrix = quantizer.imatrix_entries(importance)
    target = folder / "quantized.gguf"
    code = llama_cpp.llama_model_quantize(
        str(gguf).encode(), str(target).encode(), ctypes.byref(params)
    )
    if code:
        return None
    return {name: tensor.type for name, tensor in quantizer.tensor_table(target).items()}


def importance_of(gguf):
    """An importance of 1 for every channel of every matrix."""
    from workflow_scripts.quantize import llama_cpp_source

    matrices = {}
    for tensor in llama_cpp_source.gguf_package().GGUFReader(gguf).tensors:
        columns, *_, n_experts = [*map(int, tensor.shape), 1, 1][:3]
        matrices[tensor.name] = np.ones(columns * n_experts, np.float32)
    return matrices


@pytest.fixture(scope="module", params=KINDS)
def shaped(request, tmp_path_factory):
    """A GGUF of zeros with the shapes of a model, and the model's facts."""
    facts = DENSE.changed(**KINDS[request.param])
    gguf = tmp_path_factory.mktemp("shaped") / "shapes.gguf"
    tensor_types.write_shapes(gguf, facts, tensor_types.gguf_shapes(facts))
    return gguf, facts


def test_the_prediction_equals_the_quantizers_file_for_every_type(shaped, tmp_path):
    gguf, facts = shaped
    refused = set()
    for name in TYPES:
        mix = MixSettings(type=name)
        for has_imatrix in (True,) if name in NEED_IMATRIX else (False, True):
            try:
                planned = tensor_types.planned_types(facts, mix, has_imatrix=has_imatrix)
            except StageError:
                planned = None  # the type has no fallback for these widths
            found = quantized_types(gguf, mix, tmp_path, has_imatrix=has_imatrix)
            assert planned == found, (name, has_imatrix)
            refused |= {name} if planned is None else set()
    # Their blocks have 128 weights, and llama.cpp has no fallback type.
    fits = all(shape[-1] % 128 == 0 for shape in tensor_types.gguf_shapes(facts).values())
    assert refused == (set() if fits else {"Q1_0"})


def test_the_prediction_of_a_mix_equals_the_quantizers_file(shaped, tmp_path):
    gguf, facts = shaped
    mix = MixSettings(
        type="Q4_K_M", output="Q8_0", token_embd="Q4_0", tensors={"attn_v": "Q6_K", "ffn": "Q3_K"}
    )
    if facts.hidden_size % 32:
        # llama.cpp does not check `output`, and would abort the whole process.
        with pytest.raises(StageError, match=f"Q8_0 cannot hold rows of {facts.hidden_size}"):
            tensor_types.planned_types(facts, mix, has_imatrix=True)
        return
    planned = tensor_types.planned_types(facts, mix, has_imatrix=True)
    assert planned == quantized_types(gguf, mix, tmp_path, has_imatrix=True)


@pytest.fixture(scope="module")
def convert(tokenizer_v3, tmp_path_factory):
    """`convert(save)`: the F16 GGUF of the checkpoint that `save(folder)` writes, and its facts."""

    def make(save):
        folder = tmp_path_factory.mktemp("converted")
        checkpoint = folder / "checkpoint"
        save(checkpoint)
        for path in tokenizer_v3.iterdir():
            shutil.copyfile(path, checkpoint / path.name)
        facts = facts_of(checkpoint)
        facts.write(folder / "facts.json")
        convert_gguf.main(
            ["--merged", str(checkpoint), "--facts", str(folder / "facts.json")]
            + ["--name", "run", "--gguf", str(folder / "run-F16.gguf")]
        )
        return folder / "run-F16.gguf", facts

    return make


@pytest.mark.parametrize("kind", ["dense", "tied", "mixtral"])
def test_the_shapes_equal_those_that_the_converter_writes(convert, make_checkpoint, tmp_path, kind):
    shape = {"vocab_size": 32_768, "hidden_size": 96, "intermediate_size": 64}

    def save(folder):
        if kind == "mixtral":
            tiny_mixtral(**shape).save_pretrained(folder)
        else:
            make_checkpoint(folder, **shape, tie_word_embeddings=kind == "tied")

    gguf, facts = convert(save)
    written = tmp_path / "shapes.gguf"
    tensor_types.write_shapes(written, facts, tensor_types.gguf_shapes(facts))
    assert quantizer.tensor_table(written) == quantizer.tensor_table(gguf)
    mix = MixSettings(type="Q4_K_M")
    planned = tensor_types.planned_types(facts, mix, has_imatrix=False)
    assert planned == quantized_types(gguf, mix, tmp_path, has_imatrix=False)
    assert "Q5_0" in planned.values() and "Q4_K" not in planned.values()


def test_the_shapes_of_a_real_model_take_no_disk_space():
    """Mistral 7B: its F16 GGUF would take 14.5 GB."""
    planned = tensor_types.planned_types(MISTRAL_7B, MixSettings(type="Q4_K_M"), has_imatrix=True)
    assert planned["output.weight"] == "Q6_K"
    assert planned["blk.10.attn_q.weight"] == "Q4_K"
    assert set(planned.values()) == {"Q4_K", "Q6_K", "F32"}
