"""Draw the pictures of the documentation: a packed row with its mask, and the steps of a build.

python docs/tools/drawings.py            (or: make docs; it writes docs/images/)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "images"

# The colours follow the reader's system. Each drawing has its own background, so that it can be
# read on a page of the other kind too.
STYLE = """\
<style>
  svg { --paper: #ffffff; --ink: #1f2933; --faint: #616e7c; --line: #cbd2d9; --empty: #f1f4f7;
    --a: #1d7a8c; --b: #b4540a; --c: #6b4fa0; --gate: #b3261e; --box: #e8eef3; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #1b2128; --ink: #e4e7eb; --faint: #9aa5b1; --line: #47525d; --empty: #262e37;
      --a: #4fb3c6; --b: #e8964f; --c: #a58bd8; --gate: #f28b82; --box: #2b3540; }
  }
  text { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
  .faint { fill: var(--faint); } .mono { font-family: ui-monospace, Menlo, Consolas, monospace; }
  .gate { fill: var(--gate); }
</style>
"""


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, drawing in drawings().items():
        (IMAGES / name).write_text(drawing, encoding="utf-8")


def drawings() -> dict[str, str]:
    """Every drawing by the name of its file."""
    return {"packed-row.svg": packed_row(), "steps.svg": steps()}


# A packed row: three documents, a window of four tokens and two places that stay empty.
LENGTHS = (("A", 8), ("B", 4), ("C", 6))
ROW_TOKENS = 20
WINDOW = 4
CELL = 22


def packed_row() -> str:
    owner = [name for name, length in LENGTHS for _ in range(length)]
    owner += [""] * (ROW_TOKENS - len(owner))
    left, top = 60, 92
    size = ROW_TOKENS * CELL
    parts = [text(left, 26, "One row of training: which tokens each token sees", 17, weight=600)]
    parts.append(
        text(left, 48, f"three documents, a sliding window of {WINDOW} tokens", 13, "faint")
    )
    parts += [place(owner, at, left + at * CELL, top - 28) for at in range(ROW_TOKENS)]
    parts += [place(owner, at, left - 28, top + at * CELL) for at in range(ROW_TOKENS)]
    for query in range(ROW_TOKENS):
        for key in range(ROW_TOKENS):
            parts.append(cell(owner, query, key, left + key * CELL, top + query * CELL))
    parts.append(
        f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none"'
        ' stroke="var(--line)"/>'
    )
    parts.append(
        text(left + size / 2, top + size + 26, "token that is seen (key)", 13, "faint", "middle")
    )
    parts.append(
        f'<g transform="rotate(-90 18 {top + size / 2})">'
        + text(18, top + size / 2, "token that sees (query)", 13, "faint", "middle")
        + "</g>"
    )
    parts += legend(left + size + 36, top + 4)
    return svg(left + size + 310, top + size + 46, parts, "A packed row and its attention mask")


def colour(owner: list[str], at: int) -> str:
    return f"var(--{owner[at].lower()})" if owner[at] else "var(--empty)"


def place(owner: list[str], at: int, x: float, y: float) -> str:
    """A token of the row, with the position that it has in its document."""
    side = CELL - 2
    drawn = (
        f'<rect x="{x + 1}" y="{y}" width="{side}" height="{side}" rx="3"'
        f' fill="{colour(owner, at)}"/>'
    )
    if not owner[at]:
        return drawn
    position = at - owner.index(owner[at])
    return (
        f'{drawn}<text x="{x + CELL / 2}" y="{y + 14}" font-size="11" text-anchor="middle"'
        f' style="fill: var(--paper)">{position}</text>'
    )


def cell(owner: list[str], query: int, key: int, x: float, y: float) -> str:
    """A pair of tokens: seen, excluded by one of the three conditions, or empty."""
    same = owner[query] == owner[key] != ""
    if same and 0 <= query - key < WINDOW:
        return square(x, y, f'fill="{colour(owner, query)}"')
    if same and query > key:
        return square(x, y, f'fill="{colour(owner, query)}" opacity="0.22"')
    if query > key and owner[query]:
        return square(
            x, y, 'fill="none" stroke="var(--gate)" stroke-opacity="0.55" stroke-dasharray="2 2"'
        )
    return square(x, y, 'fill="var(--empty)"')


def square(x: float, y: float, look: str) -> str:
    return f'<rect x="{x + 1.5}" y="{y + 1.5}" width="{CELL - 3}" height="{CELL - 3}" {look}/>'


def legend(x: float, y: float) -> Iterator[str]:
    rows = (
        (
            'fill="var(--a)"',
            ("seen: same document, not later,", f"at most {WINDOW - 1} tokens back"),
        ),
        ('fill="var(--a)" opacity="0.22"', ("same document, but beyond", "the window")),
        (
            'fill="none" stroke="var(--gate)" stroke-opacity="0.8" stroke-dasharray="2 2"',
            ("another document: seen, within the", "window, if packed end to end"),
        ),
        (
            'fill="var(--empty)" stroke="var(--line)"',
            ("later tokens, and places", "that stay empty"),
        ),
    )
    for at, (look, lines) in enumerate(rows):
        yield square(x, y + at * 54, look)
        yield from (
            text(x + 32, y + at * 54 + 15 + 17 * n, line, 13) for n, line in enumerate(lines)
        )
    lines = ("Numbers are positions. They", "restart at 0 in each document.")
    yield from (text(x, y + 244 + 17 * n, line, 13, "faint") for n, line in enumerate(lines))


# The steps of a build: title, programs, and the gate that follows.
STEPS = (
    ("Clean and split", "clean_dataset", ""),
    ("Render to tokens", "render_chats", "check_tokens"),
    ("Pack into rows", "pack_sequences", "plan_memory"),
    ("Train", "train_adapter", ""),
    ("Merge", "choose_merge_base, merge_adapter", "check_merged"),
    ("Convert", "convert_gguf", "check_gguf"),
    ("Quantize", "compute_imatrix, quantize_gguf", ""),
    ("Measure every link", "evaluate_perplexity, benchmark_inference, …", ""),
)
BOX, GAP, WIDE = 54, 34, 330


def steps() -> str:
    left, top = 255, 20
    parts = ['<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8"'
             ' markerHeight="8" orient="auto"><path d="M0 0 8 4 0 8z" fill="var(--faint)"/>'
             "</marker></defs>"]  # fmt: skip
    middle = left + WIDE / 2
    for at, (title, programs, gate) in enumerate(STEPS):
        y = top + at * (BOX + GAP)
        parts.append(box(left, y, WIDE, title, programs))
        last = at == len(STEPS) - 1
        if not last:
            parts.append(arrow((middle, y + BOX), (middle, y + BOX + GAP)))
        if gate:
            parts.append(text(middle + 14, y + BOX + 22, f"gate: {gate}", 12.5, "mono gate"))

    def of_step(at: int) -> float:
        return top + at * (BOX + GAP) + BOX / 2

    sources = (
        (0, "Your chats", "files, or a Hub dataset", (0,)),
        (1, "Tokenizer", "export_tokenizer", (1,)),
        (2, "Base model", "fetch_base_model, …", (3,)),
        (4, "Your adapter", "instead of training", (4,)),
        (5, "Your merged model", "instead of merging", (5,)),
    )
    for at, title, programs, targets in sources:
        parts.append(box(10, top + at * (BOX + GAP), 200, title, programs, outlined=True))
        parts += [arrow((210, of_step(at)), (left, of_step(to))) for to in targets]
    right = left + WIDE + 50
    made = (
        (0, "Pages to look at", "report_cleaning, preview_chats", 0),
        (6, "AWQ folder", "quantize_awq (awq.use)", 4),
        (7, "Reports and release", "report_overview, package_release", 7),
    )
    for at, title, programs, origin in made:
        parts.append(box(right, top + at * (BOX + GAP), 260, title, programs, outlined=True))
        parts.append(arrow((left + WIDE, of_step(origin)), (right, of_step(at))))
    height = top + len(STEPS) * (BOX + GAP) - GAP + 20
    return svg(right + 270, height, parts, "The steps of a build and their gates")


def box(
    x: float, y: float, wide: float, title: str, programs: str, *, outlined: bool = False
) -> str:
    look = (
        'fill="none" stroke="var(--line)" stroke-width="1.5"' if outlined else 'fill="var(--box)"'
    )
    return (
        f'<rect x="{x}" y="{y}" width="{wide}" height="{BOX}" rx="8" {look}/>'
        + text(x + 14, y + 23, title, 15, weight=600)
        + text(x + 14, y + 42, programs, 12 if not outlined else 11.5, "faint mono")
    )


def arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (to_x, to_y) = start, end
    between = (x + to_x) / 2
    path = f"M{x} {y}V{to_y}" if x == to_x else f"M{x} {y}H{between}V{to_y}H{to_x}"
    return (
        f'<path d="{path}" fill="none" stroke="var(--faint)" stroke-width="1.5"'
        ' marker-end="url(#tip)"/>'
    )


def text(
    x: float,
    y: float,
    words: str,
    size: float,
    kind: str = "",
    anchor: str = "start",
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" class="{kind}" text-anchor="{anchor}"'
        f' font-weight="{weight}">{words}</text>'
    )


def svg(width: float, height: float, parts: list[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">\n'
        f"<!-- drawn by docs/tools/drawings.py -->\n<title>{title}</title>\n{STYLE}"
        f'<rect width="{width:g}" height="{height:g}" rx="10" fill="var(--paper)"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
