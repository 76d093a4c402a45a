from __future__ import annotations

import shutil

STAGE = "workflow_scripts.models.export_tokenizer"


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--checkpoint" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


def test_it_writes_the_five_exported_files(run_stage, official_tokenizer, tmp_path):
    original = official_tokenizer("v3")
    shutil.copyfile(original, tmp_path / "tokenizer.model.v3")
    done = run_stage(STAGE, "--checkpoint", tmp_path, "--tokenizer", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert "wrote version=v3" in done.stderr
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "made" / "tokenizer.model").read_bytes() == original.read_bytes()


def test_a_tekken_file_alone_is_enough(run_stage, official_tokenizer, tmp_path):
    shutil.copyfile(official_tokenizer("tekken"), tmp_path / "tekken.json")
    done = run_stage(STAGE, "--checkpoint", tmp_path, "--tokenizer", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert "wrote version=tekken" in done.stderr
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == [
        "chat_template.jinja",
        "tekken.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_configured_version_is_used(run_stage, official_tokenizer, tmp_path):
    shutil.copyfile(official_tokenizer("v2"), tmp_path / "tokenizer.model")
    arguments = ["--checkpoint", tmp_path, "--version", "v2", "--tokenizer", tmp_path / "made"]
    done = run_stage(STAGE, *arguments)
    assert done.returncode == 0, done.stderr
    assert "wrote version=v2" in done.stderr
    assert (tmp_path / "made" / "tokenizer.model.v2").is_file()


def test_a_checkpoint_without_tokenizer_leaves_nothing_behind(run_stage, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    done = run_stage(
        STAGE, "--checkpoint", tmp_path / "checkpoint", "--tokenizer", tmp_path / "made"
    )
    assert done.returncode == 1
    for part in ("export_tokenizer: ", "no tokenizer", str(tmp_path / "checkpoint"), "to fix:"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
