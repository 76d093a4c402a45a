"""Synthetic chats with the word statistics of real ones, for benchmarks: by seed, streaming.

Real text never runs out of new words (Heaps' law), and an encoder that remembers words is only
measured fairly on text that does the same. So the words come from a Zipf–Mandelbrot law over an
unbounded vocabulary: first the standard library's own words by frequency, then words spelled out of
syllables from their rank. Between them stand whole sentences and code of the standard library,
numbers, identifiers, URLs, and one conversation in ten is in another language. About 1 % are exact
copies of an earlier conversation, and 1 % near copies (2 to 5 % of the words changed).

The file depends on the seed and on the Python version, whose library it quotes, not on the number
of processes.

python -m tests.benchmarks.synthetic_chats --conversations 1000000 --seed 0 --out chats.jsonl
    --statistics chats.json
"""

from __future__ import annotations

import argparse
import functools
import json
import keyword
import math
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from workflow_scripts import files, log, parallel

logger = log.stage_logger("synthetic_chats")

BLOCK_CONVERSATIONS = 1_000
EXACT_COPY_FRACTION = 0.01
NEAR_COPY_FRACTION = 0.01
CHANGED_WORDS_FRACTION = (0.02, 0.05)  # of a near copy
# Earlier conversations that copies are made of: a uniform sample of all that were written.
REMEMBERED_CONVERSATIONS = 2_000

# Share of words from the 2,000 most frequent, by Zipf's law with exponent 1; the others follow
# P(rank) ∝ (rank + offset)^−exponent, whose distinct words grow as (words)^(1 ÷ exponent).
FREQUENT_FRACTION = 0.45
N_FREQUENT = 2_000
TAIL_EXPONENT = 1.55
TAIL_OFFSET = 100.0
LIBRARY_SENTENCE_FRACTION = 0.3

