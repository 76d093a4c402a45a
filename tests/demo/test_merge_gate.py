"""The merge gate on real weights: right merges pass whoever made them, and each wrong one is named.

The base and adapters are those of a finished demo build. The tables in docs/gates.md are its
output: `python -m pytest tests/demo/test_merge_gate.py -rP`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.demo.conftest import BASE, DTYPES, RESULTS
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.merge import exact_merge, merge_adapter, merge_base as merge_bases
from workflow_scripts.merge.live_adapter import LiveAdapter
from workflow_scripts.merge.stored_tensors import StoredTensors
from workflow_scripts.settings import MergeGateSettings

FACTS = RESULTS / "models" / "demo" / "facts.json"
TOKENIZER = RESULTS / "models" / "demo" / "tokenizer"
ADAPTERS = {run: RESULTS / "runs" / run / "adapter" for run in ("mistral", "generic")}
LAYER = "model.layers.17"


@pytest.fixture(scope="module")
def dora(bases, tmp_path_factory) -> Path:
    """The adapter of the demo with magnitudes, a few per cent off the rows' lengths."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import MistralForCausalLM

    folder = tmp_path_factory.mktemp("dora")
    base = MistralForCausalLM.from_pretrained(bases["bfloat16"], dtype=torch.float32)
    config = LoraConfig.from_pretrained(str(ADAPTERS["mistral"]))
    config.use_dora = True
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3, generator=generator)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.03 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(model, PeftModel)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def later(tmp_path_factory) -> Path:
    """The adapter of the demo two optimizer steps further: of it, the demo's own is an earlier
    checkpoint."""
    from peft import PeftModel
    from transformers import MistralForCausalLM

    from workflow_scripts.tokens.documents import Documents

    documents = Documents(RESULTS / "data" / "stdlib-help" / "demo" / "tokens" / "train.arrow")
    base = MistralForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, ADAPTERS["mistral"], is_trainable=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for document in list(documents)[:2]:
        tokens = torch.from_numpy(document.input_ids[:256].astype("int64"))[None]
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("later")
    model.save_pretrained(folder)
    return folder


def merged_by_us(base: Path, adapter: Path, folder: Path, merge_base: str = "original") -> Path:
    merge_adapter.main(
        ["--checkpoint", str(base), "--facts", str(FACTS), "--tokenizer", str(TOKENIZER)]
        + ["--adapter", str(adapter), "--merge-base", merge_base, "--merged", str(folder)]
    )
    return folder


def merged_by_peft(base: Path, adapter: Path, folder: Path, dtype: str, *, is_safe: bool) -> Path:
    from peft import PeftModel
    from transformers import MistralForCausalLM

    model = MistralForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=is_safe)
    merged.save_pretrained(folder)
    return folder


def judged(
    base: Path, adapter: Path, merged: Path, *, precision: str = "nf4", merge_base: str = "original"
) -> exact_merge.ExactResult:
    """The exact half of the gate, as the gate calls it."""
    base_name = merge_bases.chosen(merge_base)
    return exact_merge.check(merged, base, adapter, base_name, has_two_bases=precision == "nf4")


def with_config(adapter: Path, folder: Path, **changed: Any) -> Path:
    shutil.copytree(adapter, folder)
    config = files.read_json(folder / "adapter_config.json")
    files.write_json(folder / "adapter_config.json", config | changed)
    return folder


