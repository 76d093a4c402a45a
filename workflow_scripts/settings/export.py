"""`gguf`, `awq`, `retention`, `push`, `storage`: what a merged model becomes, where it goes."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from workflow_scripts.settings.errors import did_you_mean
from workflow_scripts.settings.fields import Count, Name, Settings

# What llama.cpp's quantizer makes beside F16, from large to small.
QuantizationType = Literal[
    "F32", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_1", "Q4_K_M", "Q4_K_S",
    "IQ4_NL", "Q4_0", "MXFP4_MOE", "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S",
    "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "Q2_0", "IQ2_XXS", "TQ2_0",
    "IQ1_M", "TQ1_0", "IQ1_S", "Q1_0",
]  # fmt: skip
# What a single tensor may be.
TensorType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "IQ4_NL", "Q4_0",
    "MXFP4", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "Q2_0", "IQ2_XXS",
    "TQ2_0", "IQ1_M", "TQ1_0", "IQ1_S", "Q1_0",
]  # fmt: skip
# Those that llama.cpp's quantizer refuses to make without an importance matrix: the first as a
# whole (they hold tensors of the second). Source: `tensor_requires_imatrix` in llama-quant.cpp.
NEED_IMATRIX = frozenset(
    {"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
)
TENSORS_NEED_IMATRIX = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
# Made the same with one as without; the tensor types among them too. Source: ggml-quants.c.
IGNORE_IMATRIX = frozenset(
    {"F32", "F16", "BF16", "Q8_0", "MXFP4_MOE", "MXFP4", "TQ2_0", "TQ1_0", "Q2_0", "Q1_0"}
)


class ImatrixSettings(Settings):
    """`gguf.imatrix`: the importance matrix, by which a quantization spends its bits."""

    use: Literal["always", "auto", "never"] = "always"
    """`always`: for every quantization it can change; `auto`: for those that cannot be made without
    one; `never`: for none, and such types are refused."""
    n_tokens: Count = 51_200
    """Tokens it is computed on: of the training split's chats, and as many of each file. 100 chunks
    of 512 are llama.cpp's practice."""
    files: list[str] = []
    """Text files to compute it on as well."""


class MixSettings(Settings):
    """`gguf.mixes.<name>`: a quantization with tensors of other types, built where `quantizations`
    names it."""

    type: QuantizationType
    """Type of what the other keys leave."""
    output: TensorType | None = None
    """Type of the output layer; null is what llama.cpp takes for `type`."""
    token_embd: TensorType | None = None
    """Type of the token embeddings; null is what llama.cpp takes for `type`."""
    tensors: dict[str, TensorType] = {}
    """Types of tensors by a regular expression found in their names: `{attn_v: Q8_0,
    'blk\\.[01]\\.ffn_down': Q6_K}`; the first that is found counts."""

    @model_validator(mode="after")
    def _can_be_made(self) -> MixSettings:
        for key in ("output", "token_embd"):
            found = getattr(self, key)
            # Neither is a product that an importance matrix is taken of.
            if found in TENSORS_NEED_IMATRIX:
                raise ValueError(f"{key}: {found} needs an importance matrix, which it has not")
        if self.tensors and self.type in ("F32", "BF16"):
            raise ValueError(f"tensors: llama.cpp takes none beside `type: {self.type}`")
        for pattern in self.tensors:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"tensors: {pattern!r} is no regular expression: {error}"
                ) from None
        return self

    @property
    def needs_imatrix(self) -> bool:
        """llama.cpp does not make it without one."""
        return self.type in NEED_IMATRIX or not TENSORS_NEED_IMATRIX.isdisjoint(
            self.tensors.values()
        )

    @property
    def takes_imatrix(self) -> bool:
        """It is another with one than without."""
        return not IGNORE_IMATRIX.issuperset({self.type, *self.tensors.values()})


