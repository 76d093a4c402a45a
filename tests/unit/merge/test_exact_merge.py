"""The exact half of the merge gate: right merges pass, by any tool; wrong ones are named."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.merge.merges import all_tensors, merge, merged_by_peft
from workflow_scripts import files
from workflow_scripts.merge import exact_merge
from workflow_scripts.merge.live_adapter import LiveAdapter
from workflow_scripts.merge.merge_difference import described, named_together
from workflow_scripts.merge.merge_reference import Reference, is_rounded
from workflow_scripts.merge.stored_tensors import StoredTensors

MATCHED = {
    "rank_pattern": {"k_proj": 2, "v_proj": 2},
    "alpha_pattern": {"k_proj": 4, "v_proj": 4},
}


def compared(base, adapter, merged, nf4_dtype=None):
    reference = Reference(StoredTensors(base), LiveAdapter(adapter, base), nf4_dtype)
    stored = StoredTensors(merged)
    assert exact_merge.layout_difference(reference, stored) is None
    return reference, stored, list(exact_merge.compare_all(reference, stored, 2))


def faults(base, adapter, merged, nf4_dtype=None, other_base=None):
    """The lines of the gate's message."""
    reference, stored, results = compared(base, adapter, merged, nf4_dtype)
    return described([each for each in results if each.n_wrong], reference, stored, other_base)


def changed(merged, folder, change):
    """A copy of a merged folder with other content: `change` is called with its tensors."""
    shutil.copytree(merged, folder)
    tensors = all_tensors(folder)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bases(make_checkpoint, tmp_path_factory):
    """The same weights in three types; four layers, several shards."""
    folder = tmp_path_factory.mktemp("bases")
    shape = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 192}
    return {
        dtype: make_checkpoint(folder / dtype, dtype=dtype, max_shard_size="300KB", **shape)
        for dtype in ("bfloat16", "float16", "float32")
    }


@pytest.fixture(scope="module")
def base(bases):
    return bases["bfloat16"]


@pytest.fixture(scope="module")
def adapter(base, make_adapter, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), size=0.02)


@pytest.fixture(scope="module")
def merged(base, adapter, tmp_path_factory):
    return merge(base, adapter, tmp_path_factory.mktemp("merge") / "merged")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("merge_base", ["original", "dequantized"])
def test_our_merge_of_every_type_and_base_is_exact(bases, adapter, tmp_path, dtype, merge_base):
    merged = merge(bases[dtype], adapter, tmp_path / "merged", base=merge_base)
    nf4_dtype = None if merge_base == "original" else getattr(torch, dtype)
    _, stored, results = compared(bases[dtype], adapter, merged, nf4_dtype)
    assert len(results) == 39
    assert [each for each in results if each.n_wrong] == []
    assert sum(each.rounding == "once" for each in results) == 28
    # A float32 base is stored in bfloat16.
    kept = {"float16": "F16"}.get(dtype, "BF16")
    assert {entry.dtype for entry in stored.entries.values()} == {kept}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("options", "rounding"),
    [
        ({}, "once"),
        ({"is_safe": True}, "change_first"),
        ({"autocast_adapter_dtype": False}, "adapter_first"),
    ],
    ids=["merge_and_unload", "safe_merge", "16-bit adapter"],
)
def test_each_of_pefts_merges_is_right_by_its_rounding(
    bases, adapter, tmp_path, dtype, options, rounding
):
    merged = merged_by_peft(bases[dtype], adapter, tmp_path / "merged", dtype=dtype, **options)
    _, _, results = compared(bases[dtype], adapter, merged)
    assert [each for each in results if each.n_wrong] == []
    # Rounding to float32 is too small to be detected.
    expected = "once" if dtype == "float32" else rounding
    assert {each.rounding for each in results} == {None, expected}


