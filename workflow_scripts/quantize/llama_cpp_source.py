"""llama.cpp's own converters, from the very source that llama-cpp-python was built of.

They are not part of the wheel; `fetch_llama_cpp` brings them beside the environment.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from workflow_scripts.log import StageError


def source_folder() -> Path:
    """Where the source of the installed version lies, in this Python environment."""
    version = metadata.version("llama-cpp-python")
    return Path(sys.prefix) / "share" / f"llama.cpp-{version}"


def converter(name: str = "convert_hf_to_gguf.py") -> Path:
    """A script of the installed llama.cpp.

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


def gguf_package() -> ModuleType:
    """llama.cpp's own package for reading and writing GGUF.

    Raises:
        StageError: it has not been fetched.
    """
    folder = str(converter("gguf-py"))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("gguf")