def _is_made(name: object, info: ValidationInfo) -> object:
    """A name of `gguf.quantizations`: a type, or a mix."""
    mixes, imatrix = info.data.get("mixes"), info.data.get("imatrix")
    if mixes is None or imatrix is None:  # they have errors of their own
        return name
    known = [*get_args(QuantizationType), *mixes]
    if name not in known:
        raise ValueError(
            f"found {name!r}, expected a type of llama.cpp's or an entry of gguf.mixes"
            f" ({did_you_mean(str(name), known)})"
        )
    mix = mixes.get(name) or MixSettings.model_validate({"type": name})
    if imatrix.use == "never" and mix.needs_imatrix:
        raise ValueError(
            f"found {name!r}, which llama.cpp makes with an importance matrix only;"
            " set gguf.imatrix.use: auto"
        )
    return name


Quantization = Annotated[QuantizationType | Name, BeforeValidator(_is_made)]


class GgufSettings(Settings):
    """`gguf`: what is made of the merged model."""

    # First, as `quantizations` is checked by them.
    mixes: dict[Name, MixSettings] = {}
    """Quantizations of your own, by name: `{Q4_K_L: {type: Q4_K_M, output: Q8_0, token_embd:
    Q8_0}}`."""
    imatrix: ImatrixSettings = ImatrixSettings()
    """The importance matrix of the quantizations."""
    quantizations: Annotated[list[Quantization], Field(min_length=1)] = ["Q8_0", "Q4_K_M"]
    """llama.cpp quantization types, and names of `mixes`; F16 is always made, it is their
    source."""
    quantized_by: str | None = None
    """User or organization that files and model card name as their maker."""

    @model_validator(mode="after")
    def _each_is_one(self) -> GgufSettings:
        if len(set(self.quantizations)) != len(self.quantizations):
            raise ValueError("quantizations: a type stands twice")
        # Types, and the other links of the chain, whose files lie in the same folder.
        taken = {"F16", "adapter", "merged", "awq", *get_args(QuantizationType)} & self.mixes.keys()
        if taken:
            raise ValueError(f"mixes: the name {min(taken)!r} is taken; choose another")
        return self

    def mix(self, name: str) -> MixSettings:
        """What a quantization is made of: the mix of that name, or the type."""
        return self.mixes.get(name) or MixSettings.model_validate({"type": name})

    def uses_imatrix(self, name: str) -> bool:
        """Whether a quantization is made with the importance matrix."""
        mix = self.mix(name)
        return mix.needs_imatrix or (self.imatrix.use == "always" and mix.takes_imatrix)


class RetentionSettings(Settings):
    """`retention`: what large intermediates stay once nothing needs them any more. One that went is
    made again when something new asks for it; figures, adapters and releases always stay."""

    merged: bool = True
    """Merged models in 16 bits (of a 7B 14.5 GB each)."""
    f16: bool = True
    """F16 GGUFs (as large), which are then in no release either."""


class AwqSettings(Settings):
    """`awq`: the merged model in AWQ's 4 bits as well, for engines that serve such a folder (vLLM,
    SGLang)."""

    use: bool = False
    """Make it, for every run in `build`, and score it along the chain."""
    group_size: Literal[32, 64, 128] = 128
    """Weights that share a scale and a zero; fewer are more precise, and more bytes."""
    n_tokens: Count = 65_536
    """Tokens of the training split's chats that it is calibrated on; 128 times 512 is AWQ's
    practice."""
    sequence_tokens: Count = 512
    """Longest piece of a chat to calibrate on, tokens; never longer than the window."""


class PushSettings(Settings):
    """`push`: releases on the Hugging Face Hub (`snakemake push_release`)."""

    owner: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """User or organization whose `owner/<run>-GGUF` a run's release goes to."""
    private: bool = True
    """A repository that is made for a release is private."""
    dry_run: bool = True
    """Say what would be uploaded, and upload nothing."""


class StorageSettings(Settings):
    """`storage`: releases on S3-compatible storage (`snakemake store`)."""

    releases: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://[^{}*?]+[^{}*?/]$")] | None = None
    """Folder as a URL (`s3://bucket/folder`), in which each run's release has a folder of its
    name."""
