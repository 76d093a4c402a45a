from __future__ import annotations

import ctypes
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest
import torch

from workflow_scripts import files
from workflow_scripts.merge import merge_adapter
from workflow_scripts.quantize import convert_adapter, convert_gguf, llama_cpp_source
from workflow_scripts.scoring.likelihood import divergence
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

MODULE = "workflow_scripts.quantize.convert_adapter"
TOKENS = np.random.default_rng(0).integers(3, 32_768, size=60).astype(np.int32)
ADAPTERS = {
    "plain": {"r": 8, "lora_alpha": 16},
    "rslora": {
        "r": 8,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2, "v_proj": 2},  # kv_rank: matched
        "alpha_pattern": {"k_proj": 2, "v_proj": 2},
    },
    "attention": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"v_proj": 3},
    },
}


def run(stage, **arguments):
    flags = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    stage.main(flags)


@pytest.fixture(scope="module")
def base_gguf(chain, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base-F16.gguf"
    run(
        convert_gguf,
        **{"merged": chain.checkpoint, "tokenizer": chain.tokenizer, "facts": chain.facts},
        **{"name": "base", "gguf": path},
    )
    return path


@pytest.fixture(scope="module")
def adapters(chain, make_adapter, tmp_path_factory):
    """Folder of each adapter, by name."""
    return {
        name: make_adapter(chain.checkpoint, tmp_path_factory.mktemp(name), seed=at, **config)
        for at, (name, config) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def converted(chain, adapters, tmp_path_factory):
    """GGUF LoRA of each adapter, by name."""
    folder = tmp_path_factory.mktemp("converted")
    paths = {name: folder / f"{name}.gguf" for name in adapters}
    for name, path in paths.items():
        run(
            convert_adapter,
            **{"adapter": adapters[name], "checkpoint": chain.checkpoint},
            **{"name": name, "gguf": path},
        )
    return paths


class Base(LlamaCppModel):
    """A base that takes adapters at run time, through llama-cpp-python."""

    def logits(self, *adapters):
        n = len(adapters)
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * n)(*adapters)
        scales = (ctypes.c_float * n)(*[1.0] * n)
        code = llama_cpp.llama_set_adapters_lora(self._context, handles, n, scales)
        assert code == 0
        return torch.cat([b.clone() for b in self.logit_blocks(TOKENS, np.arange(60))])

    def load(self, path):
        handle = llama_cpp.llama_adapter_lora_init(self._model, str(path).encode())
        assert handle, path
        return handle


def merged_logits(chain, adapter, folder):
    run(
        merge_adapter,
        **{"checkpoint": chain.checkpoint, "tokenizer": chain.tokenizer, "facts": chain.facts},
        **{"adapter": adapter, "merged": folder / "merged"},
    )
    run(
        convert_gguf,
        **{"merged": folder / "merged", "facts": chain.facts},
        **{"name": "merged", "gguf": folder / "merged.gguf"},
    )
    with Base(folder / "merged.gguf", context_tokens=64, n_threads=1) as model:
        return model.logits()


def live_logits(chain, adapter):
    """Logits of PEFT's model, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(chain.checkpoint, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter))
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS.astype(np.int64))[None]).logits[0]


def test_two_adapters_on_one_base_equal_their_merged_models(
    chain, base_gguf, adapters, converted, tmp_path
):
    with Base(base_gguf, context_tokens=64, n_threads=1) as model:
        plain = model.logits()
        handles = {name: model.load(path) for name, path in converted.items()}
        on_base = {name: model.logits(handle) for name, handle in handles.items()}
        assert torch.equal(model.logits(), plain)  # without an adapter again
    for name, found in on_base.items():
        expected = merged_logits(chain, adapters[name], tmp_path / name)
        # The merged weights are rounded to bfloat16.
        assert divergence(expected, found)[0].mean() < 1e-3
        assert divergence(plain, found)[0].mean() > 1e-2
        kl, agrees = divergence(live_logits(chain, adapters[name]), found)
        assert kl.mean() < 1e-5
        assert agrees.double().mean() > 0.95


def test_a_plain_lora_is_converted_unchanged_to_the_bit(chain, adapters, converted, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).symlink_to(adapters["plain"] / name)
    script = llama_cpp_source.converter("convert_lora_to_gguf.py")
    command = [sys.executable, script, "--base", chain.checkpoint, "--outfile", tmp_path / "a.gguf"]
    subprocess.run([*command, folder], check=True, capture_output=True)
    read = llama_cpp_source.gguf_package().GGUFReader
    ours, theirs = (
        {one.name: one.data.tobytes() for one in read(path).tensors}
        for path in (converted["plain"], tmp_path / "a.gguf")
    )
    assert ours == theirs and len(ours) == 28


def test_the_metadata_describes_the_file(converted):
    reader = llama_cpp_source.gguf_package().GGUFReader(converted["rslora"])
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.lora.alpha"] == 4
    assert fields["general.name"] == "Rslora"


def test_the_experts_of_a_mixture_are_adapted(mixtral_gguf, train, tokenizer_v3, tmp_path):
    checkpoint, facts = mixtral_gguf.parent / "checkpoint", mixtral_gguf.parent / "facts.json"
    adapter = train(checkpoint, method="lora", adapts_experts=True, rslora=True)
    run(
        convert_adapter,
        **{"adapter": adapter, "checkpoint": checkpoint},
        **{"name": "experts", "gguf": tmp_path / "experts.gguf"},
    )
    with Base(mixtral_gguf, context_tokens=64, n_threads=1) as model:
        plain = model.logits()
        found = model.logits(model.load(tmp_path / "experts.gguf"))
    run(
        merge_adapter,
        **{"checkpoint": checkpoint, "tokenizer": tokenizer_v3, "facts": facts},
        **{"adapter": adapter, "merged": tmp_path / "merged"},
    )
    run(
        convert_gguf,
        **{"merged": tmp_path / "merged", "facts": facts},
        **{"name": "merged", "gguf": tmp_path / "merged.gguf"},
    )
    with Base(tmp_path / "merged.gguf", context_tokens=64, n_threads=1) as model:
        expected = model.logits()
    # For some tokens a near tie of the router may go the other way, so the median counts.
    assert divergence(expected, found)[0].median() < 1e-3
    assert divergence(plain, found)[0].median() > 1e-2


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        ({"dora": True}, "self_attn.k_proj"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"method": "full"}, "embed_tokens"),
    ],
    ids=["DoRA", "modules_to_save", "full fine-tune"],
)
def test_an_adapter_that_is_more_than_a_lora_is_refused(
    checkpoint, train, tmp_path, ends_with_message, recipe, found
):
    folder = train(checkpoint, **{"method": "lora", **recipe})
    gguf = tmp_path / "adapter.gguf"
    message = ends_with_message(
        convert_adapter.main,
        ["--adapter", folder, "--checkpoint", checkpoint, "--name", "a", "--gguf", gguf],
    )
    assert "more than a LoRA" in message and found in message
    assert "use the merged model's GGUF" in message
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_the_converter_cannot_read_leaves_no_file(
    checkpoint, uniform_adapter, tmp_path, ends_with_message
):
    broken = tmp_path / "checkpoint"
    broken.mkdir()
    config = files.read_json(checkpoint / "config.json") | {"architectures": ["UnknownForCausalLM"]}
    files.write_json(broken / "config.json", config)
    arguments = ["--adapter", uniform_adapter, "--checkpoint", broken, "--name", "a"]
    message = ends_with_message(
        convert_adapter.main, [*arguments, "--gguf", tmp_path / "out" / "a.gguf"]
    )
    assert "llama.cpp's converter failed" in message and str(uniform_adapter) in message
    assert list((tmp_path / "out").iterdir()) == []


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help(MODULE)
    assert done.returncode == 0
    assert not imported & {"torch", "transformers"}
