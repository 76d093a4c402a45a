"""Fetch llama.cpp's own converters, from the source that llama-cpp-python was built from.

They are not part of the wheel, and the `gguf` package on the index has another version of the code.
So the sdist of the same version is fetched once and checked. Its Python parts are unpacked into the
environment, with the sources of the tools that the tests compare ours with.

python -m workflow_scripts.quantize.fetch_llama_cpp      (make does it; needed once per environment)
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from workflow_scripts import files, log, pinned
from workflow_scripts.log import StageError
from workflow_scripts.quantize.llama_cpp_source import source_folder

SDIST_SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
UNPACKED = (
    "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE",
    "common/", "tools/imatrix/", "tools/quantize/", "tools/perplexity/",
)  # fmt: skip
logger = log.stage_logger("fetch_llama_cpp")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.parse_args(argv)
    if all((source_folder() / name).exists() for name in UNPACKED):
        return
    version = metadata.version("llama-cpp-python")
    if version not in SDIST_SHA256:
        raise StageError(
            "no checksum is known for this llama-cpp-python",
            found=version,
            expected=" or ".join(SDIST_SHA256),
            to_fix="install the version of requirements.lock",
        )
    requirement = f"llama-cpp-python=={version}"
    options = ["--no-binary", "llama-cpp-python"]
    with pinned.downloaded(requirement, SDIST_SHA256[version], options) as sdist:
        with files.atomic_folder(source_folder()) as folder:
            unpack(sdist, folder)
    logger.info("unpacked version=%s path=%s", version, source_folder())


def unpack(sdist: Path, folder: Path) -> None:
    """Unpack the files that `UNPACKED` names from the sdist's `vendor/llama.cpp`.

    Raises:
        StageError: a file would be outside the folder.
    """
    with tarfile.open(sdist) as archive:
        for member in archive:
            _, _, path = member.name.partition("/vendor/llama.cpp/")
            if member.isfile() and path.startswith(UNPACKED):
                # Not `extract`: its filter came with Python 3.11.4, and Debian 12 has 3.11.2.
                if ".." in Path(path).parts:
                    raise StageError("a file would leave its folder", where=sdist, found=path)
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None  # None only for members that are not files
                with source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
                target.chmod(member.mode & 0o755)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
