from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from workflow_scripts import files
from workflow_scripts.handover.facts import Facts
from workflow_scripts.log import StageError
from workflow_scripts.quantize import gguf_contents, llama_cpp_source


@pytest.fixture
def check(chain):
    def run(gguf=chain.gguf, merged=chain.merged):
        return gguf_contents.check(gguf, merged, Facts.read(chain.facts))

    return run


@pytest.fixture
def damaged(chain, tmp_path):
    """`damaged(change)`: a copy of the GGUF after `change(tensors, fields)` wrote into it."""

    def make(change):
        path = shutil.copyfile(chain.gguf, tmp_path / "damaged.gguf")
        reader = llama_cpp_source.gguf_package().GGUFReader(path, "r+")
        change({tensor.name: tensor.data for tensor in reader.tensors}, reader.fields)
        reader.data.flush()
        return path

    return make


def value(fields, key):
    """A number of the metadata, as a view of the file's memory."""
    return fields[key].parts[fields[key].data[0]]


def test_the_file_converted_from_the_merged_model_holds_every_tensor_of_it(check, chain):
    report = check()
    n_layers = files.read_json(chain.merged / "config.json")["num_hidden_layers"]
    # Two norms and seven matrices per layer, embeddings, last norm, output layer.
    assert report.n_tensors == 9 * n_layers + 3
    assert report.n_vocabulary_entries == 32_768
    assert report.n_metadata_keys > 10


def another_layer(tensors, _):
    tensors["blk.0.ffn_down.weight"][:] = tensors["blk.1.ffn_down.weight"]


def one_bit(tensors, _):
    tensors["blk.1.ffn_up.weight"].view(np.uint16)[3, 5] ^= 1


def a_rare_word(tensors, _):
    tensors["token_embd.weight"][31_000] = 0


def unpermuted(tensors, _):
    keys = tensors["blk.1.attn_k.weight"]
    size = keys.shape[0] // 2  # rows of one of two heads
    halves = [np.concatenate([head[0::2], head[1::2]]) for head in (keys[:size], keys[size:])]
    keys[:] = np.concatenate(halves)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (another_layer, "blk.0.ffn_down.weight"),
        (one_bit, "blk.1.ffn_up.weight, element [3, 5]"),
        (a_rare_word, "token_embd.weight, element [31000, 0]"),
        (unpermuted, "blk.1.attn_k.weight"),
    ],
)
def test_a_tensor_that_differs_in_one_bit_is_named(check, damaged, change, name):
    with pytest.raises(
        StageError, match="a tensor of the GGUF differs from the merged model's"
    ) as error:
        check(damaged(change))
    assert name in str(error.value)
    assert "elements differ" in str(error.value)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("llama.rope.freq_base", 1e6),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5),
        ("llama.context_length", 512),
        ("llama.attention.head_count_kv", 8),
        ("tokenizer.ggml.bos_token_id", 3),
        ("tokenizer.ggml.eos_token_id", 3),
    ],
)
def test_metadata_that_differs_is_named(check, damaged, key, wrong):
    def change(_, fields):
        assert value(fields, key)[0] != wrong
        value(fields, key)[0] = wrong

    with pytest.raises(
        StageError, match="the GGUF's metadata differs from the merged model's"
    ) as error:
        check(damaged(change))
    assert key in str(error.value)


def test_a_template_that_differs_in_one_character_is_shown_from_there(check, damaged):
    def change(_, fields):
        text = fields["tokenizer.chat_template"].parts[-1]
        text[bytes(text).index(b"[TOOL_RESULTS]") + 1] = ord("t")

    with pytest.raises(StageError, match="tokenizer.chat_template, character ") as error:
        check(damaged(change))
    _, found, expected, _ = str(error.value).split("\n")[1:]
    assert found.startswith('  found:    "tOOL_RESULTS]')
    assert expected.startswith('  expected: "TOOL_RESULTS]')


def test_the_score_of_one_piece_is_compared(check, damaged):
    def change(_, fields):
        scores = fields["tokenizer.ggml.scores"]
        scores.parts[scores.data[30_000]][0] = -5

    with pytest.raises(
        StageError, match="the GGUF's tokenizer differs from the merged model's"
    ) as error:
        check(damaged(change))
    assert "token 30000" in str(error.value)


def with_weights(chain, folder, change):
    """A copy of the merged folder with other weights."""
    merged = shutil.copytree(chain.merged, folder)
    tensors = load_file(merged / "model.safetensors")
    change(tensors)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    return merged


def test_a_weight_that_float16_cannot_hold_is_named(check, chain, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 7e4

    merged = with_weights(chain, tmp_path / "large", change)
    with pytest.raises(StageError, match="do not fit into float16") as error:
        check(merged=merged)
    assert "model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "1 weights, the largest 7.014e+04" in str(error.value)


def test_an_extra_or_missing_tensor_is_named(check, chain, tmp_path):
    merged = with_weights(
        chain, tmp_path / "less", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")
    )
    with pytest.raises(StageError, match="has tensors that the merged model lacks") as error:
        check(merged=merged)
    assert "blk.1.ffn_up.weight" in str(error.value)

    def change(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(4, 4)

    with pytest.raises(StageError, match="lacks a tensor of the merged model") as error:
        check(merged=with_weights(chain, tmp_path / "more", change))
    assert "no blk.2.ffn_up.weight" in str(error.value)


def test_a_mixture_s_experts_are_compared_one_by_one(mixtral_gguf, tmp_path):
    merged = mixtral_gguf.parent / "checkpoint"
    facts = Facts.read(mixtral_gguf.parent / "facts.json")
    report = gguf_contents.check(mixtral_gguf, merged, facts)
    # Per layer: two norms, four of attention, the router, and three for all experts.
    assert report.n_tensors == 10 * 2 + 3

    path = shutil.copyfile(mixtral_gguf, tmp_path / "damaged.gguf")
    reader = llama_cpp_source.gguf_package().GGUFReader(path, "r+")
    experts = next(one.data for one in reader.tensors if one.name == "blk.1.ffn_down_exps.weight")
    experts[[0, 2]] = experts[[2, 0]]
    reader.data.flush()
    with pytest.raises(StageError, match="blk.1.ffn_down_exps.weight"):
        gguf_contents.check(path, merged, facts)
