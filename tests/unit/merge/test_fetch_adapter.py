from __future__ import annotations

import json
import shutil

import pytest

from tests import hub_server
from tests.hub_server import NOBODY_LISTENS, Repository
from workflow_scripts import files
from workflow_scripts.merge import merge_base
from workflow_scripts.merge.user_models import ADAPTER_FILES

STAGE = "workflow_scripts.merge.fetch_adapter"
COMMIT, LATER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def fetch(run_stage, checkpoint, tmp_path):
    def run(endpoint=NOBODY_LISTENS, **settings):
        environment = hub_server.environment(endpoint)
        environment["HF_HUB_CACHE"] = str(tmp_path / "cache")
        text = json.dumps({"model": "m", "dataset": "d", **settings})
        arguments = ["--settings", text, "--checkpoint", checkpoint]
        return run_stage(STAGE, *arguments, "--adapter", tmp_path / "adapter", **environment)

    return run


@pytest.fixture
def given(uniform_adapter, tmp_path):
    """A copy of an adapter, to be damaged."""
    return shutil.copytree(uniform_adapter, tmp_path / "given")


def test_a_local_adapter_is_copied_and_its_origin_recorded(fetch, given, tmp_path):
    done = fetch(adapter=str(given))
    assert done.returncode == 0, done.stderr
    fetched = tmp_path / "adapter"
    assert {path.name for path in fetched.iterdir()} == {*ADAPTER_FILES, "source.json"}
    for name in ADAPTER_FILES:
        assert not (fetched / name).is_symlink()
        assert (fetched / name).read_bytes() == (given / name).read_bytes()
    assert files.read_json(fetched / "source.json") == {"source": str(given)}


def test_the_dtype_that_training_recorded_reaches_the_merge(fetch, given, checkpoint, tmp_path):
    files.write_json(given / "training_manifest.json", {"compute_dtype": "float16", "n_steps": 5})
    assert fetch(adapter=str(given)).returncode == 0
    origin = files.read_json(tmp_path / "adapter" / "source.json")
    assert origin["training"]["n_steps"] == 5
    dtype = merge_base.nf4_dtype("dequantized", tmp_path / "adapter", checkpoint)
    assert str(dtype) == "torch.float16"


def test_a_folder_in_the_home_directory_is_found(fetch, given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = fetch(adapter="~/given")
    assert done.returncode == 0, done.stderr
    assert files.read_json(tmp_path / "adapter" / "source.json") == {"source": "~/given"}


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_missing_file_is_named_and_nothing_is_written(fetch, given, tmp_path, name):
    (given / name).unlink()
    done = fetch(adapter=str(given))
    assert done.returncode == 1
    for part in ("the adapter is missing or incomplete", f"no {name}", "PEFT's save_pretrained"):
        assert part in done.stderr
    assert not (tmp_path / "adapter").exists()


def test_a_pickle_is_refused_with_a_remedy(fetch, given):
    (given / "adapter_model.safetensors").rename(given / "adapter_model.bin")
    done = fetch(adapter=str(given))
    assert done.returncode == 1
    assert "save it again: adapter_model.bin is a pickle" in done.stderr


def change_weights(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


MODULE = "base_model.model.model.layers.1.self_attn.k_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"


def leave_out(*names):
    def change(weights):
        for name in names:
            del weights[name]

    return change


def replace(name, make):
    def change(weights):
        weights[name] = make(weights[name]).contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (leave_out(B), ["the adapter is not complete", f"no {B}"]),
        (leave_out(A), ["tensors that are not merged here", B]),
        (
            leave_out(A, B),
            ["lacks modules that its adapter_config.json names", "1.self_attn.k_pro"],
        ),
        (replace(A, lambda a: a[:4]), ["do not have the rank", "A [4, 256]", "rank 8"]),
        (replace(B, lambda b: b[:, :4]), ["do not have the rank", "B [64, 4]"]),
        (replace(A, lambda a: a.char()), ["a type that cannot be merged", "I8"]),
        (replace(A, lambda a: a * float("nan")), ["a weight is not a finite number", A]),
    ],
    ids=["no B", "no A", "no pair", "rank of A", "rank of B", "integers", "NaN"],
)
def test_an_incomplete_adapter_is_refused(fetch, given, tmp_path, change, parts):
    change_weights(given, change)
    done = fetch(adapter=str(given))
    assert done.returncode == 1
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "adapter").exists()


