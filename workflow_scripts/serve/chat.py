"""Chat with a release in the terminal, or through a pipe.

A line is a message; one that ends in \\ goes on in the next. /system TEXT sets the system prompt,
/new forgets the conversation, /quit ends. Answers go to stdout, all else to stderr. What no longer
fits into the context is forgotten, oldest turn first.

python -m workflow_scripts.serve.chat results/runs/mistral/release --system "Be brief."
echo "What does len do?" | python -m workflow_scripts.serve.chat results/runs/mistral/release
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from workflow_scripts import log
from workflow_scripts.log import StageError
from workflow_scripts.release.modelfile import SAMPLING
from workflow_scripts.serve import loaded_models, release
from workflow_scripts.serve.prompts import Message, Prompts

if TYPE_CHECKING:
    from llama_cpp import Llama
    from llama_cpp.llama_types import ChatCompletionRequestMessage

# Left for the answer when old turns are forgotten, as a share of the context.
ANSWER_FRACTION = 0.25


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("release", type=Path, metavar="RELEASE", help="folder, or a GGUF in one")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--temperature", type=float, default=SAMPLING["temperature"])
    parser.add_argument("--max-tokens", type=int, help="longest answer; default: what fits")
    parser.add_argument("--seed", type=int, help="default: another answer every time")
    loaded_models.add_arguments(parser)
    arguments = parser.parse_args(argv)

    chosen = release.read(arguments.release)
    prompts = Prompts(chosen.tokenizer)
    llama = loaded_models.load(chosen, prompts, loaded_models.device_of(arguments))
    try:
        tell(
            f"{chosen.name}, {loaded_models.context_of(llama)} tokens of context; /system, /new,"
            " /quit"
        )
        # llama-cpp-python would begin with one seed at every start.
        seed = secrets.randbits(31) if arguments.seed is None else arguments.seed
        sampling = {**SAMPLING, "temperature": arguments.temperature, "seed": seed}
        talk = Conversation(llama, prompts, arguments.system, arguments.max_tokens, sampling)
        for line in messages_of(sys.stdin):
            command, _, rest = line.partition(" ")
            if command == "/quit":
                break
            elif command == "/new":
                talk.turns.clear()
            elif command == "/system":
                talk.system = rest.strip() or None
            else:
                try:
                    for text in talk.answer(line):
                        print(text, end="", flush=True)
                    print(flush=True)
                    tell(speed(llama))
                except StageError as error:
                    tell(str(error))
                except KeyboardInterrupt:
                    print(flush=True)
    except KeyboardInterrupt:
        tell("")
    finally:
        llama.close()


@dataclass
class Conversation:
    """A chat with one model, within its context."""

    llama: Llama
    prompts: Prompts
    system: str | None
    max_tokens: int | None
    sampling: dict[str, Any]
    turns: list[Message] = field(default_factory=list)

    def answer(self, text: str) -> Iterator[str]:
        """The answer to a message, as it is written; what was said of it is kept.

        Raises:
            StageError: the message alone does not fit into the context.
        """
        self.turns.append({"role": "user", "content": text})
        self._forget()
        messages = cast("list[ChatCompletionRequestMessage]", self._messages())
        chunks = self.llama.create_chat_completion(
            messages, stream=True, max_tokens=self.max_tokens, **self.sampling
        )
        assert isinstance(chunks, Iterator)  # as `stream` asks for
        said = ""
        try:
            for chunk in chunks:
                piece = str(chunk["choices"][0]["delta"].get("content") or "")
                said += piece
                if piece:
                    yield piece
        finally:  # interrupted, it stays as far as it was said
            if said:
                self.turns.append({"role": "assistant", "content": said})
            else:
                self.turns.pop()  # an empty answer has no rendering

    def _messages(self) -> list[Message]:
        system = [Message(role="system", content=self.system)] if self.system else []
        return system + self.turns

    def _forget(self) -> None:
        """Drop the oldest turns until the rest leaves room for an answer."""
        n_ctx = loaded_models.context_of(self.llama)
        n_forgotten = 0
        while len(self.prompts.render(self._messages())) > (1 - ANSWER_FRACTION) * n_ctx:
            if len(self.turns) == 1:
                self.turns.clear()
                raise StageError(
                    "the message does not fit into the context", expected=f"{n_ctx} tokens"
                )
            del self.turns[:2]
            n_forgotten += 1
        if n_forgotten:
            tell(f"forgot the oldest turns: {n_forgotten}")


def messages_of(lines: TextIO) -> Iterator[str]:
    """Messages of a terminal or a pipe; empty ones are left out."""
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
    import readline  # noqa: F401, makes input() edit lines

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def speed(llama: Llama) -> str:
    """llama.cpp's own figures of the last answer, set back for the next."""
    import llama_cpp

    measured = llama_cpp.llama_perf_context(llama.ctx)
    llama_cpp.llama_perf_context_reset(llama.ctx)
    parts = []
    for what, n, milliseconds in (
        ("prompt", measured.n_p_eval, measured.t_p_eval_ms),
        ("answer", measured.n_eval, measured.t_eval_ms),
    ):
        rate = f", {1000 * n / milliseconds:.1f} tokens/s" if milliseconds > 0 else ""
        parts.append(f"{what} {n} tokens{rate}")
    return "; ".join(parts)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
