"""Chat with a release in the terminal, or through a pipe.

A line is a message; a line that ends in \\ continues in the next. /system TEXT sets the system
prompt, /new forgets the conversation, /quit ends. Answers go to stdout, everything else to stderr.
When the context is full, the oldest turns are forgotten.

python -m workflow_scripts.serve.chat results/runs/mistral/release --system "Be brief."
echo "What does len do?" | python -m workflow_scripts.serve.chat results/runs/mistral/release
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from workflow_scripts import log
from workflow_scripts.log import StageError
from workflow_scripts.release.modelfile import SAMPLING
from workflow_scripts.serve import devices

if TYPE_CHECKING:
    from workflow_scripts.serve.conversation import Conversation


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("release", type=Path, metavar="RELEASE", help="folder, or a GGUF in one")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--temperature", type=float, default=SAMPLING["temperature"])
    parser.add_argument("--max-tokens", type=int, help="longest answer; default: what fits")
    parser.add_argument("--seed", type=int, help="default: a different answer every time")
    devices.add_arguments(parser)
    arguments = parser.parse_args(argv)

    from workflow_scripts.serve import loaded_models, release
    from workflow_scripts.serve.conversation import Conversation
    from workflow_scripts.serve.prompts import Prompts

    chosen = release.read(arguments.release)
    prompts = Prompts(chosen.tokenizer)
    device = devices.Device(arguments.n_ctx, arguments.n_gpu_layers, arguments.threads)
    # llama-cpp-python would begin every start with the same seed.
    seed = secrets.randbits(31) if arguments.seed is None else arguments.seed
    sampling = {**SAMPLING, "temperature": arguments.temperature, "seed": seed}
    with closing(loaded_models.load(chosen, prompts, device)) as llama:
        context = f"{loaded_models.context_of(llama)} tokens of context"
        tell(f"{chosen.name}, {context}; /system, /new, /quit")
        talk(Conversation(llama, prompts, arguments.system, arguments.max_tokens, sampling))


def talk(conversation: Conversation) -> None:
    """Answer the messages of stdin until it ends, or /quit, or Ctrl+C between two answers."""
    try:
        for line in messages_of(sys.stdin):
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            if command == "/new":
                conversation.turns.clear()
            elif command == "/system":
                conversation.system = rest.strip() or None
            else:
                print_answer(conversation, line)
    except KeyboardInterrupt:
        tell("")


def print_answer(conversation: Conversation, text: str) -> None:
    """Print an answer as it is written. Ctrl+C ends the answer, not the chat."""
    try:
        for piece in conversation.answer(text):
            print(piece, end="", flush=True)
        print(flush=True)
        tell(conversation.speed())
    except StageError as error:
        tell(str(error))
    except KeyboardInterrupt:
        print(flush=True)


def messages_of(lines: TextIO) -> Iterator[str]:
    """Messages of a terminal or a pipe, without empty ones."""
    kept = ""
    for line in prompted(lines):
        line = line.rstrip("\n")
        if line.endswith("\\"):
            kept += line[:-1] + "\n"
            continue
        message, kept = kept + line, ""
        if message.strip():
            yield message
    if kept.strip():
        yield kept


def prompted(lines: TextIO) -> Iterator[str]:
    """Lines of a stream; on a terminal with a prompt, history and line editing."""
    if not lines.isatty():
        yield from lines
        return
    import readline  # noqa: F401, changes input(): only a terminal needs it

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
