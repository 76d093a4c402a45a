"""Loaded models by name: releases, adapters on a base, and a draft model that runs ahead."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from workflow_scripts import files, log
from workflow_scripts.log import StageError
from workflow_scripts.models.tokenizer_files import find_tokenizer
from workflow_scripts.release.modelfile import DEFAULT_CONTEXT_TOKENS
from workflow_scripts.serve import completions
from workflow_scripts.serve.prompts import Prompts
from workflow_scripts.serve.release import Release

if TYPE_CHECKING:
    import argparse

    import numpy as np
    import numpy.typing as npt
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaDraftModel

logger = log.stage_logger("serve")


@dataclass(frozen=True)
class Device:
    """How a model runs on this machine."""

    n_ctx: int | None = None
    """Context in tokens; None is `DEFAULT_CONTEXT_TOKENS`, or what the release may be run with."""
    n_gpu_layers: int | None = None
    """Layers on the GPU, −1 for all; None is all where llama.cpp was built with one."""
    n_threads: int | None = None
    """CPU threads; None leaves the choice to llama-cpp-python."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every program that loads a release."""
    parser.add_argument(
        "--n-ctx",
        type=int,
        help=f"context, tokens; default: {DEFAULT_CONTEXT_TOKENS}, or all that the release has",
    )
    parser.add_argument(
        "--n-gpu-layers",
        type=int,
        help="layers on the GPU, -1 for all; default: all, where llama.cpp was built with one",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: half the cores")


def device_of(arguments: argparse.Namespace) -> Device:
    return Device(arguments.n_ctx, arguments.n_gpu_layers, arguments.threads)


def load(
    release: Release, prompts: Prompts, device: Device, *, draft: DraftModel | None = None
) -> Llama:
    """A release ready to answer chats; `close()` frees it.

    Args:
        draft: runs ahead, and the model checks its tokens. llama-cpp-python then keeps the logits
            of the whole context: 4 bytes × context × vocabulary as it fills.
    Raises:
        StageError: more context than the release may be run with, a GPU that llama.cpp cannot use,
            or a file that it cannot load.
    """
    import llama_cpp

    n_ctx = device.n_ctx or min(release.context_tokens, DEFAULT_CONTEXT_TOKENS)
    if n_ctx > release.context_tokens:
        raise StageError(
            "the context is longer than the model computes rightly",
            where=f"{release.gguf}, --n-ctx",
            found=n_ctx,
            expected=f"at most {release.context_tokens}",
        )
    has_gpu = llama_cpp.llama_supports_gpu_offload()
    n_gpu_layers = device.n_gpu_layers
    if n_gpu_layers and not has_gpu:
        raise StageError(
            "this llama-cpp-python was built without a GPU",
            where="--n-gpu-layers",
            found=n_gpu_layers,
            expected=0,
            to_fix="build it with CUDA or Metal: workflow_scripts/serve/README.md tells how",
        )
    if n_gpu_layers is None:
        n_gpu_layers = -1 if has_gpu else 0
    try:
        llama = llama_cpp.Llama(
            str(release.gguf),
            n_ctx=n_ctx,
            n_gpu_layers=n_gpu_layers,
            n_threads=device.n_threads,
            n_threads_batch=device.n_threads,
            draft_model=cast("LlamaDraftModel | None", draft),  # it is only called
            logits_all=draft is not None,
            verbose=False,
        )
    except ValueError as error:
        raise StageError(
            "llama.cpp cannot load the GGUF", where=release.gguf, found=error
        ) from error
    # llama.cpp rounds the context up, llama-cpp-python's buffers it does not: what is over would be
    # past the model's window, or past the buffers' end.
    llama._n_ctx = n_ctx
    completions.install(llama, prompts)
    return llama


def context_of(llama: Llama) -> int:
    """Tokens that prompt and answer share, of a model from `load`."""
    return len(llama.input_ids)


class DraftModel:
    """A smaller release that guesses ahead; what the larger one answers stays its own.

    Called by llama-cpp-python with all tokens so far. A guess is kept only where the larger model
    samples the same token, so the draft changes the speed alone.

    Args:
        n_ahead: tokens guessed at a time.
    """

    def __init__(self, llama: Llama, *, n_ahead: int) -> None:
        self.llama = llama
        self.n_ahead = n_ahead

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **_: Any) -> npt.NDArray[np.intc]:
        import numpy as np

        n_tokens = min(self.n_ahead, context_of(self.llama) - len(input_ids))
        guesses = self.llama.generate(input_ids.tolist(), temp=0.0)
        # Past its context it guesses nothing: a generator that is not asked computes nothing.
        return np.fromiter(itertools.islice(guesses, max(0, n_tokens)), dtype=np.intc)


