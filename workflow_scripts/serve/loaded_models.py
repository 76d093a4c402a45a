"""Loaded models by name: releases, adapters on a base, and a draft model for speculation."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaDraftModel

from workflow_scripts import files, log
from workflow_scripts.log import StageError
from workflow_scripts.models.tokenizer_files import find_tokenizer
from workflow_scripts.release.modelfile import DEFAULT_CONTEXT_TOKENS
from workflow_scripts.serve import completions
from workflow_scripts.serve.devices import Device
from workflow_scripts.serve.prompts import Prompts
from workflow_scripts.serve.release import Release

logger = log.stage_logger("serve")


def load(
    release: Release, prompts: Prompts, device: Device, *, draft: DraftModel | None = None
) -> Llama:
    """A release ready to answer chats; `close()` frees it.

    Args:
        draft: guesses tokens, which the model checks. llama-cpp-python then keeps the logits of
            the whole context: 4 bytes × context × vocabulary as it fills.
    Raises:
        StageError: more context than the release supports, a GPU that llama.cpp cannot use, or a
            file that it cannot load.
    """
    n_ctx = device.n_ctx or min(release.context_tokens, DEFAULT_CONTEXT_TOKENS)
    if n_ctx > release.context_tokens:
        raise StageError(
            "the context is longer than the model supports",
            where=f"{release.gguf}, --n-ctx",
            found=n_ctx,
            expected=f"at most {release.context_tokens}",
        )
    has_gpu = llama_cpp.llama_supports_gpu_offload()
    if device.n_gpu_layers and not has_gpu:
        raise StageError(
            "this llama-cpp-python was built without GPU support",
            where="--n-gpu-layers",
            found=device.n_gpu_layers,
            expected=0,
            to_fix="build it with CUDA or Metal: see docs/serving.md",
        )
    all_layers = -1 if has_gpu else 0
    try:
        llama = Llama(
            str(release.gguf),
            n_ctx=n_ctx,
            n_gpu_layers=all_layers if device.n_gpu_layers is None else device.n_gpu_layers,
            n_threads=device.n_threads,
            n_threads_batch=device.n_threads,
            draft_model=draft,
            logits_all=draft is not None,
            verbose=False,
        )
    except ValueError as error:
        raise StageError(
            "llama.cpp cannot load the GGUF", where=release.gguf, found=error
        ) from error
    # llama.cpp rounds the context up, but not llama-cpp-python's buffers: the additional tokens
    # would be beyond the model's window, or beyond the end of the buffers.
    llama._n_ctx = n_ctx
    completions.install(llama, prompts)
    return llama


def context_of(llama: Llama) -> int:
    """Tokens that prompt and answer share, for a model from `load`."""
    return len(llama.input_ids)


class DraftModel(LlamaDraftModel):
    """A smaller release that guesses the next tokens.

    llama-cpp-python calls it with all tokens so far. A guess is kept only if the larger model
    samples the same token, so the draft changes only the speed.

    Args:
        n_ahead: tokens guessed at a time.
    """

    def __init__(self, llama: Llama, *, n_ahead: int) -> None:
        self.llama = llama
        self.n_ahead = n_ahead

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **_: Any) -> npt.NDArray[np.intc]:
        n_tokens = min(self.n_ahead, context_of(self.llama) - len(input_ids))
        guesses = self.llama.generate(input_ids.tolist(), temp=0.0)
        # Beyond its context it guesses nothing: a generator that is not advanced computes nothing.
        return np.fromiter(itertools.islice(guesses, max(0, n_tokens)), dtype=np.intc)


def check_draft(release: Release, draft: Release) -> None:
    """Check that a draft has the tokenizer of the model.

    Raises:
        StageError: it has another one.
    """
    hashes = [files.sha256(find_tokenizer(one.tokenizer)) for one in (release, draft)]
    if hashes[0] != hashes[1]:
        raise StageError(
            "the draft model has another tokenizer",
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
    """llama.cpp's handle; None serves the model without an adapter."""


class Models:
    """The models that llama-cpp-python's server can use, by name.

    The library's own proxy holds one model and loads another on request. Here all models stay
    loaded, and adapters share the weights and the context of their base.

    Args:
        releases: the first one answers if a request names no model.
        adapters: name → GGUF LoRA, each on the first release.
        draft: a draft model for every release.
    Raises:
        StageError: two models have one name, or llama.cpp cannot load a file.
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
        names = [*(release.name for release in releases), *adapters]
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
                # A draft keeps the text of its model, so each model gets one.
                n_ctx = device.n_ctx or min(release.context_tokens, DEFAULT_CONTEXT_TOKENS)
                n_ctx = min(n_ctx, draft.context_tokens)
                small = load(draft, prompts, dataclasses.replace(device, n_ctx=n_ctx))
                self._stack.callback(small.close)
                runs_ahead = DraftModel(small, n_ahead=n_ahead)
            llama = load(release, prompts, device, draft=runs_ahead)
            self._stack.callback(llama.close)
            self._served[release.name] = _Served(llama, prompts)
            logger.info(
                "loaded name=%s n_ctx=%d path=%s", release.name, context_of(llama), release.gguf
            )
        self.default = releases[0].name
        base = self._served[self.default]
        self._base = base.llama
        self._set_adapter: Any = None
        """The adapter that is set on the first release."""
        for name, path in adapters.items():
            self._served[name] = _Served(base.llama, base.prompts, load_adapter(base.llama, path))
            logger.info("loaded name=%s base=%s path=%s", name, self.default, path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __call__(self, name: str | None = None) -> Llama:
        """A model with its adapter set.

        Raises:
            ValueError: no such model; the library turns these words into a client's error.
        """
        name = name or self.default
        if name not in self._served:
            raise ValueError(f"Model path does not exist: {name}")
        served = self._served[name]
        if served.llama is self._base and served.adapter is not self._set_adapter:
            set_adapter(served.llama, served.adapter)
            self._set_adapter = served.adapter
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
    adapter = path.is_file() and llama_cpp.llama_adapter_lora_init(llama.model, str(path).encode())
    if not adapter:
        raise StageError(
            "llama.cpp cannot load the adapter",
            where=path,
            expected=f"a GGUF LoRA of {llama.model_path}",
        )
    return adapter


def set_adapter(llama: Llama, adapter: Any) -> None:
    """Compute with an adapter from now on, or with none. The model forgets what it has read."""
    code = llama_cpp.llama_set_adapters_lora(
        llama.ctx,
        (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter),
        1 if adapter else 0,
        (ctypes.c_float * 1)(1.0),
    )
    assert code == 0, code
    llama.reset()  # keys and values were computed with another adapter