def test_a_change_that_cancels_out_on_a_weight_of_zero_is_right_however_it_is_rounded(
    base, adapter, tmp_path
):
    """Weights that were dequantized from 4 bits are often exactly zero. There it shows that float32
    leaves a change near zero uncertain by several numbers of the type."""

    def zero(tensors):
        for name in tensors:
            if name.endswith("_proj.weight"):
                tensors[name].zero_()

    zeros = changed(base, tmp_path / "base", zero)
    for number, (is_safe, rounding) in enumerate(((False, "once"), (True, "change_first"))):
        merged = merged_by_peft(zeros, adapter, tmp_path / str(number), is_safe=is_safe)
        _, _, results = compared(zeros, adapter, merged)
        assert {each.rounding for each in results} <= {None, "once", rounding}
        assert [each for each in results if each.n_wrong] == []


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True, **MATCHED},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["dora", "rslora with patterns", "saved module"],
)
def test_our_merge_and_pefts_are_right_for_every_adapter(base, make_adapter, tmp_path, config):
    adapter = make_adapter(base, tmp_path / "adapter", size=0.02, **config)
    for merged in (
        merge(base, adapter, tmp_path / "ours"),
        merged_by_peft(base, adapter, tmp_path / "theirs"),
    ):
        _, _, results = compared(base, adapter, merged)
        assert [each for each in results if each.n_wrong] == []
        assert any(each.rounding == "once" for each in results)


def test_a_tied_model_passes_with_or_without_its_output_layer(
    make_checkpoint, make_adapter, tmp_path
):
    base = make_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged")
    assert compared(base, adapter, merged)

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert compared(base, adapter, changed(merged, tmp_path / "twice", untie))

    def untie_wrongly(tensors):
        untie(tensors)
        tensors["lm_head.weight"][0, 0] += 1

    stored = StoredTensors(changed(merged, tmp_path / "apart", untie_wrongly))
    reference = Reference(StoredTensors(base), LiveAdapter(adapter, base))
    assert exact_merge.layout_difference(reference, stored) == (
        "a tensor lm_head.weight that the base does not have"
    )


def test_experts_and_router_of_a_mixture_are_compared_too(mixtral, train, tmp_path):
    adapter = train(mixtral, method="lora", adapts_experts=True, trains_router=True)
    merged = merge(mixtral, adapter, tmp_path / "merged")
    _, _, results = compared(mixtral, adapter, merged)
    assert [each for each in results if each.n_wrong] == []
    assert {each.name.split(".")[-2] for each in results if each.rounding} >= {"w1", "w2", "w3"}

    def swap(tensors):
        experts = "model.layers.1.block_sparse_moe.experts"
        for matrix in ("w1", "w2", "w3"):
            one, two = (f"{experts}.{number}.{matrix}.weight" for number in (0, 3))
            tensors[one], tensors[two] = tensors[two], tensors[one]

    lines = faults(mixtral, adapter, changed(merged, tmp_path / "swapped", swap))
    assert any("experts.3.w1.weight" in line for line in lines)