def edited(merged: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(merged.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (merged / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    return merged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merge_base", ["original", "dequantized"])
def test_our_merge_passes(bases, tmp_path, dtype, merge_base):
    merged = merged_by_us(bases[dtype], ADAPTERS["mistral"], tmp_path / "merged", merge_base)
    found = judged(bases[dtype], ADAPTERS["mistral"], merged, merge_base=merge_base)
    print(f"{dtype}, {merge_base}: {found}")
    assert found.n_adapted_tensors == 210 and found.rounding == "once"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_safe", [False, True], ids=["merge_and_unload", "safe_merge"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_s_merge_passes(bases, dora, tmp_path, dtype, is_safe, kind):
    adapter = dora if kind == "dora" else ADAPTERS["mistral"]
    merged = merged_by_peft(bases[dtype], adapter, tmp_path / "merged", dtype, is_safe=is_safe)
    found = judged(bases[dtype], adapter, merged)
    print(f"PEFT, {kind}, {dtype}, safe_merge={is_safe}: {found}")
    rounds_first = is_safe and kind == "lora" and dtype != "float32"
    assert found.n_adapted_tensors == 210
    assert found.rounding == ("change_first" if rounds_first else "once")


@pytest.fixture
def refused(bases, capsys) -> Callable[..., str]:
    """The message of the gate about a merge into the bfloat16 base."""

    def run(merged: Path, adapter: Path = ADAPTERS["mistral"]) -> str:
        with pytest.raises(StageError) as caught:
            judged(bases["bfloat16"], adapter, merged)
        message = str(caught.value)
        assert message.startswith("the merged model differs from base + adapter")
        print(next(line for line in message.splitlines() if "found:" in line))
        return message

    return run


@pytest.fixture
def merge(bases, tmp_path) -> Callable[[Path], Path]:
    return lambda adapter: merged_by_us(bases["bfloat16"], adapter, tmp_path / "merged")


def test_a_doubled_alpha_is_named(merge, refused, tmp_path):
    alpha = files.read_json(ADAPTERS["mistral"] / "adapter_config.json")["lora_alpha"]
    patterns = files.read_json(ADAPTERS["mistral"] / "adapter_config.json")["alpha_pattern"]
    doubled = with_config(
        ADAPTERS["mistral"],
        tmp_path / "doubled",
        lora_alpha=2 * alpha,
        alpha_pattern={name: 2 * value for name, value in patterns.items()},
    )
    message = refused(merge(doubled))
    assert "210 of 272 tensors" in message and "has the adapter's change 2 times" in message
    assert message.count("numbers)") == 1  # one cause for all of them


def test_k_and_v_without_their_alpha_pattern_are_named(merge, refused, tmp_path):
    message = refused(merge(with_config(ADAPTERS["mistral"], tmp_path / "plain", alpha_pattern={})))
    assert "60 of 272 tensors: model.layers.{0-29}.self_attn.k_proj.weight" in message
    assert "has the adapter's change 3 times" in message


def test_one_projection_left_out_is_named(bases, merge, refused):
    name = f"{LAYER}.self_attn.k_proj.weight"
    original = StoredTensors(bases["bfloat16"]).whole(name).clone()
    merged = edited(merge(ADAPTERS["mistral"]), lambda tensors: tensors.update({name: original}))
    assert f"1 of 272 tensors: {name}: is the base's" in refused(merged)


def test_two_layers_exchanged_are_named(merge, refused):
    def exchange(tensors):
        for name in [name for name in tensors if name.startswith(f"{LAYER}.")]:
            twin = name.replace(LAYER, "model.layers.4")
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    message = refused(edited(merge(ADAPTERS["mistral"]), exchange))
    assert "18 of 272 tensors" in message
    assert "holds the weights of layer 4" in message and "holds the weights of layer 17" in message


def test_an_earlier_checkpoint_is_named(merge, refused, later):
    assert "another state of this adapter" in refused(merge(ADAPTERS["mistral"]), later)


def test_the_matrices_of_another_run_are_named(merge, refused):
    message = refused(merge(ADAPTERS["generic"]))
    assert "210 of 272 tensors" in message and "has the change of another adapter" in message


def test_an_ignored_magnitude_is_named(merge, refused, dora, tmp_path):
    plain = with_config(dora, tmp_path / "plain", use_dora=False)
    tensors = load_file(plain / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "magnitude" not in name}
    save_file(kept, plain / "adapter_model.safetensors")
    assert "is merged without DoRA's magnitude" in refused(merge(plain), dora)


def test_embeddings_one_row_short_are_named(merge, refused):
    def shorten(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1]

    assert "32767, 576] instead of [32768, 576], 1 row short" in refused(
        edited(merge(ADAPTERS["mistral"]), shorten)
    )


def test_a_shard_of_the_base_in_place_of_the_merged_one_is_named(bases, merge, refused):
    merged = merge(ADAPTERS["mistral"])
    shard = sorted(bases["bfloat16"].glob("*.safetensors"))[1]
    shutil.copyfile(shard, merged / shard.name)
    assert f"all of {shard.name}: is the base's" in refused(merged)


def test_the_other_base_is_named(bases, refused, tmp_path):
    merged = merged_by_us(
        bases["bfloat16"], ADAPTERS["mistral"], tmp_path / "merged", "dequantized"
    )
    assert "is merged into the other base" in refused(merged)


def test_the_live_adapter_is_read_without_a_weight_of_the_base():
    live = LiveAdapter(ADAPTERS["mistral"], BASE)
    assert len(live.low_rank) == 210


@pytest.mark.parametrize("run", ADAPTERS)
def test_a_right_merge_computes_the_rounded_sum(run):
    """What the gate measured in the build: all of the distance to the float32 sum is rounding."""
    report = files.read_json(RESULTS / "runs" / run / "merged_check.json")
    print({key: report[key] for key in report if "kl" in key or "loss" in key})
    assert report["kl_divergence_nats"] > 1e-6
    assert report["kl_divergence_from_rounded_nats"] < 1e-7
    assert MergeGateSettings().n_conversations >= report["n_conversations"]
