from __future__ import annotations

import bitsandbytes.functional
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.facts import facts_of
from tests.unit.train.mixtral import save_mixtral
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.models.experts import NAMES, Nf4Tensor, quantize_experts
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train.model import adapt

TOKENS = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(0))


def through_nf4(weight):
    """bitsandbytes on one flat row: with AVX-512 it errs on rows of partial blocks."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.flatten(), compress_statistics=True, quant_type="nf4"
    )
    return bitsandbytes.functional.dequantize_4bit(packed, state).view(weight.shape)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def quantized(mixtral):
    return load_model(mixtral, window=None, precision="nf4")


@pytest.fixture
def dense(mixtral):
    """The same model in float32, its linear layers and experts rounded through NF4."""
    model = load_model(mixtral, window=None, precision="float32")
    n_quantized = 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.copy_(through_nf4(weight))
                n_quantized += 1
    assert n_quantized == 2 * (4 + 2)
    return model


def logits_and_gradient(model):
    """Also return the gradient of the model's input, through every layer."""
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), embedded)
    return logits.detach(), gradient


def assert_close(found, expected, *, share=1e-5):
    for one, other in zip(found, expected, strict=True):
        bound = share * float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


def test_quantized_experts_equal_their_dequantized_weights(quantized, dense):
    # Measured 5e-7 of the largest entry.
    assert_close(logits_and_gradient(quantized), logits_and_gradient(dense))


def test_quantized_experts_take_half_a_byte_per_weight(quantized, dense):
    kept = quantized.model.layers[0].mlp.experts
    plain = dense.model.layers[0].mlp.experts
    for name in NAMES:
        tensor = getattr(kept, name)
        assert isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
        assert tensor.packed.dtype == torch.uint8
        assert tensor.packed.numel() * 2 == getattr(plain, name).numel()
        assert tensor.shape == getattr(plain, name).shape and tensor.dtype == torch.float32


def test_a_dense_model_is_not_changed(checkpoint):
    model = load_model(checkpoint, window=8, precision="nf4")
    quantize_experts(model, torch.device("cpu"))
    assert not any(isinstance(parameter, Nf4Tensor) for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_in_nf4_computes_like_bitsandbytes_dequantized_tensor(dtype):
    whole = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor = torch.nn.Parameter(Nf4Tensor.of(whole), requires_grad=False)
    plain = through_nf4(whole)
    assert torch.equal(tensor + 0, plain) and type(tensor + 0) is torch.Tensor
    assert torch.equal(tensor[1] @ plain[2].T, plain[1] @ plain[2].T)
    assert torch.equal(tensor.to(torch.float64), plain.to(torch.float64))
    assert isinstance(tensor.detach(), Nf4Tensor)
    factors = torch.ones(3, 64, 2, dtype=dtype).requires_grad_(), torch.ones(3, 2, 32, dtype=dtype)
    found = torch.baddbmm(tensor, *factors)
    assert torch.equal(found, torch.baddbmm(plain, *factors))
    found.sum().backward()
    assert factors[0].grad.eq(32).all()


def test_a_tensor_in_nf4_cannot_be_written():
    tensor = Nf4Tensor.of(torch.ones(64, 64))
    with pytest.raises(TypeError, match="cannot be written"):
        tensor.mul_(2)
    with pytest.raises(TypeError, match="cannot be written"):
        tensor.copy_(torch.zeros(64, 64))


def adapted(base, mixtral, **settings):
    recipe = RecipeSettings(method="lora", rank=8, alpha=16, adapts_experts=True, **settings)
    model = adapt(base, facts_of(mixtral), recipe)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    return model.train()


def loss_and_gradients(model):
    model.zero_grad()
    positions = torch.arange(TOKENS.shape[1])[None]
    loss = model(input_ids=TOKENS, labels=TOKENS, position_ids=positions).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("trains_router", [False, True])
def test_adapters_of_quantized_experts_have_the_gradients_of_the_dense(
    quantized, dense, mixtral, checkpoints, trains_router
):
    model = adapted(quantized, mixtral, trains_router=trains_router)
    if checkpoints:
        quantized.activation_checkpointing_enable({"use_reentrant": False})
    loss, found = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(
        adapted(dense, mixtral, trains_router=trains_router)
    )
    assert found.keys() == expected.keys()
    assert sum(".experts." in name for name in found) == 2 * 2 * 2
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        assert gradient.any(), name
        # Measured 2e-6 of the largest entry.
        bound = 2e-5 * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=bound, msg=name)


def test_a_pass_leaves_no_adapter_on_the_tensors(quantized, mixtral):
    """PEFT puts its adapter on the tensors during a pass."""
    model = adapted(quantized, mixtral)
    first, gradients = loss_and_gradients(model)
    second, others = loss_and_gradients(model)
    assert torch.equal(first, second)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_an_adapter_of_quantized_experts_fits_the_dense_model_and_the_quantized(
    quantized, dense, mixtral, tmp_path
):
    model = adapted(quantized, mixtral).eval()
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        model.save_pretrained(tmp_path)
        fresh = load_model(mixtral, window=None, precision="nf4")
        again = PeftModel.from_pretrained(fresh, tmp_path)
        assert torch.equal(again.eval()(input_ids=TOKENS, use_cache=False).logits, expected)
        plain = PeftModel.from_pretrained(dense, tmp_path).eval()
        assert_close([plain(input_ids=TOKENS, use_cache=False).logits], [expected])
    shapes = {
        name.partition("layers.0.mlp.experts.")[2]: tuple(tensor.shape)
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
        if "layers.0.mlp.experts." in name
    }
    # gate_up_proj inside, down_proj around it: hidden 64, intermediate 96, 4 experts of rank 8.
    assert shapes == {
        "base_layer.lora_A.weight": (32, 64),
        "base_layer.lora_B.weight": (192, 32),
        "lora_A.weight": (32, 96),
        "lora_B.weight": (64, 32),
    }
