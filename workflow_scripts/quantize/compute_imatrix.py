"""Importance matrix of the F16 GGUF: which input channels a quantization must keep precise.

Computed on chats of the training split and on text files the user names, never on validation or
test text. The same sums as llama.cpp's own llama-imatrix, in the same file.

python -m workflow_scripts.quantize.compute_imatrix --gguf run-F16.gguf --facts facts.json
    --tokens tokens/train.arrow --settings '{}' --threads 2 --imatrix imatrix.gguf
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.log import StageError
from workflow_scripts.settings import ImatrixSettings, settings_from_json

if TYPE_CHECKING:
    import numpy as np

    from workflow_scripts.quantize.importance import Collector
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

OUTPUT_VERSION = 1
# llama-imatrix's own default.
CHUNK_TOKENS = 512
N_SEQUENCES = 64
# A text's token is seldom longer; what is behind would not be reached.
CHARACTERS_PER_TOKEN = 16
logger = log.stage_logger("compute_imatrix")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="F16 GGUF")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokens", type=Path, required=True, help="training documents")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="text files as well")
    parser.add_argument("--settings", required=True, help="JSON of `gguf.imatrix`")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads of llama.cpp")
    parser.add_argument("--imatrix", type=Path, required=True, help="to write: GGUF")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(ImatrixSettings, arguments.settings)

    import numpy as np

    from workflow_scripts.quantize import calibration, imatrix
    from workflow_scripts.quantize.importance import Collector
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
    from workflow_scripts.tokens.documents import Documents

    chunk_tokens = min(CHUNK_TOKENS, Facts.read(arguments.facts).served_context_tokens)
    limits = {"chunk_tokens": chunk_tokens, "n_tokens": settings.n_tokens}
    collector = Collector()
    with LlamaCppModel(
        arguments.gguf,
        context_tokens=chunk_tokens,
        n_threads=arguments.threads,
        batch_tokens=chunk_tokens,
        n_sequences=N_SEQUENCES,
        observe=collector,
    ) as model:
        sequences = itertools.chain(
            calibration.chats(Documents(arguments.tokens), **limits),
            *(texts(path, model, **limits) for path in arguments.texts),
        )
        n_tokens = decode(model, collector, sequences, chunk_tokens=chunk_tokens)
    if not n_tokens:
        raise StageError(
            "there is no text to compute an importance matrix on", where=arguments.tokens
        )
    report_unused(collector)
    imatrix.write(
        arguments.imatrix,
        imatrix.Imatrix(
            sums={name: sums.astype(np.float32) for name, sums in collector.sums.items()},
            counts=collector.counts,
            datasets=[str(path) for path in (arguments.tokens, *arguments.texts)],
            chunk_tokens=chunk_tokens,
            n_chunks=n_tokens // chunk_tokens,
        ),
    )
    logger.info(
        "computed n_matrices=%d n_tokens=%d path=%s",
        len(collector.sums),
        n_tokens,
        arguments.imatrix,
    )


def texts(
    path: Path, model: LlamaCppModel, *, chunk_tokens: int, n_tokens: int
) -> Iterator[np.ndarray]:
    """A text file, tokenized and cut as llama-imatrix does."""
    import numpy as np

    from workflow_scripts.quantize import calibration

    files.check_whole(path)
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(CHARACTERS_PER_TOKEN * n_tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(
            "a text to calibrate on cannot be read", where=path, found=error
        ) from error
    input_ids = np.array(model.tokenize(text, adds_bos=True, parses_control=False))
    return calibration.first_tokens(calibration.cut(input_ids, chunk_tokens=chunk_tokens), n_tokens)


def decode(
    model: LlamaCppModel,
    collector: Collector,
    sequences: Iterator[np.ndarray],
    *,
    chunk_tokens: int,
) -> int:
    """Run all sequences through the model; how many tokens they had."""
    from workflow_scripts.quantize import calibration

    n_tokens = 0
    batches = calibration.batches(sequences, batch_tokens=chunk_tokens, n_sequences=N_SEQUENCES)
    for batch in log.progress(batches, logger, total=None, unit="batches"):
        model.decode_together(batch)
        collector.check()
        n_tokens += sum(map(len, batch))
    return n_tokens


def report_unused(collector: Collector) -> None:
    """Experts that no token was sent to keep their precision by chance: say so, once."""
    unused = sum(int((counts == 0).sum()) for counts in collector.counts.values())
    if unused:
        logger.warning(
            "saw no token for n_expert_matrices=%d of %d; raise gguf.imatrix.n_tokens, or name"
            " more text in gguf.imatrix.files",
            unused,
            sum(map(len, collector.counts.values())),
        )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
