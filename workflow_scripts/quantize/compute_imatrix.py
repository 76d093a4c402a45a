"""Compute the importance matrix of the F16 GGUF: the input channels that a quantization must keep
precise.

The text is chats of the training split and the user's text files, never validation or test text.
Sums and file format are those of llama.cpp's own llama-imatrix.

python -m workflow_scripts.quantize.compute_imatrix --gguf run-F16.gguf --facts facts.json
    --tokens tokens/train.arrow --settings '{}' --threads 2 --imatrix imatrix.gguf
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.log import StageError
from workflow_scripts.settings import ImatrixSettings, settings_from_json

OUTPUT_VERSION = 1
# llama-imatrix's own default.
CHUNK_TOKENS = 512
N_SEQUENCES = 64
logger = log.stage_logger("compute_imatrix")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="F16 GGUF")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokens", type=Path, required=True, help="training documents")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="additional text files")
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
    n_tokens = 0
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
            *(calibration.text_file(path, model, **limits) for path in arguments.texts),
        )
        batches = calibration.batches(sequences, size=len, limit=chunk_tokens, n_items=N_SEQUENCES)
        for batch in log.progress(batches, logger, total=None, unit="batches"):
            model.decode_together(batch)
            collector.check()
            n_tokens += sum(map(len, batch))
    if not n_tokens:
        raise StageError(
            "there is no text to compute an importance matrix on", where=arguments.tokens
        )
    unused = sum(int((counts == 0).sum()) for counts in collector.counts.values())
    if unused:  # an expert that no token was sent to keeps its precision by chance
        logger.warning(
            "saw no token for n_expert_matrices=%d of %d; raise gguf.imatrix.n_tokens, or name"
            " more text in gguf.imatrix.files",
            unused,
            sum(map(len, collector.counts.values())),
        )
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


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
