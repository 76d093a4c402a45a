from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from importlib import metadata

import pytest

from workflow_scripts.log import StageError
from workflow_scripts.quantize import fetch_llama_cpp, llama_cpp_source

ROOT = "llama_cpp_python-1.2.3"


def archive(path, names):
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


def test_only_the_converters_their_imports_and_the_tools_are_unpacked(tmp_path):
    wanted = [
        "convert_hf_to_gguf.py",
        "conversion/mistral.py",
        "gguf-py/gguf/constants.py",
        "convert_lora_to_gguf.py",
        "tools/imatrix/imatrix.cpp",
        "common/common.h",
        "LICENSE",
    ]
    others = ["src/llama.cpp", "tools/server/main.cpp", "gguf-py/README.md", "docs/conversion/a"]
    names = [f"{ROOT}/vendor/llama.cpp/{name}" for name in [*wanted, *others]]
    sdist = archive(tmp_path / "a.tar.gz", [*names, f"{ROOT}/convert_hf_to_gguf.py"])
    folder = tmp_path / "folder"
    folder.mkdir()
    fetch_llama_cpp.unpack(sdist, folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == set(wanted)
    for name in wanted:
        assert (folder / name).read_text() == f"{ROOT}/vendor/llama.cpp/{name}"


def test_a_member_that_leaves_the_folder_is_refused(tmp_path):
    name = f"{ROOT}/vendor/llama.cpp/conversion/../../outside.py"
    sdist = archive(tmp_path / "a.tar.gz", [name])
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(StageError, match="leave its folder"):
        fetch_llama_cpp.unpack(sdist, folder)
    assert not (tmp_path / "outside.py").exists()


def test_the_converter_of_the_installed_version_is_there_and_runs():
    script = llama_cpp_source.converter()
    version = metadata.version("llama-cpp-python")
    assert script.parent.name == f"llama.cpp-{version}"
    assert version in fetch_llama_cpp.SDIST_SHA256
    done = subprocess.run(
        [sys.executable, str(script), "--print-supported-models"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "MistralForCausalLM" in done.stdout + done.stderr


def test_nothing_is_fetched_if_the_converter_is_there_already(run_stage):
    before = llama_cpp_source.converter().stat().st_mtime_ns
    done = run_stage("workflow_scripts.quantize.fetch_llama_cpp", PIP_INDEX_URL="http://0.0.0.0:9")
    assert done.returncode == 0, done.stderr
    assert llama_cpp_source.converter().stat().st_mtime_ns == before


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.quantize.fetch_llama_cpp")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers"}
