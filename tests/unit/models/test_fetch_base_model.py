from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save

from tests import hub_server
from tests.hub_server import NOBODY_LISTENS, Repository

STAGE = "workflow_scripts.models.fetch_base_model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": json.dumps(
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 32768,
            "max_position_embeddings": 128,
            "sliding_window": None,
        }
    ).encode(),
    "tokenizer.model.v3": b"pieces",
}
MATRICES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128), "input_layernorm": (64,), "post_attention_layernorm": (64,),
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (32768, 64),
    "lm_head.weight": (32768, 64),
    "model.norm.weight": (64,),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in (0, 1)
        for name, shape in MATRICES.items()
    },
}
WEIGHTS = {name: np.ones(shape, dtype=np.float16) for name, shape in SHAPES.items()}
FILES["model.safetensors"] = save(WEIGHTS)
# Files in the repository that are not wanted: the weights in other formats, and folders.
ALSO_THERE = {
    "consolidated.safetensors": b"weights again",
    "consolidated.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"weights again",
    "original/params.json": b"{}",
}


@pytest.fixture(scope="module")
def hub():
    """Address of a local Hub server."""
    commits = {COMMIT: {**FILES, **ALSO_THERE}}
    repositories = {
        "models/owner/model": Repository(commits, names={"v0": COMMIT}),
        "models/owner/gated": Repository(commits, is_gated=True),
    }
    with hub_server.serving(repositories) as serving:
        yield serving.address


@pytest.fixture
def fetch(run_stage, tmp_path):
    def run(checkpoint=tmp_path / "checkpoint", endpoint=NOBODY_LISTENS, offline=False, **settings):
        environment = hub_server.environment(endpoint, offline=offline)
        environment["HF_HUB_CACHE"] = str(tmp_path / "cache")
        text = json.dumps(settings)
        return run_stage(STAGE, "--settings", text, "--checkpoint", checkpoint, **environment)

    return run


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "HF_TOKEN" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


def test_a_local_folder_is_linked_and_never_written_to(fetch, source, tmp_path):
    (source / "source.json").write_text('{"source": "elsewhere"}')
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    done = fetch(source=str(source))
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "checkpoint"
    assert {path.name for path in checkpoint.iterdir()} == {*FILES, "source.json"}
    for name, content in FILES.items():
        assert (checkpoint / name).is_symlink()
        assert (checkpoint / name).read_bytes() == content
    assert json.loads((checkpoint / "source.json").read_text()) == {"source": str(source)}
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize("missing", list(FILES))
def test_a_local_folder_that_lacks_a_file_leaves_nothing_behind(fetch, source, tmp_path, missing):
    (source / missing).unlink()
    done = fetch(source=str(source))
    assert done.returncode == 1
    assert done.stderr.startswith("fetch_base_model: ")
    assert missing.removesuffix(".v3") in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_local_folder_with_half_a_shard_leaves_nothing_behind(fetch, source, tmp_path):
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    done = fetch(source=str(source))
    assert done.returncode == 1
    assert "a weights file is damaged or truncated" in done.stderr
    assert not (tmp_path / "checkpoint").exists()


def test_a_missing_local_folder_is_reported(fetch, tmp_path):
    done = fetch(source=str(tmp_path / "nowhere"))
    assert done.returncode == 1
    for part in ("the local base model is missing", "models.<name>.source", "is not a folder"):
        assert part in done.stderr


def test_settings_without_a_source_are_refused(fetch):
    done = fetch(generate={})
    assert done.returncode == 1
    assert "no source to fetch from" in done.stderr


def test_a_download_has_the_files_transformers_reads_and_records_the_commit(fetch, hub, tmp_path):
    done = fetch(source="owner/model", endpoint=hub)
    assert done.returncode == 0, done.stderr
    assert f"commit={COMMIT}" in done.stderr  # no revision was set: a warning names the commit
    checkpoint = tmp_path / "checkpoint"
    fetched = {path.name: path for path in checkpoint.iterdir() if path.is_file()}
    assert set(fetched) == {*FILES, "source.json"}
    for name, content in FILES.items():
        assert fetched[name].read_bytes() == content
    noted = json.loads((checkpoint / "source.json").read_text())
    assert noted == {"source": "owner/model", "commit": COMMIT}


def test_a_pinned_commit_is_fetched_without_a_warning(fetch, hub):
    done = fetch(source="owner/model", revision=COMMIT, endpoint=hub)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"source": "owner/gated"}, ["gated", "owner/gated", "licence", "HF_TOKEN"]),
        ({"source": "owner/nobody"}, ["not on the Hub, or is private", "spelling"]),
        ({"source": "owner/model", "revision": "v9"}, ["no such revision", "found:    v9"]),
    ],
)
def test_each_refusal_of_the_hub_has_a_remedy(fetch, hub, tmp_path, settings, parts):
    done = fetch(**settings, endpoint=hub)
    assert done.returncode == 1
    for part in ("fetch_base_model: ", *parts):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.iterdir() if "checkpoint" in path.name]


@pytest.mark.parametrize("offline", [False, True])
def test_an_unreachable_hub_is_reported(fetch, offline):
    done = fetch(source="owner/model", offline=offline)
    assert done.returncode == 1
    parts = ("the Hub cannot be reached", "owner/model", "check the connection", "doctor")
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
