"""Serve releases to OpenAI clients: llama-cpp-python's server, with Mistral's own prompts.

The first release answers if a request names no model. The API key comes from TRAMONTANE_API_KEY or
a file; without a key the server listens on this machine only.

python -m workflow_scripts.serve.server results/runs/mistral/release
python -m workflow_scripts.serve.server large/release --draft small/release --port 8080
python -m workflow_scripts.serve.server base-folder/ --adapter formal=formal-lora.gguf
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.log import StageError
from workflow_scripts.serve import devices

KEY_VARIABLE = "TRAMONTANE_API_KEY"
logger = log.stage_logger("server")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument(
        "releases", type=Path, nargs="+", metavar="RELEASE", help="folder, or a GGUF in one"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a GGUF LoRA on the first release, served as NAME; may be repeated",
    )
    parser.add_argument(
        "--draft",
        type=Path,
        help="smaller release with the same tokenizer, which guesses ahead",
    )
    parser.add_argument("--draft-tokens", type=int, default=8, help="tokens guessed at a time")
    devices.add_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-file", type=Path, help=f"default: {KEY_VARIABLE}, or no key")
    arguments = parser.parse_args(argv)
    api_key = read_key(arguments.api_key_file)
    if api_key is None and not is_loopback(arguments.host):
        raise StageError(
            "the server would answer the whole network without a key",
            where="--host",
            found=arguments.host,
            expected="127.0.0.1, or an API key",
            to_fix=f"set {KEY_VARIABLE}, or --api-key-file",
        )

    import uvicorn

    from workflow_scripts.serve import loaded_models, release
    from workflow_scripts.serve.application import application

    served = loaded_models.Models(
        [release.read(path) for path in arguments.releases],
        devices.Device(arguments.n_ctx, arguments.n_gpu_layers, arguments.threads),
        adapters=dict(named_file(text) for text in arguments.adapter),
        draft=release.read(arguments.draft) if arguments.draft else None,
        n_ahead=arguments.draft_tokens,
    )
    logger.info("serving models=%s key=%s", ",".join(served), "yes" if api_key else "no")
    uvicorn.run(application(served, api_key), host=arguments.host, port=arguments.port)


def read_key(path: Path | None) -> str | None:
    """The API key from the file or, without a file, from the environment; None if it has none.

    Raises:
        StageError: the file is missing or empty.
    """
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    key = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not key:
        raise StageError("the file has no API key", where=path, expected="a file with the key")
    return key


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def named_file(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise StageError("an adapter needs a name", found=text, expected="NAME=FILE")
    return name, Path(path)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
