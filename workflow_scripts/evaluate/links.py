"""Links of the chain, loaded: a GGUF by llama.cpp, a checkpoint by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from workflow_scripts.evaluate.link_arguments import Link
from workflow_scripts.models.checkpoint_files import weight_files

# Each engine is imported only for its own links. The conda environments that train have no
# llama.cpp, and the memory that is measured of a GGUF must not include PyTorch's.
if TYPE_CHECKING:
    from workflow_scripts.models.checkpoint import Precision
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
    from workflow_scripts.scoring.transformers_model import TransformersModel


@contextmanager
def loaded(link: Link, context_tokens: int) -> Iterator[LlamaCppModel | TransformersModel]:
    """The model of a link; llama.cpp's memory is freed at the end.

    Args:
        context_tokens: longest input, which llama.cpp reserves a key-value cache for.
    """
    if link.gguf:
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        with LlamaCppModel(
            link.gguf, context_tokens=context_tokens, n_threads=link.n_threads
        ) as model:
            yield model
    else:
        from workflow_scripts.scoring.transformers_model import TransformersModel

        assert link.checkpoint is not None
        yield TransformersModel(
            link.checkpoint,
            window=link.facts.sliding_window,
            precision=precision(link),
            rope=link.facts.rope_parameters,
            adapter=link.adapter,
        )


def precision(link: Link) -> Precision:
    """Weights and arithmetic of a checkpoint on this machine."""
    from workflow_scripts.scoring.precision import measured_precision

    return measured_precision(link.precision, link.checkpoint)


def size_bytes(link: Link) -> int | None:
    """Size of a link's weights on disk: an adapter's are added to its base's; None for a base that
    is quantized when it is loaded."""
    if link.gguf:
        return link.gguf.stat().st_size
    if link.precision != "native":
        return None
    assert link.checkpoint is not None
    adapter = [link.adapter / "adapter_model.safetensors"] if link.adapter else []
    return sum(path.stat().st_size for path in [*weight_files(link.checkpoint), *adapter])
