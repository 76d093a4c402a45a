"""llama.cpp's own converters, from the source that llama-cpp-python was built from.

They are not part of the wheel; `fetch_llama_cpp` puts them into the Python environment.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from workflow_scripts.log import StageError


def source_folder() -> Path:
    """Return the folder of the installed version's source in this Python environment."""
    version = metadata.version("llama-cpp-python")
    return Path(sys.prefix) / "share" / f"llama.cpp-{version}"


def converter(name: str = "convert_hf_to_gguf.py") -> Path:
    """Return a script of the installed llama.cpp.

    Raises:
        StageError: it has not been fetched.
    """
    script = source_folder() / name
    if not script.exists():
        raise StageError(
            "llama.cpp's converter is not in this environment",
            where=script,
            to_fix="python -m workflow_scripts.quantize.fetch_llama_cpp",
        )
    return script


def convert(script: str, source: Path, gguf: Path, *options: str) -> None:
    """Run one of llama.cpp's converters. It reports errors on stderr, which is the stage's log.

    Args:
        source: folder that the user knows, for messages.
        gguf: file to write.
    Raises:
        StageError: the converter failed, or has not been fetched.
    """
    command = [sys.executable, str(converter(script)), "--outfile", str(gguf), *options]
    if subprocess.run(command, check=False).returncode or not gguf.is_file():
        # On a full disk the converter reports only how much it could not write.
        n_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        free = shutil.disk_usage(gguf.parent).free
        raise StageError(
            "llama.cpp's converter failed",
            where=source,
            found=" ".join(command),
            to_fix=f"see its message above; the file takes about {n_bytes / 1e9:.1f} GB, and"
            f" {free / 1e9:.1f} GB are free",
        )


def gguf_package() -> ModuleType:
    """Import llama.cpp's own package for reading and writing GGUF.

    Raises:
        StageError: it has not been fetched.
    """
    folder = str(converter("gguf-py"))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("gguf")
