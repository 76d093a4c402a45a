from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.facts import facts_of
from tests.unit.train import one_step
from tests.unit.train.mixtral import N_EXPERTS, save_mixtral
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.packing.packing import Piece
from workflow_scripts.packing.plan import write_plan
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train.batches import Collator
from workflow_scripts.train.model import adapt, trainable_model

REPOSITORY = Path(__file__).resolve().parents[3]
LENGTHS = [5, 30, 8]
ROW = [Piece(number, 0, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def batch(random_documents, tmp_path_factory):
    documents = random_documents(tmp_path_factory.mktemp("tokens") / "train.arrow", LENGTHS)
    return Collator(documents, crosses_documents=False)([ROW])


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


def trained_step(model, batch, *, rate=0.1):
    """Changes of the parameters in steps of plain gradient descent, by name."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # B is zero, so A's gradient is zero in the first step; two steps move both.
    for _ in range(2):
        model.zero_grad()
        model.train()(**batch).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    norm = parameter.grad.norm()
                    parameter -= rate * parameter.grad / norm.clamp_min(1e-12)
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


PLAIN = {"kv_rank": "matched"}
DORA = {"dora": True, "kv_rank": "matched"}
LISTED = {"rslora": True, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("method", "settings"),
    [(method, settings) for method in ("qlora", "lora") for settings in (PLAIN, DORA, LISTED)]
    + [("lora_int8", PLAIN), ("lora_int8", LISTED)],
)
def test_a_step_moves_the_adapter_and_nothing_else(checkpoint, facts, batch, method, settings):
    model = trainable_model(checkpoint, facts, RecipeSettings(method=method, rank=8, **settings))
    n_adapted = 2 if "target_modules" in settings else 14
    moved = trained_step(model, batch)
    assert all("lora_" in name for name in moved)
    assert len(moved) == n_adapted * (3 if settings.get("dora") else 2)


def test_dora_on_8_bits_is_refused_without_a_gpu(checkpoint, facts):
    with pytest.raises(StageError, match="needs a CUDA GPU"):
        trainable_model(checkpoint, facts, RecipeSettings(method="lora_int8", dora=True))


@pytest.mark.parametrize(
    ("method", "kind"), [("qlora", torch.uint8), ("lora_int8", torch.int8), ("lora", torch.float32)]
)
def test_the_method_decides_the_precision_of_the_base(checkpoint, facts, method, kind):
    model = trainable_model(checkpoint, facts, RecipeSettings(method=method, rank=8))
    layer = model.get_base_model().model.layers[0]
    assert layer.mlp.up_proj.base_layer.weight.dtype == kind
    assert layer.input_layernorm.weight.dtype == torch.float32  # on a CPU


def test_on_a_16_bit_base_only_what_trains_is_float32(checkpoint, facts, batch):
    """As on a GPU: norms, embeddings, output layer and hidden states stay in 16 bits."""
    base = load_model(checkpoint, window=8, precision="bfloat16")
    recipe = RecipeSettings(
        method="lora", rank=8, dora=True, modules_to_save=["embed_tokens", "lm_head"]
    )
    model = adapt(base, facts, recipe)
    for name, parameter in model.named_parameters():
        expected = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == expected, name
    handed = []
    base.model.layers[0].register_forward_pre_hook(lambda _, inputs: handed.append(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    assert handed[0].dtype == torch.bfloat16
    whole = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert len(whole) == 2
    for name, parameter in whole.items():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.any(), name


def test_layers_saved_whole_move_with_the_adapter(checkpoint, facts, batch):
    recipe = RecipeSettings(rank=8, modules_to_save=["embed_tokens", "lm_head"])
    moved = trained_step(trainable_model(checkpoint, facts, recipe), batch)
    whole = {name for name in moved if "lora_" not in name}
    assert len(whole) == 2 and all("modules_to_save.default.weight" in name for name in whole)
    assert len(moved) == 2 * 14 + 2


def test_tied_layers_saved_whole_stay_one_matrix(make_checkpoint, tmp_path, batch):
    folder = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    facts = facts_of(folder)
    recipe = RecipeSettings(method="lora", rank=8, modules_to_save=["embed_tokens"])
    model = trainable_model(folder, facts, recipe)
    moved = trained_step(model, batch)
    assert any("embed_tokens.modules_to_save" in name for name in moved)
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight


def test_a_full_fine_tune_moves_every_weight_in_float32(checkpoint, facts, batch):
    model = trainable_model(checkpoint, facts, RecipeSettings(method="full"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    names = {name for name, _ in model.named_parameters()}
    assert trained_step(model, batch) == names and len(names) == 2 * 9 + 3


def saved_and_read(model, facts, checkpoint, folder, batch):
    """Logits of the trained adapter, and of the adapter loaded from its files onto a new base."""
    options = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        expected = model.eval()(**options, use_cache=False).logits
    model.save_pretrained(folder)
    from workflow_scripts.train import attention

    base = load_model(
        checkpoint,
        window=facts.sliding_window,
        precision="float32",
        attention=attention.register(),
    )
    with torch.no_grad():
        before = base(**options, use_cache=False).logits
        found = PeftModel.from_pretrained(base, folder).eval()(**options, use_cache=False).logits
    assert not torch.allclose(before, expected, atol=1e-2)
    return found, expected


@pytest.mark.parametrize(
    "settings",
    [
        {"dora": True},
        {"rslora": True, "kv_rank": "matched"},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=["dora", "rslora", "whole layers"],
)
def test_an_adapter_loaded_from_its_files_equals_the_trained_one(
    checkpoint, facts, batch, tmp_path, settings
):
    model = trainable_model(checkpoint, facts, RecipeSettings(method="lora", rank=8, **settings))
    trained_step(model, batch)
    found, expected = saved_and_read(model, facts, checkpoint, tmp_path / "adapter", batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # measured 0


@pytest.mark.parametrize("trains_router", [False, True])
@pytest.mark.parametrize("adapts_experts", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_experts_and_router_of_a_mixture_learn_only_on_request(
    mixtral, batch, tmp_path, adapts_experts, trains_router, method
):
    facts = facts_of(mixtral)
    recipe = RecipeSettings(
        method=method,
        rank=8,
        kv_rank="matched",
        adapts_experts=adapts_experts,
        trains_router=trains_router,
        router_loss_coefficient=0.02,
    )
    model = trainable_model(mixtral, facts, recipe)
    moved = trained_step(model, batch)
    assert sum("self_attn" in name for name in moved) == 2 * 2 * 4
    assert sum(".mlp.experts." in name for name in moved) == (2 * 2 * 2 if adapts_experts else 0)
    assert sum(".mlp.gate." in name for name in moved) == (2 if trains_router else 0)
    assert all("lora_" in name or ".mlp.gate.modules_to_save" in name for name in moved)
    if method == "lora":
        found, expected = saved_and_read(model, facts, mixtral, tmp_path / "adapter", batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # measured 0


def test_the_delta_of_each_expert_is_the_product_of_its_own_factors(mixtral, batch):
    """Compared with experts written out, with each delta added to the expert's weights."""
    facts = facts_of(mixtral)
    recipe = RecipeSettings(method="lora", rank=8, alpha=24, adapts_experts=True)
    model = trainable_model(mixtral, facts, recipe)
    trained_step(model, batch)
    layer = model.get_base_model().model.layers[1].mlp.experts
    experts = layer.get_base_layer()
    wrappers = {layer.parameter_name: layer, layer.base_layer.parameter_name: layer.base_layer}
    weights = {}
    for name, wrapper in wrappers.items():
        weights[name] = getattr(experts, name).detach().clone()
        a, b = (part["default"].weight.detach() for part in (wrapper.lora_A, wrapper.lora_B))
        for expert in range(N_EXPERTS):
            # PEFT orders A's rows by expert and B's columns by rank.
            own_a, own_b = a[expert * 8 : expert * 8 + 8], b[:, expert::N_EXPERTS]
            weights[name][expert] += 24 / 8 * own_b @ own_a
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 64, generator=generator)
    scores = torch.rand(20, 2, generator=generator)
    chosen = torch.rand(20, N_EXPERTS, generator=generator).argsort(dim=1)[:, :2]
    expected = torch.zeros_like(hidden)
    for token in range(20):
        for score, expert in zip(scores[token], chosen[token], strict=True):
            gate, up = (weights["gate_up_proj"][expert] @ hidden[token]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[token] += score * (weights["down_proj"][expert] @ inner)
    with torch.no_grad():
        found = layer(hidden, chosen, scores)
    # Measured 1e-6 of the largest entry.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("trains_router", [False, True])
def test_a_full_fine_tune_of_a_mixture_trains_the_router_only_on_request(
    mixtral, batch, trains_router
):
    recipe = RecipeSettings(method="full", trains_router=trains_router)
    model = trainable_model(mixtral, facts_of(mixtral), recipe)
    names = {name for name, _ in model.named_parameters()}
    routers = {name for name in names if ".mlp.gate." in name}
    assert len(routers) == 2
    assert trained_step(model, batch) == (names if trains_router else names - routers)


def test_a_16_bit_mixture_takes_a_float32_router_with_and_without_autocast(mixtral, batch):
    base = load_model(mixtral, window=None, precision="bfloat16")
    recipe = RecipeSettings(method="lora", rank=8, trains_router=True, adapts_experts=True)
    model = adapt(base, facts_of(mixtral), recipe)
    plain = {key: batch[key] for key in ("input_ids", "position_ids", "labels")}
    for is_on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            model(**plain).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name


def test_a_full_fine_tune_refuses_settings_for_experts_on_a_dense_model(checkpoint, facts):
    with pytest.raises(StageError, match="trains_router"):
        trainable_model(checkpoint, facts, RecipeSettings(method="full", trains_router=True))


def test_a_mixture_in_nf4_takes_the_same_step_on_two_processes(
    mixtral, write_facts, random_documents, plan_of, tmp_path
):
    """DDP would first broadcast the experts, but tensors in NF4 cannot receive them."""
    lengths = [30, 5, 19, 8]
    random_documents(tmp_path / "train.arrow", lengths)
    rows = [[Piece(number, 0, lengths[number]) for number in row] for row in ([0], [1, 2], [3])]
    write_plan(tmp_path / "plan.parquet", plan_of(rows, row_tokens=40))
    paths = {
        "checkpoint": mixtral,
        "facts": write_facts(mixtral, tmp_path / "facts.json"),
        "documents": tmp_path / "train.arrow",
        "plan": tmp_path / "plan.parquet",
        "folder": tmp_path,
    }
    recipe = {"rows_per_step": 4, "adapts_experts": True, "trains_router": True}
    expected = one_step.take_step(**paths, recipe=recipe, rows_per_micro_batch=2)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.unit.train.one_step"]
    for name, path in paths.items():
        command += [f"--{name}", str(path)]
    command += ["--recipe", json.dumps(recipe), "--rows-per-micro-batch", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "rank-0.safetensors")
    assert found.keys() == expected.keys()
    assert sum(".experts." in name for name in found) == 2 * 2 * 2
    for name, tensor in expected.items():
        # Measured 1e-6 of the largest entry.
        bound = 1e-5 * float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=bound, msg=name)
