from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from bitsandbytes.cextension import lib
from transformers import AutoConfig

from workflow_scripts.log import StageError
from workflow_scripts.models import checkpoint, checkpoint_files
from workflow_scripts.settings import RopeScalingSettings


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
def test_a_model_loads_with_the_positions_of_its_facts(demo_checkpoint, kind):
    """Compare with the papers' formulas, far beyond the base model's context."""
    facts = checkpoint_files.read_shape(demo_checkpoint, RopeScalingSettings(type=kind, factor=4))
    rope = facts.rope_parameters
    model = checkpoint.load_model(
        demo_checkpoint, window=None, precision="float32", rope=rope, device="cpu"
    )
    rotary = model.model.rotary_emb
    dim, theta, original, length = facts.head_dim, facts.rope_theta, 4096, 12_288
    position = torch.tensor([[length - 1]])
    cosines, _ = rotary(torch.zeros(1, dtype=torch.float64), position)
    powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    magnitude = 1.0
    if kind == "linear":
        frequencies = theta**-powers / 4
    elif kind == "dynamic":
        stretch = (4 * length / original - 3) ** (dim / (dim - 2))
        frequencies = (theta * stretch) ** -powers
    else:
        rotations = original * theta**-powers / (2 * math.pi)

        def pair_of(turns: float) -> float:
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = math.floor(pair_of(32)), math.ceil(pair_of(1))
        ramp = ((torch.arange(dim // 2) - low) / (high - low)).clamp(0, 1).double()
        frequencies = theta**-powers * (ramp / 4 + (1 - ramp))
        magnitude = 0.1 * math.log(4) + 1
        # Pairs with many turns keep their frequency; pairs with under half a turn are interpolated.
        assert (ramp[rotations > 40] == 0).all() and (ramp[rotations < 0.5] == 1).all()
    expected = magnitude * torch.cos((length - 1) * frequencies)
    found = cosines[0, 0, : dim // 2].double()
    # float32 angles of up to 12,287 rad: measured 6e-4.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


@pytest.fixture(scope="module")
def without_window_key(demo_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("no_window") / "checkpoint"
    shutil.copytree(demo_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["sliding_window"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_missing_window_loads_as_none_where_transformers_takes_4096(without_window_key):
    assert AutoConfig.from_pretrained(without_window_key).sliding_window == 4096
    window = checkpoint_files.read_shape(without_window_key).sliding_window
    model = checkpoint.load_model(
        without_window_key, window=window, precision="float32", device="cpu"
    )
    assert model.config.sliding_window is None


def test_a_window_hides_tokens_from_the_loaded_model(demo_checkpoint):
    tokens = torch.arange(3, 35)[None]
    changed = tokens.clone()
    changed[0, 0] = 999

    def last_logits(window, ids):
        model = checkpoint.load_model(
            demo_checkpoint, window=window, precision="float32", device="cpu"
        )
        with torch.no_grad():
            return model(ids, use_cache=False).logits[0, -1]

    # One layer: the first token, outside the window, cannot influence the last.
    assert torch.equal(last_logits(8, tokens), last_logits(8, changed))
    assert not torch.equal(last_logits(None, tokens), last_logits(None, changed))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_load_in_the_requested_precision(demo_checkpoint, precision):
    model = checkpoint.load_model(demo_checkpoint, window=8, precision=precision, device="cpu")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    assert dtypes == {getattr(torch, precision)}


def test_arithmetic_on_a_cpu_is_float32():
    assert checkpoint.compute_dtype(torch.device("cpu")) == torch.float32


def test_an_unusable_gpu_is_an_error_and_not_replaced_by_the_cpu(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a usable GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(checkpoint, "DRIVERS", [tmp_path / "nvidiactl"])
    # Without the driver's device file no GPU is expected.
    assert checkpoint.default_device().type == "cpu"
    (tmp_path / "nvidiactl").touch()
    with pytest.raises(StageError, match="was given a GPU") as error:
        checkpoint.default_device()
    assert "workflow_scripts.doctor" in str(error.value)
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert checkpoint.default_device().type == "cpu"


def test_bitsandbytes_without_its_cuda_library_is_reported_before_loading():
    checkpoint.check_bitsandbytes(torch.device("cpu"))
    if getattr(lib, "compiled_with_cuda", False):
        pytest.skip("its CUDA library is installed here")
    with pytest.raises(StageError, match="bitsandbytes cannot quantize") as error:
        checkpoint.check_bitsandbytes(torch.device("cuda"))
    assert "workflow_scripts.doctor" in str(error.value)
