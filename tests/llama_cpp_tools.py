"""llama.cpp's own programs, compiled from the source of the installed llama-cpp-python, with its
libraries."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

from workflow_scripts import files
from workflow_scripts.quantize import llama_cpp_source

LIBRARIES = Path(sysconfig.get_path("platlib")) / "lib"
ENVIRONMENT = {"LD_LIBRARY_PATH": str(LIBRARIES)}
"""Environment that a program needs to start."""

FLUSH = """
#include "log.h"
static const struct Flush { ~Flush() { common_log_pause(common_log_main()); } } flush;
"""
"""Wait at a program's end until its log is written. llama.cpp's own programs do not: a thread
writes their figures as log lines, and on a busy machine the last lines were missing once in 120
runs (https://github.com/ggml-org/llama.cpp/issues/22142)."""


def compiled(name: str, folder: Path, *, optimization: str = "-O1") -> Path:
    """Return the program `llama-<name>`; the folder keeps it until this file changes."""
    program = folder / f"llama-{name}"
    if program.exists() and program.stat().st_mtime > Path(__file__).stat().st_mtime:
        return program
    source = llama_cpp_source.source_folder()
    with files.atomic_file(program) as temporary:  # other processes compile it too
        command = ["c++", "-std=c++17", optimization, "-DNDEBUG", "-o", temporary]
        command += [f"-I{source / 'common'}", f"-I{LIBRARIES.parent / 'include'}"]
        command += [*sorted((source / "tools" / name).glob("*.cpp")), *"-x c++ - -x none".split()]
        command += [f"-L{LIBRARIES}", "-pthread"]
        command += [f"-l{library}" for library in ("llama-common", "llama", "ggml", "ggml-base")]
        subprocess.run(command, input=FLUSH, text=True, check=True)
    return program