ENGLISH_FRACTION = 0.9
# Consonants and vowels of a syllable. The words mean nothing: what a tokenizer sees is letters.
ALPHABETS = {
    "latin": (
        "b c d f g h j k l m n p r s t v w br ch cl cr dr fl gr pl pr sh sl sp st th tr".split(),
        "a e i o u ai ea ee io ou".split(),
    ),
    "accented": (
        "b c d f g h j l m n p qu r s t v z ch gn pr tr schl ß ñ ç".split(),
        "a e i o u é è ê à ö ü ä ó í á ei au".split(),
    ),
    "cyrillic": (
        "б в г д ж з к л м н п р с т ф х ц ч ш щ ст пр тр".split(),
        "а е и о у ы я ю ё ие".split(),
    ),
    "greek": (
        "β γ δ ζ θ κ λ μ ν ξ π ρ σ τ φ χ ψ στ πρ".split(),
        "α ε η ι ο υ ω ά έ ή ί ό ου".split(),
    ),
    "arabic": ("ب ت ث ج ح خ د ر ز س ش ص ط ع غ ف ق ك ل م ن ه".split(), "ا و ي ة".split()),
    "devanagari": ("क ख ग घ च ज ट ड त द न प ब म य र ल व श स ह".split(), "ा ि ी ु े ो ै".split()),
}
ENDINGS = {"latin": ["", "s", "n", "r", "ed", "ing", "ly"], "accented": ["", "n", "s", "r"]}
N_HAN = 6_000  # characters of Chinese, from U+4E00; it is written without spaces
OTHER_LANGUAGES = ["accented", "accented", "cyrillic", "cyrillic", "han", "greek", "arabic"]
OTHER_LANGUAGES += ["devanagari"]
FULL_STOP = {"han": "。", "devanagari": " ।"}

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about programming. Be exact, and show code where it helps.",
    "Answer briefly, in the language of the question.",
    "You are a careful editor: keep the author's meaning and say what you changed.",
)
OPENINGS = ("Explain: ", "How do I do this? ", "", "", "", "Is this right? ", "In short: ")
N_EXCHANGES = (1, 2, 3, 4, 5)
EXCHANGES_WEIGHTS = (35, 25, 20, 12, 8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--conversations", type=int, required=True, help="how many to write")
    parser.add_argument("--seed", type=int, default=0, help="which")
    parser.add_argument("--processes", type=int, default=2, help="default 2; changes no byte")
    parser.add_argument("--out", type=Path, required=True, help="to write: JSON Lines")
    parser.add_argument("--statistics", type=Path, help="to write: words, bytes, copies")
    arguments = parser.parse_args(argv)

    made = write_chats(
        arguments.out,
        n_conversations=arguments.conversations,
        seed=arguments.seed,
        n_processes=arguments.processes,
    )
    logger.info("wrote %s", log.fields(made))
    if arguments.statistics:
        measured = measure(arguments.out)
        files.write_json(arguments.statistics, {**made, **measured})
        logger.info("measured %s", log.fields(measured))


def write_chats(
    path: Path, *, n_conversations: int, seed: int, n_processes: int
) -> dict[str, int | str]:
    """Write the file; how many conversations are copies, and the file's hash."""
    copies: Counter[str] = Counter()
    with files.atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for line, kind in chat_lines(
            n_conversations=n_conversations, seed=seed, n_processes=n_processes
        ):
            stream.write(line + "\n")
            copies[kind] += 1
    return {
        "n_conversations": n_conversations,
        "seed": seed,
        "n_exact_copies": copies["exact"],
        "n_near_copies": copies["near"],
        "sha256": files.sha256(path),
    }


def chat_lines(
    *, n_conversations: int, seed: int, n_processes: int = 1
) -> Iterator[tuple[str, str]]:
    """Lines of the file, each with its kind: `original`, `exact` or `near` copy."""
    # Blocks are seeded by their number, so any process can make any of them.
    n_blocks = math.ceil(n_conversations / BLOCK_CONVERSATIONS)
    blocks = parallel.map_in_order(
        make_block, [(seed, number) for number in range(n_blocks)], n_processes=n_processes
    )
    originals = (line for block in blocks for line in block)
    generator = random.Random(f"copies {seed}")
    remembered: list[str] = []
    for n_written, line in enumerate(originals):
        if n_written == n_conversations:
            break
        drawn = generator.random()
        if remembered and drawn < EXACT_COPY_FRACTION:
            yield generator.choice(remembered), "exact"
        elif remembered and drawn < EXACT_COPY_FRACTION + NEAR_COPY_FRACTION:
            yield near_copy(generator.choice(remembered), generator), "near"
        else:
            yield line, "original"
            if len(remembered) < REMEMBERED_CONVERSATIONS:
                remembered.append(line)
            elif (place := generator.randrange(n_written)) < REMEMBERED_CONVERSATIONS:
                remembered[place] = line


def near_copy(line: str, generator: random.Random) -> str:
    """The conversation with 2 to 5 % of its words changed, at least one."""
    record = json.loads(line)
    words = [message["content"].split(" ") for message in record["messages"]]
    places = [(m, w) for m, message in enumerate(words) for w in range(len(message))]
    n_changed = max(1, round(len(places) * generator.uniform(*CHANGED_WORDS_FRACTION)))
    for m, w in generator.sample(places, n_changed):
        words[m][w] = spell(generator.randrange(10**6), "latin")
    for message, pieces in zip(record["messages"], words, strict=True):
        message["content"] = " ".join(pieces)
    return as_line(record)


def make_block(seed_and_number: tuple[int, int]) -> list[str]:
    """The lines of one block of conversations, none of them a copy."""
    seed, number = seed_and_number
    writer = Writer(random.Random(f"{seed} {number}"))
    return [as_line(writer.conversation()) for _ in range(BLOCK_CONVERSATIONS)]


def as_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


class Writer:
    """Writes conversations, everything in them drawn from one generator."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator
        self._sentences: dict[str, Iterator[str]] = {}

    def conversation(self) -> dict[str, Any]:
        """An OpenAI-style record of 1 to 5 questions and as many answers, about 600 tokens."""
        draw = self._generator
        english = draw.random() < ENGLISH_FRACTION
        language = "latin" if english else draw.choice(OTHER_LANGUAGES)
        messages = []
        if draw.random() < 0.25:
            prompt = draw.choice(SYSTEM_PROMPTS)
            if draw.random() < 0.3:
                prompt += " " + self.sentence(language)
            messages.append({"role": "system", "content": prompt})
        for _ in range(draw.choices(N_EXCHANGES, EXCHANGES_WEIGHTS)[0]):
            question = draw.choice(OPENINGS) + self.sentence(language)
            if draw.random() < 0.2:
                question += "\n\n" + self.section(language)
            sections = [self.section(language) for _ in range(self._n_sections())]
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": "\n\n".join(sections)})
        return {"messages": messages}

    def _n_sections(self) -> int:
        return min(20, 1 + int(self._generator.lognormvariate(0.1, 0.75)))

    def section(self, language: str) -> str:
        """A paragraph, a list or a block of code."""
        draw = self._generator
        kind = draw.random()
        if kind < 0.12:
            return f"```python\n{self.code()}\n```"
        if kind < 0.25:
            items = [self.sentence(language) for _ in range(draw.randint(3, 6))]
            if kind < 0.19:
                return "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))
            return "\n".join(f"- **{item.split(' ', 1)[0]}**: {item}" for item in items)
        return " ".join([self.sentence(language) for _ in range(draw.randint(2, 5))])

    def sentence(self, language: str) -> str:
        if language == "latin" and self._generator.random() < LIBRARY_SENTENCE_FRACTION:
            return self._generator.choice(library().sentences)
        if language not in self._sentences:
            self._sentences[language] = sentences(language, self._generator)
        return next(self._sentences[language])

    def code(self) -> str:
        """A few lines of the library, some of its names changed."""
        draw, lines = self._generator, library().lines
        first = draw.randrange(len(lines))
        snippet = "\n".join(lines[first : first + draw.randint(4, 14)])
        names = sorted(set(re.findall(r"\b[a-z][a-z_]{4,}\b", snippet)) - set(keyword.kwlist))
        for name in draw.sample(names, min(2, len(names))):
            snippet = snippet.replace(name, identifier(draw))
        return snippet


def sentences(language: str, generator: random.Random) -> Iterator[str]:
    """Sentences without end, their words drawn thousands at a time."""
    import numpy as np

    arrays = np.random.default_rng(generator.getrandbits(64))
    separator = "" if language == "han" else " "
    while True:
        lengths = np.minimum(3 + arrays.poisson(arrays.gamma(4.0, 3.2, size=256)), 60)
        words = draw_words(language, int(lengths.sum()), arrays)
        for place in np.flatnonzero(arrays.random(len(words)) < 0.03):
            words[place] = unusual_word(words[place], generator)
        for place in np.flatnonzero(arrays.random(len(words)) < 0.06):
            words[place] += ","
        last = 0
        for length in lengths.tolist():
            text = separator.join(words[last : last + length])
            last += length
            yield text[:1].upper() + text[1:] + FULL_STOP.get(language, generator.choice("....?!:"))


def draw_words(language: str, n_words: int, arrays: Any) -> list[str]:
    """Words by their rank: the frequent ones by Zipf's law, the others by Zipf–Mandelbrot's.

    Args:
        arrays: numpy's generator.
    """
    import numpy as np

    frequent = np.searchsorted(_frequent_cumulative(), arrays.random(n_words))
    # Inverse of the survival function (1 + rank ÷ offset)^−(exponent − 1).
    uniform = 1.0 - arrays.random(n_words)
    tail = TAIL_OFFSET * (uniform ** (-1.0 / (TAIL_EXPONENT - 1.0)) - 1.0)
    is_frequent = arrays.random(n_words) < FREQUENT_FRACTION
    ranks = np.where(is_frequent, frequent, np.minimum(tail, 1e15)).astype(np.int64)
    known = known_words(language)
    return [known[rank] if rank < len(known) else spell(rank, language) for rank in ranks.tolist()]


@functools.cache
def _frequent_cumulative() -> Any:
    """Cumulative probabilities of the frequent words, P(rank) ∝ 1 ÷ (rank + 1)."""
    import numpy as np

    weights = 1.0 / np.arange(1, N_FREQUENT + 1)
    return np.cumsum(weights / weights.sum())[:-1]


@functools.cache
def known_words(language: str) -> list[str]:
    """Words of the first ranks: the library's for English, else spelled once for all."""
    if language == "latin":
        return library().words
    if language == "han":
        return [chr(0x4E00 + 7_919 * rank % N_HAN) for rank in range(N_HAN)]
    return [spell(rank, language) for rank in range(20_000)]


def spell(rank: int, language: str) -> str:
    """A word of its own for every rank, longer as the rank grows; of Chinese, a character.

    Consonants and vowels alternate, so that no two sequences of syllables read the same (an ending
    `er` would break this: be-er, bee-r).
    """
    if language == "han":
        return chr(0x4E00 + rank % N_HAN)
    consonants, vowels = ALPHABETS[language]
    endings = ENDINGS.get(language, [""])
    n_syllables, n_words = 2, (len(consonants) * len(vowels)) ** 2 * len(endings)
    while rank >= n_words:
        rank -= n_words
        n_syllables += 1
        n_words *= len(consonants) * len(vowels)
    # A step prime to the number of words: neighbours in rank share no letters.
    rest, ending = divmod(rank * 1_000_003 % n_words, len(endings))
    letters = []
    for _ in range(n_syllables):
        rest, consonant = divmod(rest, len(consonants))
        rest, vowel = divmod(rest, len(vowels))
        letters.append(consonants[consonant] + vowels[vowel])
    return "".join(letters) + endings[ending]


def unusual_word(word: str, generator: random.Random) -> str:
    """A number, an identifier, a name or a URL in the place of a word."""
    kind = generator.random()
    if kind < 0.25:
        return str(int(math.exp(generator.uniform(0, 14))))
    if kind < 0.4:
        return f"{generator.uniform(0, 100):.{generator.randint(1, 3)}f}"
    if kind < 0.5:
        return f"{generator.randint(1950, 2030)}-{generator.randint(1, 12):02}"
    if kind < 0.75:
        return f"`{identifier(generator)}`"
    if kind < 0.95:
        return word.capitalize()
    path = "/".join(identifier(generator) for _ in range(generator.randint(1, 3)))
    return f"https://www.{spell(generator.randrange(10**5), 'latin')}.com/{path}"


def identifier(generator: random.Random) -> str:
    """`snake_case`, `camelCase` or `dotted.name` of one to three words."""
    known = known_words("latin")
    words = [
        known[int(len(known) * generator.random() ** 3)] for _ in range(generator.randint(1, 3))
    ]
    style = generator.random()
    if style < 0.5:
        return "_".join(words)
    if style < 0.8:
        return words[0] + "".join(word.capitalize() for word in words[1:])
    return ".".join(words)


@dataclass(frozen=True)
class Library:
    """What the standard library of this interpreter offers."""

    lines: list[str]
    """Source, a line each."""
    sentences: list[str]
    """Of the docstrings, each once."""
    words: list[str]
    """Lower-case words of the docstrings, the most frequent first."""


# Not installed everywhere, or not the library's own.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages"}


@functools.cache
def library() -> Library:
    """Read once a process, in about a second."""
    root = Path(sysconfig.get_path("stdlib"))
    lines: list[str] = []
    found: dict[str, None] = {}
    counts: Counter[str] = Counter()
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        # pydoc's topics are one long literal a line, no code that anyone writes.
        lines.extend(line.rstrip() for line in source.splitlines() if line and len(line) < 120)
        for docstring in re.findall(r'"""(.*?)"""', source, re.DOTALL):
            counts.update(re.findall(r"\b[a-z]{2,14}\b", docstring))
            for text in re.split(r"(?<=[.!?])\s+", docstring):
                text = " ".join(text.split())
                if 20 <= len(text) <= 300:
                    found[text] = None
    # Equal counts by spelling: the order of a Counter is that of the files.
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return Library(lines, list(found), words)


def measure(path: Path) -> dict[str, Any]:
    """Words of the file (what stands between white space) against distinct ones, as it grows.

    Keeps every distinct word: about a gigabyte for a million conversations.

    Returns:
        `growth`, at every power of ten from 1,000 and at the end; `heaps_exponent`, the slope of
        log distinct words against log words over the last tenfold.
    """
    growth: list[dict[str, int]] = []
    distinct: set[str] = set()
    n_words = n_bytes = n_conversations = 0

    def note() -> None:
        growth.append(
            {
                "n_conversations": n_conversations,
                "n_bytes": n_bytes,
                "n_words": n_words,
                "n_distinct_words": len(distinct),
            }
        )

    with path.open("rb") as stream:
        for n_conversations, line in enumerate(stream, start=1):
            n_bytes += len(line)
            for message in json.loads(line)["messages"]:
                words = message["content"].split()
                n_words += len(words)
                distinct.update(words)
            if n_conversations >= 1_000 and n_conversations == 10 ** round(
                math.log10(n_conversations)
            ):
                note()
    if not growth or growth[-1]["n_conversations"] != n_conversations:
        note()
    return {"growth": growth, "heaps_exponent": heaps_exponent(growth)}


def heaps_exponent(growth: Sequence[dict[str, int]]) -> float | None:
    """Of the last two points; None where there is one alone."""
    for before, after in [*pairwise(growth)][-1:]:
        return math.log(after["n_distinct_words"] / before["n_distinct_words"]) / math.log(
            after["n_words"] / before["n_words"]
        )
    return None


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