def test_position_tables_of_an_old_checkpoint_may_be_left_out(base, adapter, merged, tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    old = changed(base, tmp_path / "old", add)
    assert compared(old, adapter, merged)
    assert compared(old, adapter, merge(old, adapter, tmp_path / "merged"))


# Wrong merges, and how the message names them.


def test_a_doubled_alpha_is_named_with_its_factor(base, adapter, merged, tmp_path):
    doubled = shutil.copytree(adapter, tmp_path / "doubled")
    config = files.read_json(adapter / "adapter_config.json")
    files.write_json(doubled / "adapter_config.json", config | {"lora_alpha": 32})
    wrong = merge(base, doubled, tmp_path / "merged")
    (line,) = faults(base, adapter, wrong)
    assert line.startswith("model.layers.{0-3}.")
    assert "has the adapter's change 2 times; a wrong scale (alpha ÷ rank)" in line


def test_k_and_v_without_their_alpha_pattern_are_named(base, make_adapter, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", size=0.02, **MATCHED)
    forgotten = shutil.copytree(adapter, tmp_path / "forgotten")
    config = files.read_json(adapter / "adapter_config.json")
    files.write_json(forgotten / "adapter_config.json", config | {"alpha_pattern": {}})
    wrong = merge(base, forgotten, tmp_path / "merged")
    (line,) = faults(base, adapter, wrong)
    assert "self_attn.k_proj.weight" in line and "self_attn.v_proj.weight" in line
    assert "q_proj" not in line and "has the adapter's change 4 times" in line


def test_one_projection_left_out_is_named(base, adapter, merged, tmp_path):
    name = "model.layers.2.self_attn.k_proj.weight"
    original = StoredTensors(base).whole(name)
    wrong = changed(merged, tmp_path / "wrong", lambda tensors: tensors.update({name: original}))
    (line,) = faults(base, adapter, wrong)
    assert line.startswith(f"{name}: is the base's; the adapter's change was left out (")


def test_two_layers_exchanged_are_named(base, adapter, merged, tmp_path):
    def exchange(tensors):
        for name in [name for name in tensors if ".layers.1." in name]:
            twin = name.replace(".layers.1.", ".layers.3.")
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    lines = faults(base, adapter, changed(merged, tmp_path / "wrong", exchange))
    assert any(".layers.1." in line and "holds the weights of layer 3" in line for line in lines)
    assert any(".layers.3." in line and "holds the weights of layer 1" in line for line in lines)


def test_a_shard_of_the_base_instead_of_the_merged_one_is_named(base, adapter, merged, tmp_path):
    wrong = shutil.copytree(merged, tmp_path / "wrong")
    shard = sorted(base.glob("*.safetensors"))[3]
    shutil.copyfile(shard, wrong / shard.name)
    (line,) = faults(base, adapter, wrong)
    assert f", all of {shard.name}: is the base's; the adapter's change was left out" in line


def test_an_earlier_state_of_the_adapter_is_named(base, adapter, merged, make_adapter, tmp_path):
    """Part of the way to the final state, with noise in each matrix."""
    earlier = shutil.copytree(adapter, tmp_path / "earlier")
    tensors = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.std()
        tensors[name] = 0.7 * tensor + 0.3 * noise
    save_file(tensors, earlier / "adapter_model.safetensors")
    wrong = merge(base, earlier, tmp_path / "merged")
    (line,) = faults(base, adapter, wrong)
    assert "the change of another state of this adapter, such as an earlier checkpoint" in line


def test_the_matrices_of_another_run_are_named(base, adapter, make_adapter, tmp_path):
    other = make_adapter(base, tmp_path / "other", seed=5, size=0.02)
    wrong = merge(base, other, tmp_path / "merged")
    (line,) = faults(base, adapter, wrong)
    assert "has the change of another adapter" in line


def test_an_ignored_magnitude_is_named(base, make_adapter, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", size=0.02, use_dora=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        if "magnitude" in name:
            tensors[name] = tensors[name] * 1.1
    save_file(tensors, adapter / "adapter_model.safetensors")
    plain = shutil.copytree(adapter, tmp_path / "plain")
    config = files.read_json(adapter / "adapter_config.json")
    files.write_json(plain / "adapter_config.json", config | {"use_dora": False})
    save_file(
        {name: tensor for name, tensor in tensors.items() if "magnitude" not in name},
        plain / "adapter_model.safetensors",
    )
    wrong = merge(base, plain, tmp_path / "merged")
    (line,) = faults(base, adapter, wrong)
    assert "is merged without DoRA's magnitude" in line


def test_the_other_base_is_named(base, adapter, merged):
    files_of_base, live = StoredTensors(base), LiveAdapter(adapter, base)
    original, dequantized = (
        Reference(files_of_base, live, dtype) for dtype in (None, torch.bfloat16)
    )
    (line,) = faults(base, adapter, merged, torch.bfloat16, other_base=original)
    assert "is merged into the other base" in line
    assert dequantized.base is original.base


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda tensors: tensors.update(
                {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:-1]}
            ),
            "model.embed_tokens.weight of shape [299, 128] instead of [300, 128], 1 row short",
        ),
        (
            lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"),
            "no tensor model.layers.0.input_layernorm.weight",
        ),
        (
            lambda tensors: tensors.update({"model.layers.4.extra": torch.zeros(1)}),
            "a tensor model.layers.4.extra that the base does not have",
        ),
    ],
)
def test_another_layout_is_named(base, adapter, merged, tmp_path, change, difference):
    stored = StoredTensors(changed(merged, tmp_path / "wrong", change))
    reference = Reference(StoredTensors(base), LiveAdapter(adapter, base))
    assert exact_merge.layout_difference(reference, stored) == difference


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named(base, adapter, merged, tmp_path, value):
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = changed(
        merged, tmp_path / "wrong", lambda tensors: tensors[name].view(-1)[7:8].fill_(value)
    )
    (line,) = faults(base, adapter, wrong)
    assert line == f"{name}: holds NaN or infinite numbers (1 of 24,576 numbers)"


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_number_one_step_of_its_type_off_is_found(base, adapter, merged, tmp_path, name):
    def step(tensors):
        tensors[name].view(torch.int16).view(-1)[-1] += 1

    (line,) = faults(base, adapter, changed(merged, tmp_path / "wrong", step))
    assert line.startswith(f"{name}: ") and "(1 of " in line