def check_draft(release: Release, draft: Release) -> None:
    """A draft's tokens must be the model's.

    Raises:
        StageError: another tokenizer.
    """
    hashes = [files.sha256(find_tokenizer(one.tokenizer)) for one in (release, draft)]
    if hashes[0] != hashes[1]:
        raise StageError(
            "the draft has another tokenizer",
            where=draft.gguf,
            found=f"sha256 {hashes[1][:12]}",
            expected=f"that of {release.gguf}, {hashes[0][:12]}",
            to_fix="draft with a smaller quantization, or a smaller model of the same tokenizer",
        )


@dataclass
class _Served:
    llama: Llama
    prompts: Prompts
    adapter: Any = None
    """llama.cpp's; None serves the model as it is."""


class Models:
    """What llama-cpp-python's server asks for a model by its name.

    Its own proxy holds one model, and loads another when another is asked for; here all of them
    stay loaded, and adapters share their base's weights and context.

    Args:
        releases: the first answers where a request names no model.
        adapters: name → GGUF LoRA, each on the first release.
        draft: runs ahead of every release.
    Raises:
        StageError: two of one name, or a file that llama.cpp cannot load.
    """

    def __init__(
        self,
        releases: Sequence[Release],
        device: Device,
        *,
        adapters: Mapping[str, Path] | None = None,
        draft: Release | None = None,
        n_ahead: int = 8,
    ) -> None:
        adapters = adapters or {}
        names = [release.name for release in releases] + list(adapters)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise StageError(
                "two models have one name", found=", ".join(twice), to_fix="name a GGUF, or rename"
            )
        self._stack = ExitStack()
        self._served: dict[str, _Served] = {}
        for release in releases:
            prompts = Prompts(release.tokenizer)
            runs_ahead = None
            if draft:
                check_draft(release, draft)
                # The draft follows its own model's text, so each model has one of its own.
                n_ctx = device.n_ctx or min(release.context_tokens, DEFAULT_CONTEXT_TOKENS)
                n_ctx = min(n_ctx, draft.context_tokens)
                small = self._load(draft, prompts, dataclasses.replace(device, n_ctx=n_ctx))
                runs_ahead = DraftModel(small, n_ahead=n_ahead)
            llama = self._load(release, prompts, device, draft=runs_ahead)
            self._served[release.name] = _Served(llama, prompts)
            logger.info(
                "loaded name=%s n_ctx=%d path=%s", release.name, context_of(llama), release.gguf
            )
        self.default = releases[0].name
        base = self._served[self.default]
        self._set: dict[int, Any] = {}
        """By model: the adapter set on it."""
        for name, path in adapters.items():
            self._served[name] = _Served(base.llama, base.prompts, load_adapter(base.llama, path))
            logger.info("loaded name=%s base=%s path=%s", name, self.default, path)

    def _load(self, release: Release, *arguments: Any, **options: Any) -> Llama:
        llama = load(release, *arguments, **options)
        self._stack.callback(llama.close)
        return llama

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __contains__(self, name: str) -> bool:
        return name in self._served

    def __call__(self, name: str | None = None) -> Llama:
        """A model, its adapter set.

        Raises:
            ValueError: no such model, in the words that the library makes a client's error of.
        """
        name = name or self.default
        if name not in self._served:
            raise ValueError(f"Model path does not exist: {name}")
        served = self._served[name]
        if self._set.get(id(served.llama)) is not served.adapter:
            set_adapter(served.llama, served.adapter)
            self._set[id(served.llama)] = served.adapter
        return served.llama

    def prompts(self, name: str | None) -> Prompts:
        return self._served[name or self.default].prompts

    def n_ctx(self, name: str | None) -> int:
        return context_of(self._served[name or self.default].llama)

    def close(self) -> None:
        self._stack.close()


def load_adapter(llama: Llama, path: Path) -> Any:
    """A GGUF LoRA for a loaded model, not yet set; freed with the model.

    Raises:
        StageError: there is no such file, or it does not fit the model.
    """
    import llama_cpp

    adapter = None
    if path.is_file():
        adapter = llama_cpp.llama_adapter_lora_init(llama.model, str(path).encode())
    if not adapter:
        raise StageError(
            "llama.cpp cannot load the adapter",
            where=path,
            expected=f"a GGUF LoRA of {llama.model_path}",
        )
    return adapter


def set_adapter(llama: Llama, adapter: Any, scale: float = 1.0) -> None:
    """Compute with an adapter from here on, or with none; what the model has read is forgotten."""
    import llama_cpp

    n = 1 if adapter else 0
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (ctypes.c_float * 1)(scale)
    code = llama_cpp.llama_set_adapters_lora(llama.ctx, adapters, n, scales)
    assert code == 0, code
    llama.reset()  # keys and values were computed with another adapter