def test_a_layer_that_is_missing_is_named(fetch, given):
    def change(weights):
        for name in [name for name in weights if ".layers.1." in name]:
            del weights[name]

    change_weights(given, change)
    done = fetch(adapter=str(given))
    assert done.returncode == 1
    assert "nothing for 7: model.layers.1.mlp.down_proj.weight, " in done.stderr


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": 0},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 4}},
    ],
    ids=str,
)
def test_an_adapter_is_complete_if_peft_leaves_layers_out_by_its_config(
    fetch, checkpoint, make_adapter, tmp_path, config
):
    config = {"target_modules": ["q_proj", "k_proj"], **config}
    make_adapter(checkpoint, tmp_path / "given", **config)
    done = fetch(adapter=str(tmp_path / "given"))
    assert done.returncode == 0, done.stderr


def test_missing_magnitudes_of_dora_are_named(fetch, checkpoint, make_adapter, tmp_path):
    given = make_adapter(checkpoint, tmp_path / "given", use_dora=True)
    change_weights(given, leave_out(f"{MODULE}.lora_magnitude_vector"))
    done = fetch(adapter=str(given))
    assert done.returncode == 1
    assert f"no {MODULE}.lora_magnitude_vector" in done.stderr


def test_magnitudes_of_another_length_are_named(fetch, checkpoint, make_adapter, tmp_path):
    given = make_adapter(checkpoint, tmp_path / "given", use_dora=True)
    change_weights(given, replace(f"{MODULE}.lora_magnitude_vector", lambda one: one[:-1]))
    done = fetch(adapter=str(given))
    assert done.returncode == 1
    assert "magnitudes" in done.stderr and "found:    [63]" in done.stderr


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_an_lfs_pointer_in_an_adapter_is_recognized(fetch, given, name):
    (given / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n")
    done = fetch(adapter=str(given))
    assert done.returncode == 1
    for part in ("a Git LFS pointer", str(given / name), "file of 9 bytes", "git lfs pull"):
        assert part in done.stderr


def test_half_an_adapter_is_refused(fetch, given):
    path = given / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    done = fetch(adapter=str(given))
    assert done.returncode == 1 and "damaged or truncated" in done.stderr


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(
    fetch, make_checkpoint, make_adapter, tmp_path
):
    other = make_checkpoint(tmp_path / "other", hidden_size=128)
    make_adapter(other, tmp_path / "wide")
    done = fetch(adapter=str(tmp_path / "wide"))
    assert done.returncode == 1
    assert "the adapter does not fit the base model" in done.stderr
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_comes_from_the_hub_at_a_commit(fetch, uniform_adapter, tmp_path):
    content = {path.name: path.read_bytes() for path in uniform_adapter.iterdir()}
    content["training_manifest.json"] = b'{"compute_dtype": "float16"}'
    # `main` has moved on to another adapter.
    commits = {LATER: dict.fromkeys(content, b"later")}
    commits[COMMIT] = {**content, "README.md": b"a card", "adapter_model.bin": b"again"}
    repositories = {
        "models/owner/adapter": Repository(commits, names={"v0": COMMIT}),
        "models/owner/gated": Repository(commits, is_gated=True),
    }
    with hub_server.serving(repositories) as hub:
        done = fetch(adapter="owner/adapter", revision="v0", endpoint=hub.address)
        refused = fetch(adapter="owner/gated", endpoint=hub.address)
    assert done.returncode == 0, done.stderr
    noted = files.read_json(tmp_path / "adapter" / "source.json")
    assert (noted["source"], noted["commit"]) == ("owner/adapter", COMMIT)
    assert noted["compute_dtype"] == noted["training"]["compute_dtype"] == "float16"
    for name in ADAPTER_FILES:
        assert (tmp_path / "adapter" / name).read_bytes() == content[name]
    # Neither the pickle nor any other file of the repository is downloaded.
    asked = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert asked == {*ADAPTER_FILES, "training_manifest.json"}
    assert refused.returncode == 1
    for part in ("the adapter is gated", "runs.<name>.adapter", "HF_TOKEN"):
        assert part in refused.stderr


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert imported.isdisjoint({"torch", "transformers", "peft"})