# What counts as rounded.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_a_midpoint_both_neighbours_are_right_and_elsewhere_only_one(dtype):
    one, two = torch.tensor([1.0, 1.0 + torch.finfo(dtype).eps], dtype=dtype).double()
    middle, slack = (one + two) / 2, torch.tensor(2.0**-20).double()
    for share, right in ((0.25, [True, False]), (0.5, [True, True]), (0.75, [False, True])):
        value = one + share * (two - one)
        found = is_rounded(torch.stack([one, two]).to(dtype), value, slack)
        assert found.tolist() == right
    for near in (middle - 0.9 * slack, middle + 0.9 * slack):
        assert is_rounded(torch.stack([one, two]).to(dtype), near, slack).all()
    for far in (middle - 1.1 * slack, middle + 1.1 * slack):
        assert is_rounded(torch.stack([one, two]).to(dtype), far, slack).sum() == 1


def test_tensors_of_many_layers_are_named_together():
    names = [f"model.layers.{at}.self_attn.k_proj.weight" for at in (0, 1, 2, 7)]
    assert named_together(names) == "model.layers.{0-2,7}.self_attn.k_proj.weight"
    assert named_together(["model.norm.weight", names[0]]) == (
        "model.norm.weight, model.layers.0.self_attn.k_proj.weight"
    )
    many = [f"model.layers.0.{letter}.weight" for letter in "abcdef"]
    assert named_together(many).endswith("model.layers.0.d.weight and 2 more")


@pytest.mark.parametrize(
    "config",
    [{"use_rslora": True, **MATCHED}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}],
    ids=["patterns", "dora", "saved"],
)
def test_the_live_adapter_is_what_peft_merges(base, make_adapter, tmp_path, config):
    """In float32, where nothing is rounded."""
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    live = LiveAdapter(adapter, base)
    merged = StoredTensors(merged_by_peft(base, adapter, tmp_path / "merged", dtype="float32"))
    original = StoredTensors(base)
    assert len(live.low_rank) == 28
    for name, (change,) in itertools.islice(live.low_rank.items(), 10):
        expected = original.whole(name).float() + change.scale * change.up @ change.down
        if change.magnitude is not None:
            expected *= (change.magnitude / expected.norm(dim=1))[:, None]
        torch.testing.assert_close(merged.whole(name), expected, atol=1e-6, rtol=1e-5)
    for name, tensor in live.whole.items():
        torch.testing.assert_close(merged.whole(name), tensor)
