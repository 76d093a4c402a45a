"""Print the build options of llama.cpp and the CPU features it uses, for `probes` to read."""

from __future__ import annotations

import llama_cpp

from workflow_scripts.doctor.probes import LlamaCpp, error_of, tell
from workflow_scripts.quantize import llama_cpp_source

if __name__ == "__main__":
    tell(
        LlamaCpp(
            version=llama_cpp.__version__,
            offloads=bool(llama_cpp.llama_supports_gpu_offload()),
            system=llama_cpp.llama_print_system_info().decode(),
            converter_error=error_of(llama_cpp_source.converter),
        )
    )
